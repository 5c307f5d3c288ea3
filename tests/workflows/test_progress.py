"""What a job shows, with a clock that is set by hand."""

import io
import json

import pytest
from rich.console import Console

from pipeline.jobs.measures import Measures
from workflows.progress import JobProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: JobProgress, clock: Clock, seconds_per_shard: float, shards: int = 20) -> None:
    progress.planned(num_tiles=100 * (shards + 1), done_tiles=100)
    progress.started("http://127.0.0.1:1/status")
    for _ in range(shards):
        clock.now += seconds_per_shard
        progress.measured(Measures(read=2.0, pixel_bytes=10**9, object_bytes=5 * 10**8))
        progress.shard_done(100)


def test_a_terminal_shows_speed_trouble_and_the_dashboard_once():
    clock, screen = Clock(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    with JobProgress("preprocess", console, clock) as progress:
        run(progress, clock, 0.5)
        progress.happened("worker lost", "worker tcp://127.0.0.1:2 is gone")
        progress.happened("shard retried", "shard 3: its workers died; it is done again alone")
        progress.quarantined(2)
    shown = screen.getvalue()
    assert shown.count("http://127.0.0.1:1/status") == 1
    assert "200 tiles/s, 2,000 MB/s in, 1,000 MB/s out" in shown
    assert "1 worker lost, 1 shard retried, 2 scenes quarantined" in shown
    assert "shard 3: its workers died; it is done again alone" in shown
    assert "tcp://127.0.0.1:2" not in shown
    last = "preprocess: 2,100 of 2,100 tiles (100%) in 0:00:10, 100 of them by earlier runs; 200 tiles/s"
    assert last in shown


def test_a_log_of_a_short_run_holds_nothing(capsys):
    clock = Clock()
    with JobProgress("preprocess", Console(file=io.StringIO()), clock) as progress:
        run(progress, clock, 0.5)
        progress.happened("worker lost", "gone")
        progress.happened("stopping", "stopping")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds_per_shard", "lines"), [(5, 1), (30, 10), (3600, 10)])
def test_a_log_of_a_long_run_holds_at_most_ten_lines_and_the_last(capsys, seconds_per_shard, lines):
    clock = Clock()
    with JobProgress("preprocess", Console(file=io.StringIO()), clock) as progress:
        run(progress, clock, seconds_per_shard)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == lines + 1
    assert "to go" in printed[0]
    assert [line for line in printed if "dashboard" in line] == printed[:1]


def test_trouble_is_told_in_logs_too(capsys):
    with JobProgress("preprocess", Console(file=io.StringIO()), Clock()) as progress:
        progress.happened("waiting", "there is no worker")
    assert capsys.readouterr().err == "there is no worker\n"


def test_programs_get_throughput_and_seconds_by_phase():
    clock = Clock()
    progress = JobProgress("preprocess", Console(file=io.StringIO()), clock)
    run(progress, clock, 0.5)
    progress.happened("worker lost", "gone")
    assert json.loads(json.dumps(progress.effort.as_json())) == {
        "seconds": 10.0,
        "tiles": 2000,
        "tiles_per_s": 200.0,
        "mb_in_per_s": 2000.0,
        "mb_out_per_s": 1000.0,
        "worker_seconds": {"read": 40.0, "score": 0.0, "partition": 0.0, "write": 0.0},
        "workers_lost": 1,
        "shards_retried": 0,
    }


def test_nothing_done_is_no_division_by_zero():
    progress = JobProgress("preprocess", Console(file=io.StringIO()), Clock())
    progress.planned(0, 0)
    assert progress.effort.so_far() == "preprocess: 0 of 0 tiles (100%) in 0:00:00; 0.0 tiles/s"
    assert progress.effort.remaining_s is None
