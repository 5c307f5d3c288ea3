"""Runs tasks on Dask workers: a user's scheduler, or local worker processes.

One task is one whole shard; a bounded number is under way, so that the scheduler never holds more than
a few of them, however large the job. What kills its workers is done again alone (`pipeline.jobs.isolate`).
"""

import contextlib
import importlib.util
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import Future as LocalFuture
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import dask.config
from distributed import Client, Future, as_completed, get_worker, performance_report
from distributed.protocol import pickle
from distributed.scheduler import KilledWorker

from pipeline.errors import ConfigError, StoreError
from pipeline.jobs.alone import Solitary, StoppedError
from pipeline.jobs.clients import client_of
from pipeline.jobs.hosts import local_paths, require_seen
from pipeline.jobs.isolate import excluding, name_of, run_isolated
from pipeline.jobs.measures import MEASURES, Measures
from pipeline.jobs.observer import Observer
from pipeline.jobs.process import ENVIRONMENT, be_one_of_many, dying_after
from pipeline.jobs.retries import Trial
from pipeline.jobs.workers import REVIVAL_S, Workers
from pipeline.settings.run import RunConfig

# Shards under way per worker thread: one at work, one waiting. At least so many in all, because handing
# out and taking in several at once halves what each costs; they wait with the scheduler.
_IN_FLIGHT_PER_THREAD = 2
_LEAST_IN_FLIGHT = 64
# Longest wait for results before workers are looked at.
_TICK_S = 1.0
_DASK = {
    # A task whose worker died runs on another one once; then it is done alone, which is the fairer trial.
    "distributed.scheduler.allowed-failures": 1,
    "distributed.deploy.lost-worker-timeout": f"{REVIVAL_S:g}s",
    "distributed.nanny.environ": ENVIRONMENT,
}
TaskT = TypeVar("TaskT")


