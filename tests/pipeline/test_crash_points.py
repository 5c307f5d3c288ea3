"""The job ended at every step by which it changes the disk: readers see the old or the new state, and the
same command again makes the store that an undisturbed one makes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.jobs.process import ENVIRONMENT
from support import save_scene, textured

RUNNER = Path(__file__).parents[1] / "crash_points.py"
ROOT = RUNNER.parents[1]
MEMORY = Path("/dev/shm")  # noqa: S108 (temporary folders are made in it)


@pytest.fixture
def folder():
    """In memory, where there is such a place: thousands of syncs take long on a disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


def crash(folder: Path, every: int) -> dict[str, dict]:
    for name, seed in (("a_20200101", 1), ("b_20200101", 2)):
        save_scene(folder / "archive" / f"{name}.tif", textured((1, 32, 64), seed=seed))
    shutil.copytree(folder / "archive", folder / "further")
    save_scene(folder / "further" / "a_20200201.tif", textured((1, 32, 64), seed=3))
    empty = np.zeros((1, 32, 64), np.uint16)
    save_scene(folder / "empty" / "a_20200101.tif", empty, nodata=0)
    done = subprocess.run(
        [sys.executable, RUNNER, folder, str(every)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{RUNNER.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hold(counts: dict[str, dict]) -> None:
    for name, found in counts.items():
        seen, converged = found["seen"], found["tried"] - len(found["failures"])
        counts_in_words = (
            f"{name}: {found['steps']} points, {found['tried']} tried: {seen.get('old', 0)} old, "
            f"{seen.get('new', 0)} new, {converged} converged"
        )
        print(counts_in_words)
    for name, found in counts.items():
        assert found["failures"] == []
        # Of a refused archive nothing is left in the end, and hardly anything before.
        both = {"old", "new"}
        assert found["seen"].keys() <= both if name == "refuse" else found["seen"].keys() == both
        assert found["lost_with_power"] == []


def test_a_crash_at_some_points_leaves_the_old_or_the_new_state(folder):
    hold(crash(folder, every=37))


@pytest.mark.full
def test_a_crash_at_every_point_leaves_the_old_or_the_new_state(folder):
    hold(crash(folder, every=1))
