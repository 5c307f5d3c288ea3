"""Where and how a job runs: what does not fix the bytes of its output."""

from typing import Self

from pydantic import Field, model_validator

from pipeline.scorers.config import Frozen


class RunConfig(Frozen):
    """Where and how a job runs; of this, only what may be opened can change which scenes are in."""

    workers: int | None = Field(
        None, ge=1, description="Worker processes; one per CPU core when not given."
    )
    scheduler: str | None = Field(
        None, description="Address of a running Dask scheduler, instead of local workers."
    )
    max_block_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="Scenes whose compressed blocks decode to more bytes than this are refused.",
    )
    max_scene_px: int = Field(
        2**36,
        ge=1,
        description="Scenes of more pixels (height times width) than this are refused.",
    )
    allow: tuple[str, ...] = Field(
        (),
        description="Further folders and URL prefixes that a catalogue may point to.",
    )
    jpeg2000: bool = Field(
        False, description="Whether JPEG 2000 files may be opened; they decode very slowly."
    )
    checksums: str | None = Field(
        None,
        description="List of the files' checksums as sha256sum writes it, below the archive; verified.",
    )
    sign: str | None = Field(
        None, description="package.module:function that signs the URLs of a catalogue's assets."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("run.workers has no effect beside run.scheduler; give one of them")
        return self
