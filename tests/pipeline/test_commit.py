import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.storage.commit import (
    APPEND,
    COMMIT,
    Batch,
    Commit,
    all_commits,
    decode,
    named,
    read_commit,
    read_named,
    require_commit,
    write_commit,
)
from pipeline.storage.history import History
from pipeline.storage.ledger import Ledger, ledger_name
from pipeline.storage.objects import LocalObjects

HEAD = {"batch": 1, "first_shard": 0, "num_shards": 3}
FILES = [{"file": "a.tif", "modality": "image", "fingerprint": "1-1"}]
PLACES = [{"place": "a", "height": 9, "width": 9, "crs": None, "transform": None, "scenes": ["a"]}]
UNKNOWN = {"datetime": None, "baseline": None, "shift": None, "resampling": None}
SCENES = [
    {"scene": "a", "modality": "image", "status": "planned", "reason": None, **UNKNOWN},
    {"scene": "z", "modality": "image", "status": "skipped", "reason": "not asked for", **UNKNOWN},
]
FIRST = Commit(
    number=1,
    kind="preprocess",
    parent=None,
    header={"format_version": "0.3", "modalities": {"z": {"inf": "-inf"}, "a": {}}},
    manifest={"path": "manifest/000001.parquet", "bytes": 3, "sha256": "00"},
    batches=(Batch(1, 0, 3, {"path": "ledger/000001.jsonl", "bytes": 1, "sha256": "11"}),),
    summary={"tiles": 1},
    metadata={"zarr.json": {"bytes": 2, "sha256": "22"}},
)


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
def objects(tmp_path):
    return LocalObjects(tmp_path)


@pytest.fixture
def ledger(objects):
    ledger = Ledger(dict(HEAD), list(FILES), list(PLACES), list(SCENES))
    ledger.create(objects)
    return ledger


def add(objects, text: bytes):
    with (objects.folder / ledger_name(1)).open("ab") as file:
        file.write(text)


def test_rows_survive(ledger, objects):
    ledger.append(objects, [shard_row(1), shard_row(2)])
    again = Ledger.read(objects, 1)
    assert (again.head, again.files, again.places, again.scenes) == (HEAD, FILES, PLACES, SCENES)
    assert list(again.shards) == [1, 2]
    assert again.fingerprints() == {("image", "a.tif"): "1-1"}
    assert again.thresholds("image") == {0: [0.5, 0.75]}
    assert again.thresholds("other") == {}
    assert again.with_status("skipped") == {"z": "not asked for"}
    assert again.findings() == {"a": "odd in 2"}
    assert Ledger.read(objects, 2) is None


def test_a_torn_row_does_not_count_and_does_not_spoil_the_next(ledger, objects):
    ledger.append(objects, [shard_row(0)])
    add(objects, b'{"shard": 1, "obj')
    assert list(Ledger.read(objects, 1).shards) == [0]
    Ledger.read(objects, 1).append(objects, [shard_row(2)])
    assert list(Ledger.read(objects, 1).shards) == [0, 2]


def test_the_canonical_ledger_does_not_depend_on_the_order_of_work(objects):
    texts = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        ledger = Ledger(dict(HEAD), list(FILES), list(PLACES), list(SCENES))
        ledger.create(objects)
        for shard in order:
            ledger.append(objects, [shard_row(shard)])
        texts.add(ledger.canonical())
    assert len(texts) == 1


def test_quarantined_scenes_of_planning_and_of_shards(ledger, objects):
    ledger.scenes.append({**SCENES[0], "scene": "c", "status": "refused", "reason": "no raster"})
    ledger.append(objects, [shard_row(0, failed={"a": "truncated"})])
    assert ledger.quarantined() == {"a": "truncated", "c": "no raster"}


def test_an_input_that_is_taken_in_again_counts_by_its_last_batch():
    first = Ledger(dict(HEAD), [], [], list(SCENES), {0: shard_row(0, failed={"a": "truncated"})})
    second = Ledger({**HEAD, "batch": 2, "first_shard": 3}, [], [], [SCENES[0]], {})
    assert History((first,)).quarantined() == {"a": "truncated"}
    both = History((first, second))
    assert (both.quarantined(), both.skipped()) == ({}, {"z": "not asked for"})
    assert (both.inputs(), both.num_shards) == ({"a", "z"}, 6)


