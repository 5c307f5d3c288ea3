"""Where and how a job runs: what does not fix the bytes of its output."""

from typing import Self

from pydantic import Field, model_validator

from pipeline.scenes import Retries
from pipeline.scorers.config import Frozen


class RetriesConfig(Frozen):
    """How a read that fails for a passing reason, local or remote, is tried again."""

    attempts: int = Field(
        Retries.attempts, ge=1, description="How often a read is tried at most; 1 for no retries."
    )
    first_wait_s: float = Field(
        Retries.first_wait_s, ge=0, description="Seconds before the second attempt."
    )
    factor: float = Field(
        Retries.factor, ge=1, description="How many times longer each further wait is."
    )
    longest_wait_s: float = Field(
        Retries.longest_wait_s, ge=0, description="Seconds that no wait exceeds."
    )
    timeout_s: float = Field(
        Retries.timeout_s, gt=0, description="Seconds of silence after which a server has failed."
    )
    budget_s: float = Field(
        Retries.budget_s, gt=0, description="Seconds after which a read is not tried any more."
    )


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
    allow: tuple[str, ...] = Field(
        (),
        description="Further folders and URL prefixes that a catalogue may point to.",
    )
    jpeg2000: bool = Field(
        False, description="Whether JPEG 2000 files may be opened; they decode very slowly."
    )
    sign: str | None = Field(
        None, description="package.module:function that signs the URLs of a catalogue's assets."
    )

    allow_private_addresses: bool = Field(
        False,
        description="Whether servers at private addresses may be asked that no root names as such.",
    )
    retries: RetriesConfig = RetriesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("run.workers has no effect beside run.scheduler; give one of them")
        return self
