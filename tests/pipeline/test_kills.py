"""Processes that die, at random and because of what they read: nothing is lost, nobody else is blamed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import open_store
from pipeline.errors import StoreError
from pipeline.jobs import engine
from pipeline.jobs.job import run_job
from pipeline.jobs.retries import MAX_DEATHS, Death, GiveUp, RunScene, RunWhole, Trial
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.storage.ledger import Ledger, ledger_name
from pipeline.storage.objects import LocalObjects
from support import Watching, assert_same_bytes, files, save_scene, textured

# Large patches and a slow scorer, so that a shard takes long enough to be hit.
SMALL = (
    "store.tile_size_px=64",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "partition.quantile=0.5",
    "scoring.scorer=saliency",
)
NUM_SCENES = 4
TILES_PER_SCENE = 16


def settings(*overrides: str) -> PreprocessConfig:
    return load_config(PreprocessConfig, None, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    for number in range(NUM_SCENES):
        save_scene(folder / f"scene{number:02}.tif", textured((3, 256, 256), number))
    return folder


@pytest.fixture(scope="module")
def store(archive, tmp_path_factory):
    """The archive preprocessed undisturbed by one worker."""
    path = tmp_path_factory.mktemp("store") / "one"
    report = run_job(str(archive), path, settings("run.workers=1"), Watching())
    assert report.tiles == NUM_SCENES * TILES_PER_SCENE
    return path


def workers(parent: int) -> list[psutil.Process]:
    """Worker processes of a job, whether they have come up yet or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(parent).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(_command(child))]
    return []


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


class Killer(Watching):
    """Kills random processes of the job at random times; the job waits for the kills to keep up."""

    def __init__(self, kills: int, seed: int = 0) -> None:
        super().__init__()
        self.wanted, self.killed = kills, 0
        self.enough = threading.Condition()
        self.rng = np.random.default_rng(seed)
        self.thread = threading.Thread(target=self.kill, daemon=True)

    def started(self, dashboard):
        if not self.thread.is_alive() and self.killed < self.wanted:
            self.thread.start()

    def kill(self):
        while self.killed < self.wanted:
            time.sleep(self.rng.uniform(0, 0.6))
            for process in self.rng.permutation(workers(os.getpid()))[:1]:
                process.kill()
                with self.enough:
                    self.killed += 1
                    self.enough.notify()

    def shard_done(self, tiles):
        super().shard_done(tiles)
        share = self.tiles / (NUM_SCENES * TILES_PER_SCENE)
        with self.enough:
            self.enough.wait_for(lambda: self.killed >= int(share * self.wanted), timeout=120)


# Of more kills in one job two may hit the same shard as it is done alone: that is quarantined, and rightly.
KILLS_PER_JOB = 10


@pytest.mark.parametrize("jobs", [1, pytest.param(10, marks=pytest.mark.full)])
def test_workers_killed_at_random_change_no_byte(archive, store, tmp_path, jobs):
    for number in range(jobs):
        killed = tmp_path / f"killed_{number}"
        observer, report = Killer(KILLS_PER_JOB, seed=number), None
        while report is None:
            # Kills may hit what runs alone as well, until the job gives up: then the same command goes on.
            with contextlib.suppress(StoreError):
                report = run_job(str(archive), killed, settings("run.workers=2"), observer)
        lost = [what for what, _ in observer.happenings].count("worker lost")
        retried = [what for what, _ in observer.happenings].count("shard retried")
        print(
            f"{observer.killed} kills: {lost} workers seen to be lost, {retried} of {report.shards} shards "
            f"done alone, {len(report.quarantined)} inputs quarantined"
        )
        assert observer.killed == KILLS_PER_JOB
        assert report.quarantined == {}
        assert not [name for name in files(killed) if "partial" in name]
        assert_same_bytes(store, killed)


