"""Where and how a job runs: what does not fix the bytes of its output."""

import re
from fractions import Fraction
from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline.scorers.config import Frozen

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def parse_limit(text: int | str) -> int | Fraction:
    """A count, or a share of the inputs in 0..1 where the text ends in %; ValueError if it is neither."""
    percent = _PERCENT.fullmatch(str(text).strip())
    if percent is not None:
        share = Fraction(percent[1]) / 100
        if share <= 1:
            return share
    elif re.fullmatch(r"\d+", str(text).strip()):
        return int(text)
    raise ValueError("expected a number of inputs such as 10, or a share of them such as 1%")


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

    max_quarantine: int | str | None = Field(
        None,
        description="Most inputs that may be quarantined before the job stops, a number or a share such "
        "as 1%; any number when not given.",
    )
    task_timeout_s: float | None = Field(
        3600.0,
        gt=0,
        description="Seconds after which a shard counts as hung: it is done again alone, and a scene that "
        "hangs alone is quarantined. null waits for ever.",
    )
    report: str | None = Field(
        None, description="HTML file for Dask's performance report of the run; needs bokeh."
    )

    @field_validator("max_quarantine")
    @classmethod
    def _readable(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            parse_limit(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("run.workers has no effect beside run.scheduler; give one of them")
        return self
