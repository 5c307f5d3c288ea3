"""Who works for a job: counts workers that are lost, and sees to it that local ones come back."""

import contextlib
import time

from distributed import Client, LocalCluster

from pipeline.jobs.observer import Observer

# Between two looks at the workers: asking a scheduler of a thousand is not free.
_LOOK_S = 2.0
# A local worker that died is back within this, even on a busy machine; then another one is started.
REVIVAL_S = 30.0
# Between two remarks that there is no worker.
_REMARK_S = 60.0


class Workers:
    """The workers of a client; `threads` is the number of tasks they can run at once."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads: dict[str, int] = dict(client.nthreads())
        self._looked = self._complete = self._worked = time.monotonic()
        self._remarks = 0

    @property
    def threads(self) -> int:
        return sum(self._threads.values())

    def dashboard(self) -> str | None:
        """The address of Dask's page, where the scheduler shows one."""
        shown = "dashboard" in self._client.scheduler_info()["services"]
        return self._client.dashboard_link if shown else None

    def look(self, observer: Observer) -> None:
        """Count workers and report what changed, if it is time to."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        # A scheduler that is gone shows in the state of the client, after a while.
        with contextlib.suppress(OSError, RuntimeError):
            threads = dict(self._client.nthreads())
            for address in self._threads.keys() - threads.keys():
                observer.happened("worker lost", f"worker {address} is gone")
            self._threads = threads
            self._revive(now)
            self._remark(now, observer)

    def _revive(self, now: float) -> None:
        cluster = self._client.cluster
        if not isinstance(cluster, LocalCluster) or len(self._threads) >= len(cluster.worker_spec):
            self._complete = now
        elif now - self._complete > REVIVAL_S:
            self._complete = now
            cluster.scale(len(cluster.worker_spec))

    def _remark(self, now: float, observer: Observer) -> None:
        if self._threads:
            self._worked, self._remarks = now, 0
        elif now - self._worked > _REMARK_S * self._remarks + _LOOK_S:
            self._remarks += 1
            observer.happened(
                "waiting",
                "there is no worker, so the job waits for one; Ctrl-C ends it, what is done stays done",
            )