def started(archive: Path, path: Path) -> subprocess.Popen:
    """The job as a process group of its own, workers included."""
    command = [sys.executable, "-m", "workflows.cli", "preprocess", archive, path, "--workers", "2"]
    for override in SMALL:
        command += ["--set", override]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def recorded(path: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the objects of every shard that counts as done."""
    objects = [
        name
        for row in Ledger.read(LocalObjects(path), 1).shards.values()
        for name in row["objects"]
    ]
    return {
        name: (stat.st_ino, stat.st_mtime_ns) for name in objects if (stat := (path / name).stat())
    }


def shards_done(path: Path) -> int:
    return len(Ledger.read(LocalObjects(path), 1).shards) if (path / ledger_name(1)).exists() else 0


def wait_for_shards(job: subprocess.Popen, path: Path, number: int) -> None:
    while job.poll() is None and shards_done(path) < number:
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.full)])
def test_a_killed_job_goes_on_where_it_was(archive, store, tmp_path, kills):
    rng = np.random.default_rng(kills)
    killed = stores = rewritten = 0
    while killed < kills:
        path, job = tmp_path / f"killed{stores}", None
        while killed < kills and (job is None or job.returncode != 0):
            job = started(archive, path)
            wait_for_shards(job, path, shards_done(path) + 1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(rng.uniform(0, 0.5))
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                killed += 1
            job.communicate()
        before = recorded(path)
        run_job(str(archive), path, settings("run.workers=2"), Watching())
        rewritten += sum(recorded(path)[name] != facts for name, facts in before.items())
        assert_same_bytes(store, path)
        stores += 1
    print(
        f"{killed} kills of the whole job: {stores} of {stores} stores identical, {rewritten} rewritten"
    )
    assert rewritten == 0


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM],
        [signal.SIGINT] * 2,
        pytest.param([signal.SIGINT], marks=pytest.mark.full),
    ],
)
def test_a_job_that_is_told_to_end_does_so_and_loses_nothing(archive, store, tmp_path, signals):
    path = tmp_path / "ended"
    job = started(archive, path)
    wait_for_shards(job, path, 2)
    own = workers(job.pid)
    assert own
    for number in signals:
        job.send_signal(number)
        time.sleep(0.5)
    error = job.communicate(timeout=120)[1]
    assert job.returncode == 128 + signals[0]
    word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[signals[0]]
    assert error == f"aptile: {word}; nothing is lost, run the same command again to go on\n"
    assert psutil.wait_procs(own, timeout=60)[1] == []
    run_job(str(archive), path, settings("run.workers=2"), Watching())
    assert_same_bytes(store, path)


@pytest.mark.parametrize(
    ("num_workers", "least", "per_thread"),
    [
        (2, 1, 1),
        pytest.param(4, 64, 2, marks=pytest.mark.full),
        pytest.param(4, 3, 1, marks=pytest.mark.full),
    ],
)
def test_bytes_do_not_depend_on_workers_order_or_window(
    archive, store, tmp_path, monkeypatch, num_workers, least, per_thread
):
    monkeypatch.setattr(engine, "_LEAST_IN_FLIGHT", least)
    monkeypatch.setattr(engine, "_IN_FLIGHT_PER_THREAD", per_thread)

    def shuffled(function, tasks, *others):
        order = list(tasks)
        np.random.default_rng(num_workers + least).shuffle(order)
        return engine.run_tasks(function, iter(order), *others)

    monkeypatch.setattr("pipeline.jobs.batch.run_tasks", shuffled)
    config = settings(f"run.workers={num_workers}")
    run_job(str(archive), tmp_path / "store", config, Watching())
    assert_same_bytes(store, tmp_path / "store")


# Stands in for a bug in a decoder: native code that crashes, or that never returns and never lets go of
# the interpreter. Python reads this file when any process starts.
SABOTAGE = """
import ctypes, os, signal
import rasterio
opened = rasterio.open
def sabotaged(path, *args, **options):
    name = os.path.basename(str(path))
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("hang"):
        ctypes.PyDLL(None).sleep(1_000_000)
    return opened(path, *args, **options)
rasterio.open = sabotaged
"""
LIGHT = (
    "store.tile_size_px=32",
    "store.shard_tiles=8",
    "modality.value_range=[0, 10000]",
    "partition.thresholds=[1.5, 2.5]",
    "run.workers=2",
)


def test_scenes_that_kill_or_hang_their_reader_are_quarantined_by_name(tmp_path, monkeypatch):
    (tmp_path / "sabotage").mkdir()
    (tmp_path / "sabotage" / "sitecustomize.py").write_text(SABOTAGE)
    paths = [str(tmp_path / "sabotage"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    names = ["crash", "day", "hang", "ice"]
    for number, name in enumerate(names):
        save_scene(tmp_path / "archive" / f"{name}.tif", textured((3, 64, 64), number))
    config = load_config(PreprocessConfig, None, [*LIGHT, "run.task_timeout_s=6"])
    observer = Watching()
    report = run_job(str(tmp_path / "archive"), tmp_path / "store", config, observer)
    assert (report.inputs, report.done, report.tiles) == (4, 2, 8)
    archive = tmp_path / "archive"
    assert report.quarantined == {
        "crash": f"{archive}/crash.tif: reading it alone killed its process by signal 11 (SIGSEGV), 2 "
        "times; it is left out",
        "hang": f"{archive}/hang.tif: reading it alone took longer than run.task_timeout_s, 6 s; it is "
        "left out",
    }
    opened = open_store(tmp_path / "store")
    assert {row["image"]["scene_ids"][0] for row in opened.manifest.to_pylist()} == {"day", "ice"}
    assert opened.quarantined() == report.quarantined


SCENES = tuple("abcde")


class World:
    """Processes as a job meets them: guilty scenes kill, outsiders kill at times, seldom in a row."""

    def __init__(self, guilty: dict[str, Death], kills: list[bool]) -> None:
        self.guilty, self.kills, self.in_a_row = guilty, kills, 0

    def run(self, scenes: set[str]) -> Death | None:
        for scene in sorted(scenes & self.guilty.keys()):
            self.in_a_row = 0
            return self.guilty[scene]
        outside = bool(self.kills) and self.kills.pop() and self.in_a_row < MAX_DEATHS - 1
        self.in_a_row = self.in_a_row + 1 if outside else 0
        return Death("killed by somebody") if outside else None


deaths = st.sampled_from([Death("crashed"), Death("hung", by_time=True)])


@given(st.dictionaries(st.sampled_from(SCENES), deaths), st.lists(st.booleans(), max_size=60))
def test_all_guilty_scenes_are_found_and_no_innocent_one_is_blamed(guilty, kills):
    world = World(guilty, kills)
    trial = Trial({scene: f"/archive/{scene}.tif" for scene in SCENES})
    for _ in range(200):
        step = trial.next_step()
        assert not isinstance(step, GiveUp)
        whole = isinstance(step, RunWhole)
        death = world.run(set(SCENES) - step.excluded.keys() if whole else {step.scene})
        if whole and death is None:
            break
        trial = trial.after(death)
    assert step == RunWhole(trial.excluded)
    assert trial.excluded.keys() == guilty.keys()
    for scene, reason in trial.excluded.items():
        assert reason.startswith(f"/archive/{scene}.tif: ")


@given(st.sampled_from([(), *((scene,) for scene in SCENES)]))
def test_a_task_that_no_scene_kills_alone_is_given_up(guilty):
    """A task too large for the machine dies as a whole; a guilty scene beside it changes nothing."""
    trial, runs = Trial(dict.fromkeys(SCENES, "a file")), 0
    while not isinstance(step := trial.next_step(), GiveUp):
        dies = isinstance(step, RunWhole) or step.scene in guilty
        trial = trial.after(Death("ran out of memory") if dies else None)
        runs += 1
    assert trial.excluded.keys() == set(guilty)
    assert step.deaths == (Death("ran out of memory"),) * MAX_DEATHS
    assert runs == len(SCENES) - len(guilty) + MAX_DEATHS * (1 + 2 * len(guilty))


def test_an_explained_death_is_one_line():
    trial = Trial({"a": "a.tif"})
    for _ in range(MAX_DEATHS):
        trial = trial.after(Death("crashed"))
    assert trial.next_step() == RunScene("a")
    trial = trial.after(Death("hung", by_time=True))
    assert trial.excluded == {"a": "a.tif: reading it alone hung; it is left out"}
