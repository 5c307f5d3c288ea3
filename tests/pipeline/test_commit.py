import hashlib
import json
import multiprocessing
import os

import pytest

from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.storage.commit import (
    LEDGER,
    MANIFEST,
    exclusive,
    read_commit,
    read_committed,
    sweep_partials,
    write_commit,
    write_object,
    write_objects,
)
from pipeline.storage.ledger import Ledger

FILES = [{"file": "a.tif", "modality": "image", "fingerprint": "1-1"}]
UNKNOWN = {"datetime": None, "baseline": None, "shift": None, "resampling": None}
SCENES = [
    {"scene": "a", "modality": "image", "status": "planned", "reason": None, **UNKNOWN},
    {"scene": "z", "modality": "image", "status": "skipped", "reason": "not asked for", **UNKNOWN},
]


def shard_row(shard, failed=None):
    return {
        "shard": shard,
        "objects": {},
        "failed": failed or {},
        "findings": {"a": f"odd in {shard}"},
        "thresholds": {"image": {"0": [0.5, 0.75]}},
        "left_out": {},
        "tiles_left_out": [],
    }


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / LEDGER, list(FILES), list(SCENES))
    ledger.create()
    return ledger


def test_rows_survive(ledger, tmp_path):
    ledger.append(shard_row(1))
    again = Ledger.read(tmp_path)
    assert (again.files, again.scenes) == (FILES, SCENES)
    assert list(again.shards) == [1]
    assert again.fingerprints() == {("image", "a.tif"): "1-1"}
    assert again.thresholds("image") == {0: [0.5, 0.75]}
    assert again.thresholds("other") == {}
    assert again.with_status("skipped") == {"z": "not asked for"}
    assert again.findings() == {"a": "odd in 1"}


def test_a_torn_row_does_not_count_and_does_not_spoil_the_next(ledger, tmp_path):
    ledger.append(shard_row(0))
    with ledger.path.open("ab") as file:
        file.write(b'{"shard": 1, "obj')
    assert list(Ledger.read(tmp_path).shards) == [0]
    Ledger.read(tmp_path).append(shard_row(2))
    assert list(Ledger.read(tmp_path).shards) == [0, 2]


def test_the_canonical_ledger_does_not_depend_on_the_order_of_work(tmp_path):
    texts = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        ledger = Ledger(tmp_path / LEDGER, list(FILES), list(SCENES))
        ledger.create()
        for shard in order:
            ledger.append(shard_row(shard))
        texts.add(ledger.canonical())
    assert len(texts) == 1


def test_quarantined_scenes_of_planning_and_of_shards(ledger):
    ledger.scenes.append({**SCENES[0], "scene": "c", "status": "refused", "reason": "no raster"})
    ledger.append(shard_row(0, failed={"a": "truncated"}))
    assert ledger.quarantined() == {"a": "truncated", "c": "no raster"}


def test_a_line_that_is_no_row_is_damage(ledger, tmp_path):
    with ledger.path.open("ab") as file:
        file.write(b"what?\n")
    with pytest.raises(IntegrityError, match="line 4 is not a ledger row"):
        Ledger.read(tmp_path)


def test_objects_are_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "object"
    written = write_object(path, b"old")
    assert written["bytes"] == 3
    write_object(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["object"]  # noqa: PTH208


def test_an_object_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "object").mkdir()
    with pytest.raises(StoreError, match="cannot write 3 bytes"):
        write_object(tmp_path / "object", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["object"]


def test_objects_of_a_shard_are_written_together(tmp_path):
    written = write_objects(tmp_path, {"a/c/0": [b"one", b"", b"two"], "b/c/0/0": [b"three"]})
    assert (tmp_path / "a" / "c" / "0").read_bytes() == b"onetwo"
    assert (tmp_path / "b" / "c" / "0" / "0").read_bytes() == b"three"
    assert written["a/c/0"] == {"bytes": 6, "sha256": hashlib.sha256(b"onetwo").hexdigest()}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("stands_in_the_way", ["first", "second", "third"])
def test_no_object_is_left_half_written(tmp_path, stands_in_the_way):
    (tmp_path / stands_in_the_way / "folder").mkdir(parents=True)
    contents = {"first": [b"1"], "second": [b"22"], "third": [b"333"]}
    with pytest.raises(StoreError, match=f"{stands_in_the_way}: cannot write [123] bytes"):
        write_objects(tmp_path, contents)
    for path in tmp_path.iterdir():
        assert path.is_dir() or [path.read_bytes()] == contents[path.name]


def test_what_killed_writers_left_is_swept(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.123.partial").write_bytes(b"half")
    (tmp_path / "c" / "0").write_bytes(b"whole")
    sweep_partials(tmp_path)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["0"]


def test_a_commit_names_its_manifest_and_ledger(ledger, tmp_path):
    assert read_commit(tmp_path) is None
    write_commit(tmp_path, ledger.canonical(), b"manifest", {"tiles": 1})
    commit = read_commit(tmp_path)
    assert commit["summary"] == {"tiles": 1}
    assert read_committed(tmp_path, MANIFEST, commit) == b"manifest"


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"other"), lambda p: p.unlink()])
def test_another_manifest_than_the_committed_one_is_refused(ledger, tmp_path, damage):
    write_commit(tmp_path, ledger.canonical(), b"manifest", {})
    damage(tmp_path / MANIFEST)
    with pytest.raises(IntegrityError, match=r"manifest.parquet (is missing|differs)"):
        read_committed(tmp_path, MANIFEST, read_commit(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", '{"objects": 3}', json.dumps({"objects": {}})])
def test_a_damaged_commit_is_refused(tmp_path, text):
    (tmp_path / "COMMIT.json").write_text(text)
    with pytest.raises(IntegrityError, match="not a commit"):
        read_commit(tmp_path)


def hold(store, ready, done):
    with exclusive(store):
        ready.set()
        done.wait(60)


def test_a_second_writer_is_refused_and_a_dead_one_does_not_block(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, done))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(LockedError, match=f"process {holder.pid} on"), exclusive(tmp_path):
        pass
    holder.kill()
    holder.join()
    with exclusive(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
