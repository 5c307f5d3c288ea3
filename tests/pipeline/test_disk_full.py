"""Disks that are full, in file systems of their own in memory: said in one line, and nothing is lost."""

import logging
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import pipeline.jobs.batch
from crash_points import plainly
from pipeline import open_store
from pipeline.errors import NoSpaceError, StoreError
from pipeline.jobs.space import in_units, telling_space, warn_if_short
from pipeline.storage.layout import ArraySpec
from pipeline.storage.objects import LocalObjects
from support import aptile, assert_same_bytes, files, save_scene, textured

SETTINGS = (
    "store.tile_size_px=32",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "modality.pattern='{tile}_{date}.tif'",
    "partition.num_scales=2",
    "run.workers=1",
)
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]
PAGE = 4096
ROOMY = 64 * 2**20


class Disk:
    """A file system of a size that can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("size=64m")

    def resize(self, size: int) -> None:
        self._mount(f"remount,size={size}")

    def used(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here; that takes root")


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """An archive, and the same with one more scene."""
    folder = tmp_path_factory.mktemp("archives")
    save_scene(folder / "first" / "a_20200101.tif", textured((3, 96, 96), seed=1))
    shutil.copytree(folder / "first", folder / "grown")
    save_scene(folder / "grown" / "b_20200101.tif", textured((3, 96, 96), seed=2))
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Without workers, which take seconds to start."""
    monkeypatch.setattr(pipeline.jobs.batch, "run_tasks", plainly)


def commands(archives, store):
    """What is tried; each goes on with the store that the one before makes."""
    return {
        "preprocess": ("preprocess", archives / "first", store, *OPTIONS),
        "repartition": ("repartition", store, "--name", "lean", "--quantile", 0.3, "--workers", 1),
        "append": ("preprocess", archives / "grown", store, *OPTIONS, "--append"),
    }


def state(store):
    try:
        return open_store(store).commit.number
    except StoreError as error:
        return re.search("no aptile store here|has not finished", str(error)).group()


def what_was_full(line: str, store: Path) -> str:
    """What could not be written by the one line of an error, which must say how much it was."""
    found = re.search(rf"{re.escape(str(store))}/?(\S*): (.*): No space left on device", line)
    assert found, line
    assert re.search(r"cannot be locked|cannot (write|add) \d+ bytes", found[2]), line
    name = found[1]
    if name.endswith("zarr.json"):
        return "metadata"
    return name.split("/")[0] if name else "lock"


def fill_up(disk, archives, tmp_path, capsys, every):
    """Give every command less room than it needs, and then enough."""
    store, before = disk.folder / "store", None
    for number, (name, command) in enumerate(commands(archives, store).items()):
        shutil.rmtree(store, ignore_errors=True)
        if before is not None:
            shutil.copytree(before, store)
        old, room = state(store), disk.used()
        assert aptile(*command) == 0
        whole, needed = tmp_path / name, (disk.used() - room) // PAGE
        shutil.copytree(store, whole)
        full, refused = Counter[str](), 0
        for pages in sorted({*range(number, needed, every), *range(needed - 6, needed + 4)}):
            disk.resize(ROOMY)
            shutil.rmtree(store)
            if before is not None:
                shutil.copytree(before, store)
            disk.resize(room + max(1, pages) * PAGE)
            capsys.readouterr()
            code = aptile(*command)
            said = capsys.readouterr().err.splitlines()
            if code != 0:
                assert code == 2
                lines = [line for line in said if "No space left" in line]
                assert len(lines) == 1, said
                assert not any("Traceback" in line for line in said)
                full[what_was_full(lines[0], store)] += 1
                refused += 1
                assert state(store) in (old, "has not finished")
                assert not [f for f in files(disk.folder) if f.endswith(".partial")]
            disk.resize(ROOMY)
            assert aptile(*command) == 0
            assert_same_bytes(store, whole)
        print(f"{name}: {refused} times full, at {dict(full)}")
        assert refused > 0
        before = whole


def test_a_full_disk_is_said_in_a_line_and_the_same_command_goes_on(
    disk, archives, tmp_path, capsys, in_this_process
):
    fill_up(disk, archives, tmp_path, capsys, every=25)


@pytest.mark.full
def test_a_disk_that_is_full_at_any_page_is_said_in_a_line(
    disk, archives, tmp_path, capsys, in_this_process
):
    fill_up(disk, archives, tmp_path, capsys, every=1)


class Filling:
    """Fills the disk just before an object is written, or a ledger gets a row."""

    def __init__(self, disk: Disk, monkeypatch, name: str) -> None:
        self.disk, self.name, self.filled = disk, name, False
        self._write, self._append = LocalObjects.write_all, LocalObjects.append
        monkeypatch.setattr(LocalObjects, "write_all", lambda *args: self.write(*args))
        monkeypatch.setattr(LocalObjects, "append", lambda *args: self.append(*args))

    def write(self, objects, contents):
        if any(re.fullmatch(self.name, name) for name in contents):
            self.fill()
        return self._write(objects, contents)

    def append(self, objects, log, rows):
        if self.name == "a row":
            # What is left of the ledger's last page is not enough for it.
            self.fill()
            rows = b" " * (PAGE - len(rows)) + rows
        return self._append(objects, log, rows)

    def fill(self):
        if not self.filled:
            self.disk.resize(self.disk.used())
            self.filled = True


