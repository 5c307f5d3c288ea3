"""Clients of Dask schedulers: the user's own, or local worker processes."""

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator

import dask
from distributed import Client, LocalCluster

from pipeline.errors import StoreError
from pipeline.settings.run import RunConfig

# Dask has workers return freed memory at once, which glibc then does for every window and packed frame: a
# third of a worker's time went into clearing pages. Smaller pieces than this stay in the process.
_MALLOC = {"distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 64 * 2**20}


@contextlib.contextmanager
def client_of(run: RunConfig, num_tasks: int) -> Iterator[Client]:
    """A client of the user's scheduler, or of local single-threaded worker processes."""
    if run.scheduler is not None:
        try:
            client = Client(run.scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise StoreError(
                f"run.scheduler {run.scheduler}: no Dask scheduler answers there ({error}); start one "
                "with `dask scheduler`, or leave the option out"
            ) from None
        with client:
            yield client
        return
    workers = min(run.workers or os.cpu_count() or 1, num_tasks)
    dashboard = "127.0.0.1:0" if importlib.util.find_spec("bokeh") else None
    with _ignored_interrupts(), dask.config.set(_MALLOC):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=dashboard,
            silence_logs=logging.CRITICAL,
        )
    with cluster, Client(cluster) as client:
        yield client


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
