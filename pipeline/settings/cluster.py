"""Clusters that a job's Dask workers are started on, and the certificates it shows; one model per kind."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from pipeline.scorers.config import Frozen

# Longer than most queues take, short enough that a mistake is noticed the same day.
_WAIT_S = 3600.0
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _memory(text: str) -> str:
    if (
        not re.fullmatch(r"\d+(\.\d+)? ?([kMGT]B|[KMGT]iB)", text)
        or float(text.rstrip("kKMGTiB ")) == 0
    ):
        raise ValueError(f"{text!r} is no amount of memory; expected one such as 4GiB")
    return text


Memory = Annotated[str, AfterValidator(_memory)]


class TlsConfig(Frozen):
    """Certificates that a client shows to schedulers and workers, all in PEM files."""

    ca_file: str = Field(description="Certificate of the authority that signed the others.")
    cert_file: str = Field(description="Certificate this side shows.")
    key_file: str = Field(description="Private key of that certificate.")


class ClusterConfig(Frozen):
    """What all kinds of clusters have in common."""

    kind: str = Field(description="Kind of cluster.")
    wait_s: float = Field(
        _WAIT_S,
        gt=0,
        allow_inf_nan=False,
        description="Seconds until a job without a worker is given up.",
    )


class BatchConfig(ClusterConfig):
    """A batch queue; every job starts one single-threaded worker per core."""

    command: ClassVar[str]
    walltime_form: ClassVar[tuple[str, str]] = (r"\d+:\d\d:\d\d", "HH:MM:SS")

    jobs: int = Field(ge=1, description="Jobs that are submitted.")
    cores: int = Field(ge=1, description="Cores of a job; it starts one worker process on each.")
    memory: Memory = Field(description="Memory of a job, such as 64GiB; its workers share it.")
    walltime: str = Field(description="Time a job may run, HH:MM:SS in quotes; LSF has HH:MM.")
    queue: str | None = Field(
        None, description="Queue or partition; the default one when not given."
    )
    interface: str | None = Field(
        None, description="Network interface of scheduler and workers, such as ib0."
    )
    local_directory: str | None = Field(
        None, description="Folder on the nodes for what workers keep while they run."
    )
    directives: tuple[str, ...] = Field(
        (), description="Further directives of the job script, such as --constraint=skylake."
    )
    commands: tuple[str, ...] = Field(
        (), description="Shell commands before workers start, such as module load gdal."
    )
    python: str | None = Field(
        None, description="Python of the nodes; the one this runs in when not given."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pattern, form = self.walltime_form
        if not re.fullmatch(pattern, self.walltime):
            raise ValueError(f"walltime is {self.walltime!r}; expected {form} in quotes")
        for name in ("directives", "commands"):
            if any("\n" in line for line in getattr(self, name)):
                raise ValueError(f"{name}: one entry is several lines; give a list with one each")
        return self


class SlurmConfig(BatchConfig):
    """Jobs of SLURM."""

    command = "sbatch"
    walltime_form = (r"(\d+-)?\d+:\d\d:\d\d", "HH:MM:SS or D-HH:MM:SS")

    kind: Literal["slurm"] = Field(description="Kind of cluster.")
    account: str | None = Field(None, description="Account that is charged.")


class PbsConfig(BatchConfig):
    """Jobs of PBS."""

    command = "qsub"

    kind: Literal["pbs"] = Field(description="Kind of cluster.")
    account: str | None = Field(None, description="Account that is charged.")


class LsfConfig(BatchConfig):
    """Jobs of LSF."""

    command = "bsub"
    walltime_form = (r"\d+:\d\d", "HH:MM")

    kind: Literal["lsf"] = Field(description="Kind of cluster.")
    project: str | None = Field(None, description="Project that is charged.")


class KubernetesConfig(ClusterConfig):
    """Pods of the Dask operator; every pod is one single-threaded worker."""

    kind: Literal["kubernetes"] = Field(description="Kind of cluster.")
    workers: int = Field(ge=1, description="Worker pods, one core each.")
    memory: Memory = Field(description="Memory of a pod, such as 4GiB.")
    image: str = Field(description="Container image with the same aptile as here.")
    namespace: str | None = Field(
        None, description="Namespace of the pods; that of the current context when not given."
    )
    volumes: dict[str, str] = Field(
        {}, description="Persistent volume claims by the path that pods see them at."
    )
    env: dict[str, str] = Field({}, description="Environment variables of the pods.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for path in self.volumes:
            if not path.startswith("/"):
                raise ValueError(f"volumes: {path!r} is no absolute path")
        for name in self.env:
            if not _ENVIRONMENT_NAME.fullmatch(name):
                raise ValueError(f"env: {name!r} cannot name an environment variable")
        return self


def _kind(value: Any) -> str | None:
    """The tag of a cluster section."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return None if kind is None else str(kind)


CLUSTER_KINDS = ("slurm", "pbs", "lsf", "kubernetes")
Cluster = Annotated[
    Annotated[SlurmConfig, Tag("slurm")]
    | Annotated[PbsConfig, Tag("pbs")]
    | Annotated[LsfConfig, Tag("lsf")]
    | Annotated[KubernetesConfig, Tag("kubernetes")],
    Discriminator(_kind),
]
