"""Readers of a store that is being written: each sees one committed state, and keeps it."""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import xarray

from growing import add, cut, digest, grow, state, states
from pipeline import open_store
from pipeline.storage.ledger import ledger_name
from support import assert_same_bytes, files, save_scene, textured

SPAWN = multiprocessing.get_context("spawn")


def archives_of(folder: Path, number: int) -> list[str]:
    """Archives each of which has one scene more: other places, and other dates of the first place."""
    made = []
    for last in range(number):
        if made:
            shutil.copytree(made[-1], folder / str(last))
        name = f"{'a' if last % 2 else 'p' + str(last)}_202001{last + 1:02d}"
        pixels = textured((2, 64, 64), seed=last)
        made.append(str(save_scene(folder / str(last) / f"{name}.tif", pixels).parent))
    return made


class Reader:
    """Reads a store again and again, and keeps what it has opened."""

    def __init__(self, store: Path, expected: dict) -> None:
        self.store, self.expected = store, expected
        self.pinned = {}
        self.reads = self.opened = 0
        self.random = random.Random(1)  # noqa: S311 (which tile is read)

    def look(self) -> int:
        """Open the store anew and read in it, in one opened earlier, and in an earlier commit."""
        opened = open_store(self.store)
        number = opened.commit.number
        self.opened += 1
        assert opened.manifest["id"].to_pylist() == list(
            dict.fromkeys(t for _, t in self.of(number))
        )
        self.pinned.setdefault(number, opened)
        self.read(opened)
        self.read(self.pinned[self.random.choice(list(self.pinned))])
        self.read(open_store(self.store, commit=self.random.randint(1, number)))
        return number

    def of(self, number: int) -> list:
        return [key for key in self.expected[number] if key[0] == "default"]

    def read(self, store) -> None:
        number = store.commit.number
        partition, tile = self.random.choice(list(self.expected[number]))
        assert digest(store, partition, tile) == self.expected[number][partition, tile]
        self.reads += 1

    def look_from_outside(self, frames: set[int]) -> None:
        """As somebody who knows Zarr only."""
        found = xarray.open_zarr(self.store, group="image")
        assert found.sizes["frame"] in frames
        assert found["num_valid"].load().shape == (found.sizes["frame"],)
        found.close()
        self.reads += 1


def read_while_it_grows(tmp_path: Path, number: int) -> None:
    archives, store = archives_of(tmp_path / "archives", number), tmp_path / "store"
    expected = states(archives, tmp_path / "undisturbed")
    frames = {
        open_store(tmp_path / "undisturbed", commit=n).layout_of().num_frames for n in expected
    }
    add(archives[0], store)
    cut(store, "cut-0")
    reader, last = Reader(store, expected), max(expected)
    writer = SPAWN.Process(target=grow, args=(archives[1:], store))
    writer.start()
    seen = {2}
    while writer.is_alive() or last not in seen:
        seen.add(reader.look())
        reader.look_from_outside(frames)
        assert writer.exitcode in (None, 0)
    for pinned in reader.pinned.values():
        assert state(pinned) == expected[pinned.commit.number]
    for commit in expected:
        assert state(open_store(store, commit=commit)) == expected[commit]
    assert_same_bytes(store, tmp_path / "undisturbed")
    assert len(seen) > 1
    print(
        f"{reader.opened} times opened, {reader.reads} reads, {len(seen)} of {last} commits seen newest, "
        f"{len(reader.pinned)} kept"
    )


def test_every_read_while_a_store_grows_is_of_one_commit(tmp_path):
    read_while_it_grows(tmp_path, 4)


@pytest.mark.full
def test_every_read_while_a_store_grows_for_long_is_of_one_commit(tmp_path):
    read_while_it_grows(tmp_path, 25)


def test_an_append_that_is_killed_leaves_the_last_commit_as_it_was(tmp_path):
    archives, store = archives_of(tmp_path / "archives", 3), tmp_path / "store"
    expected = states(archives, tmp_path / "undisturbed")
    add(archives[0], store)
    cut(store, "cut-0")
    was = {name: (store / name).read_bytes() for name in files(store) if name != ".lock"}
    pinned = open_store(store)
    writer = SPAWN.Process(target=grow, args=(archives[1:], store))
    writer.start()
    while not (store / ledger_name(2)).exists():
        assert writer.is_alive()
        assert state(open_store(store)) == expected[2]
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    # It may have come to its commit all the same.
    number = open_store(store).commit.number
    assert state(open_store(store)) == expected[number]
    assert state(pinned) == state(open_store(store, commit=2)) == expected[2]
    changed = {name for name, content in was.items() if (store / name).read_bytes() != content}
    assert {n for n in changed if not n.endswith("zarr.json")} <= {"COMMIT.json"}
    assert number > 2 or "COMMIT.json" not in changed
    grow(archives[1:], store)
    assert_same_bytes(store, tmp_path / "undisturbed")
