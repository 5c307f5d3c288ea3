"""Where and how a job runs: what does not fix the bytes of its output."""

import re
from fractions import Fraction
from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline.scenes import Retries
from pipeline.scorers.config import Frozen
from pipeline.settings.cluster import Cluster, KubernetesConfig, Memory, TlsConfig

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_ADDRESS = re.compile(r"(?:(?:tcp|tls|ucx|wss?)://)?(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
# Of a scheduler in the same process: no host, no port.
_IN_PROCESS = "inproc://"


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
        None,
        description="Address of a running Dask scheduler, such as tcp://10.0.0.1:8786, instead of local "
        "workers.",
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
    worker_memory: Memory | None = Field(
        None,
        description="Most memory of a local worker, such as 4GiB; beyond it the worker is restarted. Its "
        "share of the machine when not given.",
    )
    tls: TlsConfig | None = None
    cluster: Cluster | None = Field(
        None, description="Cluster to start workers on, by kind: slurm, pbs, lsf or kubernetes."
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

    @field_validator("scheduler")
    @classmethod
    def _complete(cls, value: str | None) -> str | None:
        """Dask would complain of an address without a port only once the job is planned."""
        if value is not None and not value.startswith(_IN_PROCESS):
            address = _ADDRESS.fullmatch(value)
            if address is None or not 0 < int(address[1]) < 2**16:
                raise ValueError(
                    f"expected host:port, as in tcp://10.0.0.1:8786, got {value!r:.80}"
                )
        return value

    @field_validator("max_quarantine")
    @classmethod
    def _readable(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            parse_limit(value)
        return value

    allow_private_addresses: bool = Field(
        False,
        description="Whether servers at private addresses may be asked that no root names as such.",
    )
    retries: RetriesConfig = RetriesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("run.workers has no effect beside run.scheduler; give one of them")
        elsewhere = "run.scheduler" if self.scheduler is not None else "run.cluster"
        if self.cluster is not None:
            for key in ("workers", "scheduler"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"run.{key} has no effect beside run.cluster; give one of them"
                    )
        if self.worker_memory is not None and (self.scheduler, self.cluster) != (None, None):
            raise ValueError(
                f"run.worker_memory has no effect beside {elsewhere}, whose workers have their own limits"
            )
        if self.tls is not None:
            self._check_tls()
        return self

    def _check_tls(self) -> None:
        """Raise ValueError where nothing would be shown the certificates."""
        if self.scheduler is not None and not self.scheduler.startswith("tls://"):
            raise ValueError(
                f"run.tls has no effect with run.scheduler {self.scheduler}; expected a tls:// address"
            )
        if isinstance(self.cluster, KubernetesConfig):
            raise ValueError(
                "run.tls has no effect with a cluster of kind kubernetes; leave it out"
            )
        if self.scheduler is None and self.cluster is None:
            raise ValueError("run.tls has no effect without run.scheduler or run.cluster")
