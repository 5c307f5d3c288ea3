"""Ends a command at every step that changes the disk, and looks at what it leaves.

A script of its own: one process imports and compiles everything, then forks for every step. It may,
because it starts no thread; only its children read and write stores.

    python tests/crash_points.py FOLDER EVERY

takes the archives `archive`, `further` and `empty` in the folder, makes stores beside them and prints JSON:
per command how many steps were tried, what readers saw, and what did not converge.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401 (pyarrow imports it at first use, which takes a second)

import pipeline.jobs.batch
import pipeline.storage.lock
from pipeline import open_store, partition_image
from pipeline.errors import ArchiveError, IntegrityError, StoreError
from pipeline.jobs.job import run_job
from pipeline.jobs.measures import MEASURES
from pipeline.jobs.repartition import repartition
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from pipeline.store import Store
from support import Watching, files, textured

CRASHED = 9
# The steps of the commit itself are always tried.
LAST = 8
SETTINGS = (
    "store.tile_size_px=32",
    "store.shard_tiles=2",
    "modality.value_range=[0, 10000]",
    "modality.pattern='{tile}_{date}.tif'",
    "partition.num_scales=2",
    "run.workers=1",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Disk:
    """Counts the steps by which this process changes files below a folder; ends it at one of them.

    A step is what stands between two states of the disk: a file opened for writing, a rename, a removal, a
    new folder, a sync; and of every file that is synced the states in which only a part of it is there.
    """

    def __init__(self, folder: Path, end_at: int | None = None) -> None:
        self.steps: list[str] = []
        # Folders with new entries, and what goes with the power where one of them is not synced in time.
        self.unsynced: set[str] = set()
        self.lost_with_power: list[str] = []
        self._folder, self._end_at = str(folder), end_at
        self._counting = threading.RLock()
        self._sizes: dict[str, int] = {}
        self._sync = os.fsync
        os.fsync = self._synced
        pipeline.storage.lock.FileIO = self._lock_file()
        sys.addaudithook(self._hear)

    def step(self, what: str, before: Callable[[], object] = lambda: None) -> None:
        with self._counting:
            if len(self.steps) == self._end_at:
                before()
                os._exit(CRASHED)
            self.steps.append(what)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if threading.current_thread().name == "store lock":
            return
        if event == "open" and isinstance(args[0], str | Path) and args[2] & _WRITING:
            path = str(args[0])
            if path.startswith(self._folder):
                if Path(path).exists():
                    self._sizes[path] = Path(path).stat().st_size
                self.step(f"open {path}")
        elif event in _CHANGES and str(args[0]).startswith(self._folder):
            path = str(args[1] if event == "os.rename" else args[0])
            if event == "os.mkdir" and Path(path).exists():
                return
            if event == "os.rename":
                self._expect_synced(str(args[0]), path)
            self.step(f"{event} {path}")
            if event in ("os.rename", "os.mkdir"):
                self.unsynced.add(str(Path(path).parent))

    def _expect_synced(self, path: str, becomes: str) -> None:
        size = self._sizes[becomes] = self._sizes.pop(path, 0)
        if size != Path(path).stat().st_size:
            self.lost_with_power.append(becomes)
        if becomes.endswith("/COMMIT.json"):
            self.lost_with_power += self.unsynced

    def _synced(self, descriptor: int) -> None:
        path, found = str(Path(f"/proc/self/fd/{descriptor}").readlink()), os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            old, size = min(self._sizes.get(path, 0), found.st_size), found.st_size
            if size == old:
                self.lost_with_power.append(f"nothing to sync in {path}")
            for kept in sorted({old, (old + size) // 2, size - 1}):
                if old <= kept < size:
                    self.step(f"torn at {kept}", lambda kept=kept: os.ftruncate(descriptor, kept))
            self._sizes[path] = size
        else:
            self.unsynced.discard(path)
        self.step(f"sync {path}")
        self._sync(descriptor)

    def _lock_file(self) -> type[io.FileIO]:
        step = self.step

        class LockFile(io.FileIO):
            def write(self, content):
                step("lock torn", lambda: io.FileIO.write(self, content[: len(content) // 2]))
                return super().write(content)

            def truncate(self, size=None):
                step("lock emptied")
                return super().truncate(size)

            def close(self):
                if not self.closed:
                    step("lock closed")
                super().close()

        return LockFile


def in_child(work: Callable[[], object]) -> tuple[int, Any]:
    """Run something in a forked process: its exit code, and what it returned."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        code = 0
        try:
            result = work()
        except BaseException:
            result, code = traceback.format_exc(), 1
        with os.fdopen(send, "w") as file:
            json.dump(result, file)
        os._exit(code)  # without what the parent would do at its end
    os.close(send)
    with os.fdopen(receive) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(text or "null")