def run_tasks(
    function: Callable[[TaskT], dict[str, Any]],
    tasks: Iterator[TaskT],
    num_tasks: int,
    run: RunConfig,
    store: str,
    observer: Observer,
    reads: Sequence[str] = (),
) -> Generator[list[dict[str, Any]]]:
    """The function's results in order of completion, as many at once as there are.

    Tasks are made as they are needed; workers need the folder `store` and what they read, `reads`. Close
    the iterator (`contextlib.closing`) to end the workers at once.
    Raises StoreError if no scheduler answers or it goes away, or if a task kills its workers and no
    scene is to blame; ConfigError if the performance report cannot be made.
    """
    check_report(run)
    with dask.config.set(_DASK), client_of(run, num_tasks, store, reads) as client:
        if client.cluster is not None and client.loop is not None:
            # Workers that are started again must be as deaf to Ctrl-C as the first ones.
            client.loop.add_callback(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
        job = _Run(client, function, tasks, run, store, local_paths(reads))
        with client.as_current(), _report(run), contextlib.closing(job) as running:
            try:
                yield from running.rows(observer)
            except (KeyboardInterrupt, GeneratorExit):
                observer.happened("stopping", "stopping the workers; Ctrl-C again ends at once")
                raise


def check_report(run: RunConfig) -> None:
    """Raise ConfigError if the performance report cannot be made or written."""
    if run.report is None:
        return
    if importlib.util.find_spec("bokeh") is None:
        raise ConfigError("run.report needs bokeh; install it with: pip install 'aptile[viz]'")
    folder = Path(run.report).absolute().parent
    if not folder.is_dir() or Path(run.report).is_dir():
        raise ConfigError(f"run.report {run.report}: expected a file in a folder that exists")


def _report(run: RunConfig) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if run.report is None else performance_report(run.report)


def work(
    function: Callable[[TaskT], dict[str, Any]],
    limit_s: float | None,
    paths: tuple[str, ...],
    packed: bytes,
) -> dict[str, Any]:
    """What a worker does: one packed task, and no longer than the limit where its death harms nobody else.

    Raises StoreError in a worker that joined late and does not see the paths.
    """
    require_seen(paths)
    task: TaskT = pickle.loads(packed)
    worker = get_worker()
    if worker.nanny is None or worker.state.nthreads > 1:
        return function(task)
    be_one_of_many()
    with dying_after(limit_s):
        return function(task)


class _Run(Generic[TaskT]):
    """The tasks of one job, on the workers of one client."""

    def __init__(
        self,
        client: Client,
        function: Callable[[TaskT], dict[str, Any]],
        tasks: Iterator[TaskT],
        run: RunConfig,
        store: str,
        paths: tuple[str, ...],
    ) -> None:
        self._paths = paths
        self._client, self._function, self._tasks, self._store = client, function, tasks, store
        self._limit_s = run.task_timeout_s
        self._running = as_completed([], loop=client.loop)
        self._task_of: dict[Future[Any], TaskT] = {}
        self._alone: dict[LocalFuture[tuple[dict[str, Any], Trial]], TaskT] = {}
        self._solitary = Solitary(self._limit_s)
        self._isolation = ThreadPoolExecutor(1, "isolation")
        self._hung: dict[str, str] = {}
        self._error: BaseException | None = None
        self._workers = Workers(client)

    def close(self) -> None:
        """End what runs alone; what runs on workers ends with the client."""
        self._solitary.stop()
        self._isolation.shutdown(cancel_futures=True)

    def rows(self, observer: Observer) -> Generator[list[dict[str, Any]]]:
        """Lists of results, without their measures."""
        observer.started(self._workers.dashboard())
        self._refill()
        while self._task_of or self._alone:
            rows = [*self._completed(observer), *self._isolated(observer)]
            self._workers.look(observer)
            if self._client.status in ("closing", "closed"):
                self._error = self._scheduler_gone()
            if self._error is None:
                self._refill()
            if rows:
                yield [_without_measures(row, observer) for row in rows]
            if self._error is not None:
                raise self._error

    def _refill(self) -> None:
        window = max(_LEAST_IN_FLIGHT, _IN_FLIGHT_PER_THREAD * self._workers.threads)
        room = window - len(self._task_of)
        batch = [excluding(task, self._hung) for task in islice(self._tasks, max(0, room))]
        if batch:
            number = len(batch)
            same = ([part] * number for part in (self._function, self._limit_s, self._paths))
            # As bytes: the scheduler would take every task apart and pack it again.
            packed = [pickle.dumps(task) for task in batch]
            futures = self._client.map(work, *same, packed, pure=False)
            self._task_of.update(zip(futures, batch, strict=True))
            self._running.update(futures)

    def _completed(self, observer: Observer) -> list[dict[str, Any]]:
        """Results of tasks that ended on workers; what their workers did not survive goes on alone."""
        done = []
        for future in self._ready():
            if future.status == "finished":
                done.append(future)
                continue
            self._failed(future, self._task_of.pop(future), observer)
        try:
            rows = self._client.gather(done)
        except KilledWorker:
            # A worker died with results in its memory; which of them, their state will say.
            self._running.update(done)
            return []
        except (CancelledError, OSError):
            self._error = self._scheduler_gone()
            return []
        for future in done:
            del self._task_of[future]
        return rows

    def _failed(self, future: Future[Any], task: TaskT, observer: Observer) -> None:
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker | MemoryError):
            self._isolate(task, error, observer)
        else:
            self._error = error or self._scheduler_gone()

    def _ready(self) -> list[Future[Any]]:
        """Tasks that ended; none if nothing did for a while."""
        condition = self._running.thread_condition
        with condition:
            if not self._running.has_ready():
                condition.wait(_TICK_S)
        return self._running.next_batch(block=False)

    def _isolate(self, task: TaskT, error: BaseException, observer: Observer) -> None:
        why = "ran out of memory" if isinstance(error, MemoryError) else "its workers died"
        observer.happened("shard retried", f"{name_of(task)}: {why}; it is done again alone")
        self._alone[self._isolation.submit(self._run_isolated, task)] = task

    def _run_isolated(self, task: TaskT) -> tuple[dict[str, Any], Trial]:
        """In the other thread: see `pipeline.jobs.isolate`."""
        task = excluding(task, self._hung)
        row, trial = run_isolated(self._function, task, self._solitary, self._store)
        # Each hanging read costs the time limit several times over, so further shards do without.
        self._hung.update({scene: trial.excluded[scene] for scene in trial.hung})
        return row, trial

    def _isolated(self, observer: Observer) -> list[dict[str, Any]]:
        """Results of tasks that ended alone."""
        rows = []
        for future in [future for future in self._alone if future.done()]:
            task = self._alone.pop(future)
            try:
                row, trial = future.result()
            except (StoppedError, Exception) as error:
                self._error = error
                continue
            for scene, reason in trial.excluded.items():
                observer.happened("scene given up", f"{name_of(task)}, scene {scene}: {reason}")
            rows.append(row)
        return rows

    def _scheduler_gone(self) -> StoreError:
        return StoreError(
            f"{self._store}: the Dask scheduler went away; what is done stays done, run the same command "
            "again once it is back"
        )


def _without_measures(row: dict[str, Any], observer: Observer) -> dict[str, Any]:
    measures = row.pop(MEASURES, None)
    if measures is not None:
        observer.measured(Measures(**measures))
    return row
