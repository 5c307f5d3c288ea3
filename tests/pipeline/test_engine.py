"""Tasks on a scheduler that is there already: workers that come late, are too small, or go away."""

import contextlib
import os
import signal

import pytest
from distributed import LocalCluster

from pipeline.errors import ConfigError, StoreError
from pipeline.jobs import clients
from pipeline.jobs.alone import Solitary, StoppedError
from pipeline.jobs.engine import run_tasks
from pipeline.jobs.retries import Death
from pipeline.settings.run import RunConfig
from support import Watching, counted, hungry, refused


@contextlib.contextmanager
def scheduler(num_workers: int):
    with LocalCluster(
        n_workers=num_workers, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as cluster:
        yield cluster


def results(function, number: int, cluster: LocalCluster, observer: Watching, **run) -> list[int]:
    config = RunConfig(scheduler=cluster.scheduler_address, **run)
    batches = run_tasks(function, iter(range(number)), number, config, ".", observer)
    with contextlib.closing(batches):
        return [row["shard"] for rows in batches for row in rows]


def test_every_task_gives_one_row_and_few_are_under_way():
    drawn = 0

    def tasks():
        nonlocal drawn
        for drawn in range(1, 501):  # noqa: UP028 (the loop variable is looked at)
            yield drawn

    with scheduler(2) as cluster:
        config = RunConfig(scheduler=cluster.scheduler_address)
        seen: list[int] = []
        for rows in run_tasks(counted, tasks(), 500, config, ".", Watching()):
            seen += [row["shard"] for row in rows]
            assert drawn - len(seen) <= 64
    assert sorted(seen) == list(range(1, 501))


class Patient(Watching):
    """Takes the only worker away, and brings another once it hears that there is none."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__()
        self.cluster = cluster

    def started(self, dashboard):
        self.cluster.scale(0)
        self.cluster.sync(self.cluster._correct_state)

    def happened(self, what, text):
        super().happened(what, text)
        if what == "waiting":
            self.cluster.scale(1)


def test_a_job_waits_for_workers_and_says_so():
    with scheduler(1) as cluster:
        observer = Patient(cluster)
        assert sorted(results(counted, 5, cluster, observer)) == list(range(5))
    assert [what for what, _ in observer.happenings] == ["worker lost", "waiting"]
    assert observer.happenings[1][1] == (
        "there is no worker, so the job waits for one; Ctrl-C ends it, what is done stays done"
    )


def test_a_task_without_scenes_that_runs_out_of_memory_alone_too_ends_the_job_with_advice():
    with (
        scheduler(1) as cluster,
        pytest.raises(
            StoreError, match=r"ran out of memory, 2 times, alone .* fewer store.shard_tiles"
        ),
    ):
        results(hungry, 2, cluster, Watching())


def test_a_scheduler_that_goes_away_ends_the_job_in_words(monkeypatch):
    monkeypatch.setattr(clients, "_CONNECT_S", 2)
    with scheduler(1) as cluster:

        class Closing(Watching):
            def started(self, dashboard):
                cluster.close()

        with pytest.raises(StoreError, match=r"\.: the Dask scheduler went away; what is done"):
            results(counted, 500, cluster, Closing())


def test_a_performance_report_is_written(tmp_path):
    with scheduler(1) as cluster:
        results(counted, 3, cluster, Watching(), report=str(tmp_path / "report.html"))
    assert "<title>Dask Performance Report" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    config = RunConfig(report=str(tmp_path / "missing" / "report.html"))
    with pytest.raises(ConfigError, match=r"report.html: expected a file in a folder that exists"):
        next(run_tasks(counted, iter([1]), 1, config, ".", Watching()))


def test_errors_and_deaths_of_a_process_alone_are_told_apart():
    alone = Solitary(60.0)
    assert alone.run(counted, 4) == {"shard": 4}
    assert alone.run(hungry, 1) == Death("ran out of memory")
    assert alone.run(os._exit, 7) == Death("ended its process with code 7")
    with pytest.raises(StoreError, match="so not"):
        alone.run(refused)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        alone.run(divmod, 1, 0)
    alone.stop()
    with pytest.raises(StoppedError):
        alone.run(counted, 4)


@pytest.mark.parametrize("blocked", [set(), {signal.SIGINT}])
def test_a_process_alone_leaves_the_signals_of_its_parent_as_they_were(blocked):
    before = signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        Solitary(60.0).run(counted, 4)
        with pytest.raises(StoreError):
            Solitary(60.0).run(refused)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
