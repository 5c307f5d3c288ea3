import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from grown import OPTIONS, cut_lean, grown_store, settings

from pipeline.errors import ArchiveError, IntegrityError, StoreError
from pipeline.jobs.job import run_job
from pipeline.jobs.verify import verify
from pipeline.storage.mending import Remade
from pipeline.storage.objects import LocalObjects, entry
from support import Watching, aptile, assert_same_bytes, files, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")

LEAN = "image/partitions/lean/"
SHARDS = (
    "image/pixels/c/0/0/0/0",
    "image/valid/c/1/0/0",
    "image/score_8/c/3/0/0",
    "image/num_valid/c/2",
    "image/partitions/default/scales/c/3",
    "image/partitions/default/tokens/c/0/0",
)
RECORDS = (
    "COMMIT.json",
    "commits/000001.json",
    "commits/000002.json",
    "commits/000003.json",
    "ledger/000002.jsonl",
    "manifest/000001.parquet",
    "manifest/000002.parquet",
    "zarr.json",
    "image/zarr.json",
    "image/pixels/zarr.json",
    f"{LEAN}scales/zarr.json",
)
PARTITION = (
    f"{LEAN}scales/c/0",
    f"{LEAN}counts/c/3",
    f"{LEAN}ledger/000001.jsonl",
    f"{LEAN}ledger/000002.jsonl",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two commits of preprocessing and one of a further partition: 14 tiles in 4 shards."""
    return grown_store(tmp_path_factory.mktemp("grown"))


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made / "store", tmp_path / "store")


def again(archive: Path, store: Path):
    return run_job(str(archive), store, settings(), Watching())


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def harm(store: Path, name: str, how) -> dict[str, int]:
    """Damage one object; when each of the others was written."""
    how(store / name)
    return {n: (store / n).stat().st_mtime_ns for n in files(store) if n not in {name, ".lock"}}


@pytest.mark.parametrize("how", [flipped, emptied, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*SHARDS, *RECORDS, *PARTITION])
def test_what_is_damaged_is_made_again_and_nothing_else(made, store, name, how):
    times = harm(store, name, how)
    assert not verify(store).intact
    further = name in PARTITION
    repaired = (cut_lean(store) if further else again(made / "archive", store)).repaired
    of_shards = int("/c/" in name)
    assert repaired == (1, of_shards)
    assert_same_bytes(made / "store", store)
    now = {n: (store / n).stat().st_mtime_ns for n in times}
    assert now == times
    assert verify(store).intact


@pytest.mark.parametrize("name", ["image/pixels/c/0/0/0/0", "zarr.json", "COMMIT.json"])
def test_what_has_another_size_needs_no_verification(made, store, name):
    """A rerun looks at sizes, and at the contents of what is small."""
    harm(store, name, emptied)
    assert again(made / "archive", store).repaired[0] == 1
    assert_same_bytes(made / "store", store)


def test_the_ledger_of_the_first_batch_is_made_again(made, store):
    """All of its shards are made again, and none is written."""
    times = harm(store, "ledger/000001.jsonl", flipped)
    assert again(made / "archive", store).repaired == (1, 0)
    assert {n: (store / n).stat().st_mtime_ns for n in times} == times
    assert_same_bytes(made / "store", store)


def test_a_lost_ledger_and_lost_shards_are_mended_together(made, store):
    for name in ("ledger/000002.jsonl", "COMMIT.json", *SHARDS, "manifest/000002.parquet"):
        (store / name).unlink()
    assert again(made / "archive", store).repaired == (9, 4)
    assert_same_bytes(made / "store", store)


def test_a_whole_array_that_was_lost_comes_back(made, store):
    """So many shards are made by workers."""
    shutil.rmtree(store / "image" / "pixels")
    assert again(made / "archive", store).repaired == (5, 4)
    assert_same_bytes(made / "store", store)


def test_a_finished_store_is_left_alone(made, store):
    times = {name: (store / name).stat().st_mtime_ns for name in files(store)}
    assert again(made / "archive", store).repaired == (0, 0)
    assert cut_lean(store).repaired == (0, 0)
    assert {name: (store / name).stat().st_mtime_ns for name in files(store)} == times


def test_what_comes_out_otherwise_replaces_nothing(made, store, tmp_path):
    """The file's size and time are as they were, but its pixels are not."""
    archive = shutil.copytree(made / "archive", tmp_path / "archive")
    status = (archive / "a.tif").stat()
    pixels = textured((2, 64, 64), seed=1)
    pixels[:, 5, 5] += 1
    save_scene(archive / "a.tif", pixels)
    os.utime(archive / "a.tif", ns=(status.st_atime_ns, status.st_mtime_ns))
    times = harm(store, SHARDS[0], flipped)
    before = (store / SHARDS[0]).read_bytes()
    verify(store)
    with pytest.raises(IntegrityError, match="made again it differs from what was committed"):
        again(archive, store)
    assert (store / SHARDS[0]).read_bytes() == before
    assert {n: (store / n).stat().st_mtime_ns for n in times} == times
    assert [damage.name for damage in verify(store).damaged] == [SHARDS[0]]


def test_a_changed_archive_is_refused_before_anything_is_made(made, store, tmp_path):
    archive = shutil.copytree(made / "archive", tmp_path / "archive")
    save_scene(archive / "a.tif", textured((2, 64, 64), seed=9))
    harm(store, SHARDS[0], Path.unlink)
    with pytest.raises(ArchiveError, match=r"1 of its files differ, a.tif was changed"):
        again(archive, store)


def test_another_configuration_is_refused(made, store):
    harm(store, "COMMIT.json", Path.unlink)
    with pytest.raises(StoreError, match="was made with another configuration"):
        run_job(str(made / "archive"), store, settings("partition.num_scales=2"), Watching())
    assert not (store / "COMMIT.json").exists()


def test_a_note_that_lies_costs_a_look_and_nothing_else(made, store):
    names = [SHARDS[0], "../../etc/passwd", "nothing", 3, "ledger/000001.jsonl"]
    times = {name: (store / name).stat().st_mtime_ns for name in files(store) if name != ".lock"}
    (store / "damaged.json").write_text(json.dumps({"objects": names}))
    assert again(made / "archive", store).repaired == (0, 0)
    assert_same_bytes(made / "store", store)
    assert {name: (store / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize("text", ["", "[]", '{"objects": 3}', "\xff"])
def test_a_torn_note_is_no_obstacle(made, store, text):
    (store / "damaged.json").write_text(text, encoding="latin-1")
    assert again(made / "archive", store).repaired == (0, 0)


def test_what_the_other_command_mends_stays_noted(made, store, capsys):
    for name in (SHARDS[0], PARTITION[0]):
        flipped(store / name)
    verify(store)
    report = again(made / "archive", store)
    assert report.repaired == (1, 1)
    assert report.notes == (
        f"1 objects are still damaged, such as {PARTITION[0]}; `aptile verify` says what to do",
    )
    assert cut_lean(store).repaired == (1, 1)
    assert_same_bytes(made / "store", store)


def test_the_command_says_what_it_repaired(made, store, capsys):
    for name in SHARDS[:3]:
        (store / name).unlink()
    assert aptile("preprocess", made / "archive", store, *OPTIONS) == 0
    assert "; repaired 3 objects in 3 shards" in capsys.readouterr().err
    assert aptile("preprocess", made / "archive", store, *OPTIONS, "--json") == 0
    said = capsys.readouterr()
    assert "complete already, nothing to do" in said.err
    assert json.loads(said.out)["repaired_objects"] == 0


def test_scenes_that_failed_fail_again(tmp_path):
    """A scene whose pixels cannot be read is quarantined in its shard; repair leaves it out as well."""
    archive = tmp_path / "archive"
    save_scene(archive / "a.tif", textured((2, 64, 64), seed=1))
    torn = save_scene(archive / "b.tif", textured((2, 64, 64), seed=2), compress="deflate")
    content = bytearray(torn.read_bytes())
    content[len(content) // 2 :] = b"\0" * (len(content) - len(content) // 2)
    torn.write_bytes(content)
    store = tmp_path / "store"
    config = settings("store.shard_tiles=8")
    report = run_job(str(archive), store, config, Watching())
    assert list(report.quarantined) == ["b"]
    whole = shutil.copytree(store, tmp_path / "whole")
    for name in ("image/pixels/c/0/0/0/0", "ledger/000001.jsonl", "manifest/000001.parquet"):
        flipped(store / name)
    assert not verify(store).intact
    assert run_job(str(archive), store, config, Watching()).repaired == (3, 1)
    assert_same_bytes(whole, store)


def test_only_the_wanted_bytes_are_written(tmp_path):
    objects = LocalObjects(tmp_path)
    remade = Remade(objects, {"a": entry(b"right")})
    assert remade.write("b", b"other") == entry(b"other")
    with pytest.raises(IntegrityError, match="made again it differs"):
        remade.write("a", b"wrong")
    assert files(tmp_path) == []
    remade.write("a", b"right")
    assert files(tmp_path) == ["a"]


def test_random_damage_of_several_objects_is_mended(made, store):
    rng = np.random.default_rng(3)
    names = [n for n in files(store) if n not in {".lock"} and not n.startswith("commits/")]
    mended = 0
    for _ in range(3):
        for name in rng.choice(names, 6, replace=False).tolist():
            [flipped, emptied, Path.unlink][rng.integers(3)](store / name)
            mended += 1
        for _ in range(2):
            verify(store)
            again(made / "archive", store)
            cut_lean(store)
        assert verify(store).intact
        assert_same_bytes(made / "store", store)
    print(f"{mended} objects damaged at once, 6 at a time: all mended")
