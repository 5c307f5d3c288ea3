"""Dask clusters on batch queues and Kubernetes, made from settings; needs the extra hpc."""

import contextlib
import importlib
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import dask
from dask.utils import parse_bytes
from distributed.core import Status
from distributed.deploy.cluster import Cluster as DaskCluster
from distributed.security import Security

from pipeline.errors import StoreError
from pipeline.jobs.process import ENVIRONMENT
from pipeline.settings.cluster import BatchConfig, Cluster, KubernetesConfig, LsfConfig

# Dask waits five minutes for a worker that fell silent; its shard can be done elsewhere by then.
WORKER_TTL = "60s"
_SCHEDULER_CONFIG = {"distributed.scheduler.worker-ttl": WORKER_TTL}
_SCHEDULER_ENVIRONMENT = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": WORKER_TTL}
_CLASSES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster"}
# What lists jobs by their numbers, per kind.
_LISTINGS = {
    "slurm": ("squeue", "--noheader", "--format=%i %T %r", "--jobs", ","),
    "pbs": ("qstat", " "),
    "lsf": ("bjobs", "-noheader", " "),
}
_LISTING_S = 30
_LISTED_CHARACTERS = 300


@contextlib.contextmanager
def cluster_of(config: Cluster, security: Security | None) -> Iterator[DaskCluster]:
    """A cluster whose workers are asked for, and released in the end.

    Raises StoreError if the packages are missing or the cluster refuses.
    """
    if isinstance(config, KubernetesConfig):
        cluster = _kubernetes_cluster(config)
    else:
        if shutil.which(config.command) is None:
            raise StoreError(
                f"run.cluster.kind {config.kind}: there is no command {config.command} here; run aptile "
                "where jobs are submitted"
            )
        cluster = batch_cluster(config, security)
    with cluster:
        if isinstance(config, BatchConfig):
            _submit(config, cluster)
        yield cluster


def batch_cluster(config: BatchConfig, security: Security | None = None) -> Any:
    """A dask-jobqueue cluster without any job yet; its scheduler runs in this process."""
    make = getattr(_package("dask_jobqueue", config.kind), _CLASSES[config.kind])
    own = ("interface", "local_directory", "python", "queue", "walltime", "cores", "memory")
    arguments = {name: getattr(config, name) for name in own}
    paid = "project" if isinstance(config, LsfConfig) else "account"
    with dask.config.set(_SCHEDULER_CONFIG):
        return make(
            processes=config.cores,
            job_name="aptile",
            job_extra_directives=list(config.directives),
            job_script_prologue=[*_exports(), *config.commands],
            security=security,
            scheduler_options={"dashboard_address": ":0"},
            **arguments,
            **{paid: getattr(config, paid)},
        )


def _exports() -> list[str]:
    return [f"export {name}={value}" for name, value in ENVIRONMENT.items()]


def _submit(config: BatchConfig, cluster: Any) -> None:
    # Not by `scale`, which only logs that a job is refused.
    for _ in range(config.jobs):
        cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        cluster.sync(cluster._correct_state)
    except (RuntimeError, OSError, ValueError) as error:
        for job in cluster.workers.values():
            # A cluster does not close over jobs that it takes for not yet submitted.
            job.status = Status.failed if job.job_id is None else job.status
        reason = _one_line(str(error).rpartition("stderr:")[2])
        raise StoreError(
            f"run.cluster.kind {config.kind}: the queue refused a job ({reason}); correct "
            "run.cluster"
        ) from None


def cluster_spec(config: KubernetesConfig, name: str) -> dict[str, Any]:
    """The DaskCluster resource that the operator is given."""
    operator = _package("dask_kubernetes.operator", config.kind)
    resources = {"cpu": "1", "memory": str(parse_bytes(config.memory))}
    spec: dict[str, Any] = operator.make_cluster_spec(
        name=name,
        image=config.image,
        n_workers=config.workers,
        resources={"requests": resources, "limits": resources},
        env={**ENVIRONMENT, **_SCHEDULER_ENVIRONMENT, **config.env},
        worker_command="dask worker --nthreads 1",
    )
    claims = list(config.volumes.items())
    pod = spec["spec"]["worker"]["spec"]
    pod["volumes"] = [
        {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, (_, claim) in enumerate(claims)
    ]
    pod["containers"][0]["volumeMounts"] = [
        {"name": f"volume-{number}", "mountPath": path} for number, (path, _) in enumerate(claims)
    ]
    return spec


def _kubernetes_cluster(config: KubernetesConfig) -> Any:
    operator = _package("dask_kubernetes.operator", config.kind)
    spec = cluster_spec(config, f"aptile-{uuid.uuid4().hex[:8]}")
    try:
        return operator.KubeCluster(
            custom_cluster_spec=spec,
            namespace=config.namespace,
            resource_timeout=int(config.wait_s),
            quiet=True,
        )
    except Exception as error:  # the package passes on errors of several others
        _abandon(operator.KubeCluster, spec["metadata"]["name"])
        raise StoreError(
            f"run.cluster.kind kubernetes: no cluster could be made ({_one_line(str(error))}); see to "
            "credentials and to the Dask operator, both of which `kubectl get daskclusters` needs"
        ) from None


def _abandon(kind: Any, name: str) -> None:
    """Remove what was begun of a cluster; its package would try so when the interpreter ends."""
    for cluster in [cluster for cluster in kind._instances if cluster.name == name]:
        with contextlib.suppress(Exception):
            cluster.close(timeout=_LISTING_S)
        cluster.status = Status.closed


def _package(name: str, kind: str) -> ModuleType:
    try:
        with _interrupts_kept():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise StoreError(
            f"run.cluster.kind {kind} needs {error.name}; install it with: pip install 'aptile[hpc]'"
        ) from None


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Importing dask_jobqueue makes Ctrl-C end the process as if all were well."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def under_way(config: Cluster, cluster: Any) -> str:
    """What was asked of the cluster, in words."""
    if isinstance(config, KubernetesConfig):
        return f"{config.workers} pods of {cluster.name}"
    return f"{config.kind} jobs {', '.join(_job_ids(cluster))}"


def no_worker(config: Cluster, cluster: Any) -> str:
    """Complaint about a cluster on which no worker came in time, with what the cluster says of it."""
    state = ""
    if isinstance(config, BatchConfig):
        state = f"; the queue says: {_listing(config.kind, _job_ids(cluster))}"
    return (
        f"run.cluster: no worker came within {config.wait_s:g} s of {under_way(config, cluster)}{state}; "
        "raise run.cluster.wait_s if they only wait for their turn"
    )


def _job_ids(cluster: Any) -> list[str]:
    return sorted(str(job.job_id) for job in cluster.workers.values())


def _listing(kind: str, ids: list[str]) -> str:
    """What the queue's own command says of these jobs, on one line."""
    *command, separator = _LISTINGS[kind]
    numbers = [separator.join(ids)] if separator == "," else ids
    try:
        done = subprocess.run(  # noqa: S603 (the queue's command and numbers it gave itself)
            [*command, *numbers], capture_output=True, text=True, timeout=_LISTING_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nothing ({_one_line(str(error))})"
    return _one_line(done.stdout or done.stderr) or "nothing"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LISTED_CHARACTERS]
