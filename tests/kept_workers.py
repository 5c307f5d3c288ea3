"""Local workers that outlive a job, for tests whose subject is not how workers start or die: that takes
seconds each time."""

import contextlib
import os
from collections.abc import Iterator

from distributed import Client

from pipeline.jobs import clients
from pipeline.settings.run import RunConfig

# More would be idle most of the time.
MOST = 2


class KeptWorkers:
    """Stands for `clients._local`: the same clients of the same processes, but one job after the other."""

    def __init__(self) -> None:
        self._local = clients._local
        self._kept: dict[int, contextlib.ExitStack] = {}
        self._clients: dict[int, Client] = {}

    @contextlib.contextmanager
    def local(self, run: RunConfig, num_tasks: int) -> Iterator[Client]:
        number = min(run.workers or os.cpu_count() or 1, num_tasks)
        if number > MOST or run.worker_memory is not None:
            with self._local(run, num_tasks) as client:
                yield client
            return
        if number not in self._kept:
            self._kept[number] = contextlib.ExitStack()
            local = self._local(run, num_tasks)
            self._clients[number] = self._kept[number].enter_context(local)
        try:
            yield self._clients[number]
        except BaseException:
            # What is left undone must not go on beside the next job.
            self.end(number)
            raise

    def end(self, number: int) -> None:
        self._clients.pop(number, None)
        if number in self._kept:
            self._kept.pop(number).close()

    def close(self) -> None:
        for number in list(self._kept):
            self.end(number)
