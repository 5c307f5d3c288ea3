"""Where tasks run: a user's Dask scheduler, local worker processes, or this process.

One task is one whole shard; a bounded number is under way, so that the scheduler never holds more than
a few of them, however large the job.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from distributed import Client, as_completed
from distributed.scheduler import KilledWorker

from pipeline.errors import StoreError
from pipeline.jobs.clients import client_of
from pipeline.jobs.measures import MEASURES
from pipeline.settings.run import RunConfig

# Shards under way per worker: one at work, one waiting.
_IN_FLIGHT_PER_WORKER = 2
TaskT = TypeVar("TaskT")


class Observer(Protocol):
    """Hears how the job goes, in tiles; what an earlier run did is included in `done_tiles`."""

    def planned(self, num_tiles: int, done_tiles: int) -> None: ...

    def shard_done(self, tiles: int) -> None: ...


def run_tasks(
    function: Callable[[TaskT], dict[str, Any]],
    tasks: Iterator[TaskT],
    num_tasks: int,
    run: RunConfig,
    store: str,
) -> Iterator[dict[str, Any]]:
    """The function's results in order of completion; tasks are made as they are needed.

    Raises StoreError if no scheduler answers, or if a task kills its workers.
    """
    with client_of(run, num_tasks) as client:
        yield from _results(client, function, tasks, store)


def _results(
    client: Client, function: Callable[[TaskT], dict[str, Any]], tasks: Iterator[TaskT], store: str
) -> Iterator[dict[str, Any]]:
    running = as_completed([])
    window = _IN_FLIGHT_PER_WORKER * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))

    def submit_next() -> None:
        for task in tasks:
            running.add(client.submit(function, task, pure=False))
            return

    for _ in range(window):
        submit_next()
    try:
        for future in running:
            row = future.result()
            future.release()
            submit_next()
            row.pop(MEASURES, None)
            yield row
    except KilledWorker as error:
        raise StoreError(
            f"{store}: a shard killed its workers, most likely for lack of memory ({error}); run the "
            "same command again with fewer run.workers, what is done stays done"
        ) from None