@pytest.mark.parametrize(
    "name",
    [
        "a row",
        "image/zarr.json",
        "zarr.json",
        r"manifest/.*",
        r"ledger/.*",
        r"commits/.*",
        "COMMIT.json",
    ],
)
@pytest.mark.parametrize("command", ["preprocess", "append"])
def test_no_object_of_a_commit_is_half_written_on_a_full_disk(
    disk, archives, monkeypatch, tmp_path, capsys, in_this_process, name, command
):
    store, old = disk.folder / "store", "has not finished|no aptile store here"
    if command == "append":
        assert aptile(*commands(archives, store)["preprocess"]) == 0
        old = "1"
    with monkeypatch.context() as patches:
        filling = Filling(disk, patches, name)
        assert aptile(*commands(archives, store)[command]) == 2
        assert filling.filled
    assert "No space left on device" in capsys.readouterr().err
    assert re.fullmatch(old, str(state(store)))
    disk.resize(ROOMY)
    assert aptile(*commands(archives, store)[command]) == 0
    for step in ("preprocess", "append")[: 1 + (command == "append")]:
        assert aptile(*commands(archives, tmp_path / "whole")[step]) == 0
    assert_same_bytes(store, tmp_path / "whole")


def test_a_disk_without_room_for_the_lock_is_said(disk, archives, capsys, in_this_process):
    command = commands(archives, disk.folder / "store")
    assert aptile(*command["preprocess"]) == 0
    disk.resize(disk.used())
    assert aptile(*command["append"]) == 2
    assert "cannot be locked for writing: No space left on device" in capsys.readouterr().err
    assert state(disk.folder / "store") == 1
    disk.resize(ROOMY)
    assert aptile(*command["append"]) == 0


def test_workers_say_that_the_disk_is_full_and_no_scene_is_blamed(disk, archives, tmp_path, capfd):
    store = disk.folder / "store"
    command = commands(archives, store)["preprocess"]
    disk.resize(45 * PAGE)
    assert aptile(*command) == 2
    said = capfd.readouterr().err.splitlines()
    full = [line for line in said if "No space left on device" in line]
    assert len(full) == 1
    assert re.search(r"cannot (write|add) \d+ bytes", full[0])
    assert re.search(r"the \d shards that are left", full[0])
    assert "Traceback" not in " ".join(said)
    disk.resize(ROOMY)
    assert aptile(*command) == 0
    assert aptile("preprocess", archives / "first", tmp_path / "whole", *OPTIONS) == 0
    assert_same_bytes(store, tmp_path / "whole")
    assert open_store(store).quarantined() == {}


def test_what_is_needed_is_told_from_the_shards_that_are_done(tmp_path):
    rows = [{"objects": {"a": {"bytes": 3_000_000}, "b": {"bytes": 1_000_000}}}] * 2
    with (
        pytest.raises(NoSpaceError, match=r"full \(about 1.2 GB more are needed for the 300 "),
        telling_space(lambda: rows, 302, ()),
    ):
        raise NoSpaceError("full")
    with (
        pytest.raises(NoSpaceError, match="all shards are written"),
        telling_space(lambda: rows, 2, ()),
    ):
        raise NoSpaceError("full")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (1_234_567_890, "1.23 GB"),
        (5.2e15, "5.2e+03 TB"),
    ],
)
def test_bytes_are_told_as_people_say_them(number, text):
    assert in_units(number) == text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"objects": {"a": {"bytes": 2_000_000}}}],
            "the 50 shards that are left will need about 100 MB",
        ),
        ([], "the 50 shards that are left will need about 160 MB or more"),
        ([{"objects": {"a": {"bytes": 20_000}}}], None),
    ],
)
def test_a_disk_too_small_for_the_plan_is_pointed_out_before_the_work(disk, caplog, rows, said):
    # 25.6 MB a shard, of which an eighth is counted.
    pixels = ArraySpec((9,), (50, 256, 1000), (1, 256, 1000), "uint16", ("frame", "y", "x"), 0)
    with caplog.at_level(logging.WARNING, "aptile"):
        warn_if_short(LocalObjects(disk.folder), rows, 50, [pixels])
    assert (said in caplog.text) if said else not caplog.text


def test_nothing_is_said_where_nothing_is_left_to_do(tmp_path, caplog):
    warn_if_short(LocalObjects(tmp_path), [], 0, [])
    assert not caplog.text


def test_other_reasons_than_a_full_disk_are_told_apart(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(b"a file where a folder is to be")
    with pytest.raises(StoreError, match="cannot write 3 bytes: .*; check the perm") as e:
        LocalObjects(tmp_path / "store").write("a/b", b"abc")
    assert not isinstance(e.value, NoSpaceError)