def state_of(store: Path) -> str:
    """What a reader sees: no store, an unfinished one, or a digest of everything in it."""
    try:
        opened = open_store(store)
        digest = hashlib.sha256(opened.commit.encode())
        for modality in opened.tokenized:
            for partition in opened.partitions(modality):
                digest.update(_all_tiles(opened, modality, partition))
    except IntegrityError:
        raise
    except StoreError as error:
        for state in ("no aptile store here", "has not finished"):
            if state in str(error):
                return state
        raise
    return digest.hexdigest()


def _all_tiles(opened: Store, modality: str, partition: str) -> bytes:
    digest = hashlib.sha256()
    for index in range(len(opened.manifest)):
        try:
            tile = opened.tile_at(index, modality, partition)
        except StoreError as error:
            if "shards were appended" not in str(error):
                raise
            digest.update(b"not of this partition yet")
            continue
        for values in (tile.pixels, tile.valid, *tile.score_maps, *tile.scales):
            digest.update(np.ascontiguousarray(values))
    return digest.digest()


def plainly(
    function: Callable[[Any], Any], tasks: Iterable[Any], *_: object
) -> Generator[list[dict[str, Any]]]:
    """Stands for `run_tasks`: all of the work in this process, in order."""
    for task in tasks:
        row = function(task)
        row.pop(MEASURES, None)
        yield [row]


def commands(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What is ended everywhere; each begins with the store that the one before makes."""
    config = load_config(PreprocessConfig, None, SETTINGS)
    strict = load_config(
        PreprocessConfig, None, [*SETTINGS, "validity.min_tile_valid_fraction=0.5"]
    )
    rule, run = FurtherRule(quantile=0.3), RunConfig(workers=1)

    def cut(store: Path) -> object:
        return repartition(store, "lean", rule, run, Watching())

    def refuse(store: Path) -> None:
        with contextlib.suppress(ArchiveError):
            run_job(f"{folder}/empty", store, strict, Watching())
        assert not store.exists()

    return {
        "refuse": refuse,
        "preprocess": lambda store: run_job(f"{folder}/archive", store, config, Watching()),
        "repartition": cut,
        "append": lambda store: run_job(
            f"{folder}/further", store, config, Watching(), append=True
        ),
        "repartition after append": cut,
    }


def warm_up() -> None:
    """Compile what scores and cuts, without a thread."""
    pipeline.jobs.batch.run_tasks = plainly
    partition_image(
        textured((1, 32, 32)),
        base_patch_size=4,
        num_scales=2,
        thresholds=(1.5,),
        value_range=(0, 10_000),
    )
    assert threading.active_count() == 1


class Trials:
    """One command, ended at steps of its work on copies of one store."""

    def __init__(self, command: Callable[[Path], object], before: Path, folder: Path) -> None:
        self.command, self.before, self.folder = command, before, folder
        folder.mkdir(exist_ok=True)
        self.whole, self.work = folder / "whole", folder / "work"
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []

    def undisturbed(self) -> dict[str, Any]:
        """Run the command as it is: its steps, and what readers see before and after."""
        copy(self.before, self.whole)

        def work() -> dict[str, Any]:
            old = state_of(self.whole)
            disk = Disk(self.whole)
            self.command(self.whole)
            steps = list(disk.steps)
            new, lost = state_of(self.whole), disk.lost_with_power
            return {"old": old, "steps": steps, "new": new, "lost": lost}

        code, found = in_child(work)
        assert code == 0, found
        self.states = {found["old"]: "old", found["new"]: "new"}
        if found["old"] == "no aptile store here":
            self.states["has not finished"] = "old"
        return found

    def end_at(self, number: int, step: str) -> None:
        """End the command at a step, look at the store, run the command again, compare."""
        copy(self.before, self.work)

        def crash() -> None:
            Disk(self.work, number)
            self.command(self.work)

        def again() -> str:
            state = state_of(self.work)
            self.command(self.work)
            return state

        code, found = in_child(crash)
        if code != CRASHED:
            self.failures.append(f"{number} {step}: ended with {code}: {found}")
            return
        code, found = in_child(again)
        if code != 0:
            self.failures.append(f"{number} {step}: {found}")
            return
        self.seen[self.states.get(found, "another state")] += 1
        differing = [
            name
            for name in sorted({*files(self.whole), *files(self.work)})
            if not same_bytes(self.whole / name, self.work / name)
        ]
        if differing:
            self.failures.append(f"{number} {step}: {differing} differ")


def same_bytes(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()


def copy(store: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    if store.exists():
        shutil.copytree(store, to)


def main(folder: Path, every: int) -> dict[str, Any]:
    warm_up()
    before, counts = folder / "nothing", {}
    for name, command in commands(folder).items():
        trials = Trials(command, before, folder / name)
        found = trials.undisturbed()
        steps = found["steps"]
        tried = {*range(len(counts) % every, len(steps), every), *range(len(steps))[-LAST:]}
        for number in sorted(tried):
            trials.end_at(number, steps[number])
        counts[name] = {
            "steps": len(steps),
            "tried": len(tried),
            "seen": dict(trials.seen),
            "failures": trials.failures,
            "lost_with_power": found["lost"],
        }
        before = trials.whole
    return counts


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