def test_a_line_that_is_no_row_is_damage(ledger, objects):
    add(objects, b"what?\n")
    with pytest.raises(IntegrityError, match="line 6 is not a ledger row"):
        Ledger.read(objects, 1)


def test_objects_are_replaced_whole(objects):
    assert objects.write("deep/object", b"old")["bytes"] == 3
    objects.write("deep/object", b"new")
    assert objects.read("deep/object") == b"new"
    assert list(objects.names()) == ["deep/object"]


def test_an_object_that_cannot_be_written_leaves_nothing(objects):
    (objects.folder / "object").mkdir()
    with pytest.raises(StoreError, match="cannot write 3 bytes"):
        objects.write("object", b"new")
    assert [p.name for p in objects.folder.iterdir()] == ["object"]


def test_objects_of_a_shard_are_written_together(objects):
    written = objects.write_all({"a/c/0": [b"one", b"", b"two"], "b/c/0/0": [b"three"]})
    assert objects.read("a/c/0") == b"onetwo"
    assert objects.read("b/c/0/0") == b"three"
    assert written["a/c/0"] == {"bytes": 6, "sha256": hashlib.sha256(b"onetwo").hexdigest()}
    assert sorted(objects.names()) == ["a/c/0", "b/c/0/0"]


@pytest.mark.parametrize("stands_in_the_way", ["first", "second", "third"])
def test_no_object_is_left_half_written(objects, stands_in_the_way):
    (objects.folder / stands_in_the_way / "folder").mkdir(parents=True)
    contents = {"first": [b"1"], "second": [b"22"], "third": [b"333"]}
    with pytest.raises(StoreError, match=f"{stands_in_the_way}: cannot write [123] bytes"):
        objects.write_all(contents)
    for path in objects.folder.iterdir():
        assert path.is_dir() or [path.read_bytes()] == contents[path.name]


def test_what_killed_writers_left_is_no_object_and_is_swept(objects):
    objects.write("c/0", b"whole")
    (objects.folder / "c" / "0.123.partial").write_bytes(b"half")
    assert list(objects.names()) == ["c/0"]
    objects.sweep()
    assert [p.name for p in (objects.folder / "c").iterdir()] == ["0"]


def test_commits_follow_each_other_and_all_stay(objects):
    assert read_commit(objects) is None
    write_commit(objects, FIRST, None)
    second = FIRST.after(APPEND, summary={"tiles": 2})
    write_commit(objects, second, FIRST)
    assert read_commit(objects) == second
    assert list(all_commits(objects)) == [FIRST, second]
    assert list(read_commit(objects, 1).header["modalities"]) == ["z", "a"]
    assert second.parent == named("", FIRST.encode())["sha256"]
    with pytest.raises(StoreError, match="no commit 3; there are 1 to 2, see `aptile log`"):
        require_commit(objects, 3)


def test_a_commit_on_top_of_another_one_than_is_there_is_refused(objects):
    write_commit(objects, FIRST, None)
    with pytest.raises(LockedError, match=r"COMMIT.json was written by another process"):
        write_commit(objects, FIRST.after(APPEND), replace(FIRST, summary={}))
    assert read_commit(objects) == FIRST


@given(st.data())
def test_no_byte_of_a_commit_changes_unnoticed(data):
    content = bytearray(FIRST.encode())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"no commit|checksum"):
        decode(bytes(content))


@pytest.mark.parametrize("damage", [b"other", None])
def test_another_object_than_the_committed_one_is_refused(objects, damage):
    manifest = named("manifest/000001.parquet", b"manifest")
    objects.write(manifest["path"], b"manifest")
    assert read_named(objects, manifest) == b"manifest"
    objects.remove([manifest["path"]])
    if damage is not None:
        objects.write(manifest["path"], damage)
    with pytest.raises(IntegrityError, match=r"000001.parquet (is missing|differs)"):
        read_named(objects, manifest)


@pytest.mark.parametrize("text", ["", "[]", '{"batches": 3}', json.dumps({"sha256": "00"})])
def test_a_damaged_commit_is_refused(objects, text):
    (objects.folder / COMMIT).write_text(text)
    with pytest.raises(IntegrityError, match="is not a commit"):
        read_commit(objects)
