"""Clients of Dask schedulers: the user's own, one with workers on a cluster, or local worker processes."""

import contextlib
import importlib.util
import logging
import os
import signal
import ssl
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.security import Security

from pipeline.errors import StoreError
from pipeline.jobs.hosts import check_workers
from pipeline.jobs.process import ENVIRONMENT, MALLOC
from pipeline.jobs.queues import cluster_of, no_worker, under_way
from pipeline.settings.cluster import TlsConfig
from pipeline.settings.run import RunConfig

_CONNECT_S = 10
# A scheduler that the user started has its workers already, or they are about to come.
_FIRST_WORKER_S = 60.0
_BEFORE_START = {f"distributed.nanny.pre-spawn-environ.{name}": v for name, v in MALLOC.items()}
# Shown on stderr unless a program sets up logging of its own.
_log = logging.getLogger("aptile")


@contextlib.contextmanager
def client_of(
    run: RunConfig, num_tasks: int, store: str | None = None, reads: Sequence[str] = ()
) -> Iterator[Client]:
    """A client of a scheduler that has a worker: `run.scheduler`, `run.cluster`, or local processes.

    Workers elsewhere must have the versions of this process, share the folder `store` and see `reads`.
    Raises StoreError if no scheduler answers, no worker comes, or one differs.
    """
    if run.scheduler is not None:
        connected = _own_scheduler(run.scheduler, run.tls)
    elif run.cluster is not None:
        connected = _on_cluster(run)
    else:
        connected = _local(run, num_tasks)
    with connected as client:
        if run.scheduler is not None or run.cluster is not None:
            check_workers(client, store, reads)
        yield client


class _Client(Client):
    """Closes itself whatever keeps it from connecting: Dask leaves it open after some errors, such as TLS
    without certificates, and collecting it as garbage may then wait."""

    def start(self, **options: Any) -> None:
        try:
            super().start(**options)  # type: ignore[no-untyped-call]
        except BaseException:
            self.close()  # type: ignore[no-untyped-call]
            raise


@contextlib.contextmanager
def _own_scheduler(address: str, tls: TlsConfig | None) -> Iterator[Client]:
    security = None if tls is None else security_of(tls)
    try:
        client = _Client(  # type: ignore[no-untyped-call]
            address, timeout=_CONNECT_S, security=security, set_as_default=False
        )
    except (OSError, ValueError, TypeError) as error:
        hint = "leave the option out"
        if address.startswith("tls://"):
            hint = "give run.tls the certificates it asks for" if tls is None else "check run.tls"
        raise StoreError(
            f"run.scheduler {address}: no Dask scheduler answers there ({error}); start one "
            f"with `dask scheduler`, or {hint}"
        ) from None
    with client:
        try:
            _await_worker(client, _FIRST_WORKER_S, f"`dask worker {address}` to be started")
        except TimeoutError:
            raise StoreError(
                f"run.scheduler {address}: no worker came within {_FIRST_WORKER_S:g} s; start some with "
                f"`dask worker {address} --nworkers N --nthreads 1`"
            ) from None
        yield client


@contextlib.contextmanager
def _on_cluster(run: RunConfig) -> Iterator[Client]:
    assert run.cluster is not None
    security = None if run.tls is None else security_of(run.tls)
    with (
        cluster_of(run.cluster, security) as cluster,
        Client(cluster, security=security, set_as_default=False) as client,
    ):
        try:
            _await_worker(client, run.cluster.wait_s, under_way(run.cluster, cluster))
        except TimeoutError:
            raise StoreError(no_worker(run.cluster, cluster)) from None
        yield client


def _await_worker(client: Client, wait_s: float, awaited: str) -> None:
    """Wait for one worker, and say so if there is none yet; raises TimeoutError."""
    if client.scheduler_info(n_workers=-1)["workers"]:
        return
    _log.warning("waiting up to %g s for the first worker: %s", wait_s, awaited)
    client.wait_for_workers(1, timeout=wait_s)


@contextlib.contextmanager
def _local(run: RunConfig, num_tasks: int) -> Iterator[Client]:
    workers = min(run.workers or os.cpu_count() or 1, num_tasks)
    dashboard = "127.0.0.1:0" if importlib.util.find_spec("bokeh") else None
    with _ignored_interrupts(), dask.config.set(_BEFORE_START):
        try:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=run.worker_memory or "auto",
                env=ENVIRONMENT,
                dashboard_address=dashboard,
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            raise StoreError(
                f"the {workers} local worker processes did not start ({error}): one ended as soon as it "
                "began; see to memory and limits of processes, then run the same command again"
            ) from None
    with cluster, Client(cluster, set_as_default=False) as client:
        yield client


def security_of(tls: TlsConfig) -> Security:
    """What Dask needs to show these certificates, as any of its roles, and to refuse plain connections.

    Raises StoreError if a file is missing, is no certificate, or does not belong to the others.
    """
    for key, path in tls:
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise StoreError(
                f"run.tls.{key} {path}: cannot be read: {error.strerror}; give a PEM file"
            ) from None
    try:
        ssl.create_default_context(cafile=tls.ca_file)
    except ssl.SSLError:
        raise StoreError(
            f"run.tls.ca_file {tls.ca_file}: holds no certificate; give a PEM file of one"
        ) from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            tls.cert_file, tls.key_file, password=""
        )
    except (ssl.SSLError, ValueError) as error:
        raise StoreError(
            f"run.tls.cert_file {tls.cert_file}: cannot be used with run.tls.key_file {tls.key_file} "
            f"({_reason(error)}); give a certificate in PEM and its own key, without a password"
        ) from None
    pair = {
        f"tls_{role}_{part}": path
        for role in ("client", "scheduler", "worker")
        for part, path in (("cert", tls.cert_file), ("key", tls.key_file))
    }
    return Security(require_encryption=True, tls_ca_file=tls.ca_file, **pair)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")


@contextlib.contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Child processes started inside ignore Ctrl-C: the parent alone decides how a job ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
