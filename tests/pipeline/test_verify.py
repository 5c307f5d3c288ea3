import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from grown import grown_store, settings

from pipeline import open_store
from pipeline.errors import AptileError, IntegrityError, StoreError
from pipeline.jobs.job import run_job
from pipeline.jobs.known import damage_of, known_objects
from pipeline.jobs.manifest import encode_manifest
from pipeline.jobs.repartition import repartition
from pipeline.jobs.verify import verify
from pipeline.rules import FurtherRule
from pipeline.settings.run import RunConfig
from pipeline.storage.chain import read_chain
from pipeline.storage.commit import named, read_commit
from pipeline.storage.ledger import Ledger
from pipeline.storage.objects import LocalObjects
from support import Watching, files, flip, reseal, save_scene, textured
from workflows.verify import in_words

pytestmark = pytest.mark.usefixtures("kept_workers")

FLIPS = 1000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two commits of preprocessing and one of a further partition: 14 tiles in 4 shards."""
    return grown_store(tmp_path_factory.mktemp("grown")) / "store"


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def read_all(store: Path, commit: int | None = None) -> dict[str, bytes]:
    """Digests of all that a reader can ask of a store: manifest, every tile, every partition."""
    opened = open_store(store, commit)
    found = {"manifest": repr(opened.manifest.to_pylist()).encode()}
    found["inputs"] = json.dumps([opened.history.skipped(), opened.quarantined()]).encode()
    for modality in opened.modalities:
        slots = opened.frame_table(modality).slots
        for name in opened.partitions(modality):
            frames = opened.read_frames(modality, slots, name)
            found[f"{modality}/{name}"] = _digest(frames.pixels, frames.valid, *frames.scales)
            found[f"{modality}/{name}/tokens"] = _digest(opened.partition(name, modality).tokens)
        found[f"{modality}/scores"] = _digest(*opened.read_score_maps(modality, slots))
        for name in ("num_valid", "num_cloud", "num_nodata", "num_cells"):
            found[f"{modality}/{name}"] = _digest(opened.per_frame(modality, name))
    return found


def _digest(*arrays: np.ndarray) -> bytes:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).digest()


def is_found(store: Path, name: str) -> bool:
    """Whether verification finds one damaged object: as `verify` does it, without the other objects."""
    objects = LocalObjects(store)
    chain = read_chain(objects)
    if chain.damaged:
        return True
    known = known_objects(objects, chain)
    return bool(known.problems) or damage_of(objects, name, known.objects[name]) is not None


def flips_in(store: Path, number: int, seed: int):
    """(name, position, bits) of single-byte changes, spread over all bytes, each file at least once."""
    rng = np.random.default_rng(seed)
    names = [name for name in files(store) if name != ".lock"]
    sizes = np.array([(store / name).stat().st_size for name in names])
    some = [*range(len(names)), *rng.choice(len(names), number - len(names), p=sizes / sizes.sum())]
    for index in some:
        yield names[index], int(rng.integers(sizes[index])), int(rng.integers(1, 256))


def hunt(store: Path, number: int) -> dict[str, int]:
    """Flip bytes one after another; how often verification found it, and reading raised or not."""
    whole = {None: read_all(store), 1: read_all(store, 1)}
    counts = dict.fromkeys(("found", "raised", "read the same", "silent on read", "missed"), 0)
    for name, at, bits in flips_in(store, number, seed=7):
        before = (store / name).read_bytes()
        flip(store / name, at, bits)
        found, raised, same = is_found(store, name), False, True
        for commit, expected in whole.items():
            if commit == 1 and not name.startswith(("commits/", "manifest/000001")):
                continue  # reads the same objects as the newest one does
            try:
                same = same and read_all(store, commit) == expected
            except AptileError:
                raised = True
        counts["found"] += found
        counts["raised"] += raised
        counts["read the same"] += not raised and same
        counts["silent on read"] += not raised and not same
        counts["missed"] += not (found or raised)
        (store / name).write_bytes(before)
    return counts


@pytest.mark.parametrize(
    "number", [FLIPS, pytest.param(10 * FLIPS, marks=pytest.mark.full)], ids=str
)
def test_no_flipped_byte_is_silent(store, number):
    counts = hunt(store, number)
    print(f"{number} flipped bytes: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    assert counts["found"] == number
    assert counts["silent on read"] == counts["missed"] == 0
    assert verify(store).intact


def test_what_hunting_leaves_out_verification_has(store):
    """The whole of `verify` says of a flipped byte what its parts say, one file of each kind."""
    names = ["COMMIT.json", "commits/000001.json", "zarr.json", "ledger/000002.jsonl"]
    names += ["manifest/000001.parquet", "image/pixels/c/1/0/0/0"]
    for name in (*names, "image/partitions/lean/ledger/000001.jsonl"):
        before = (store / name).read_bytes()
        flip(store / name, len(before) // 2, 1)
        assert [damage.name for damage in verify(store).damaged] == [name]
        (store / name).write_bytes(before)
    assert verify(store).intact


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    "harm", [_truncated, _emptied, _longer, Path.unlink], ids=lambda f: f.__name__
)
def test_every_harmed_file_is_found(store, harm):
    names = [name for name in files(store) if name != ".lock"]
    for name in names:
        before = (store / name).read_bytes()
        harm(store / name)
        assert is_found(store, name)
        (store / name).write_bytes(before)
    print(f"{len(names)} files {harm.__name__.strip('_')}: all found")


def test_swapped_shards_are_found(store):
    swapped = 0
    for first in sorted(store.glob("image/**/c/0")):
        one, two = (
            next((f for f in [path, *path.rglob("0")] if f.is_file()), path)
            for path in (first, first.with_name("1"))
        )
        contents = one.read_bytes(), two.read_bytes()
        if contents[0] == contents[1]:
            continue
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
        found = {damage.name for damage in verify(store).damaged}
        assert found == {path.relative_to(store).as_posix() for path in (one, two)}
        one.write_bytes(contents[0])
        two.write_bytes(contents[1])
        swapped += 1
    print(f"{swapped} pairs of shards swapped: all found")
    assert swapped >= 8


def test_stale_objects_are_found(store, tmp_path):
    """Objects of the same store as it is made by other settings."""
    folder = tmp_path / "other"
    other = (
        grown_store(folder, "partition.thresholds=[0.5, 0.75]", "modality.value_range=[0, 9000]")
        / "store"
    )
    stale = 0
    for name in files(store):
        before = (store / name).read_bytes()
        old = (other / name).read_bytes()
        if name.startswith(("commits", "COMMIT", ".lock")) or old == before:
            continue
        (store / name).write_bytes(old)
        assert name in {damage.name for damage in verify(store).damaged}
        (store / name).write_bytes(before)
        stale += 1
    print(f"{stale} stale objects: all found")
    assert stale > 10


def test_a_commit_under_the_wrong_number_is_found(store):
    commits = store / "commits"
    whole = {path.name: path.read_bytes() for path in commits.iterdir()}
    (commits / "000001.json").write_bytes(whole["000002.json"])
    assert [d.what for d in verify(store).damaged] == ["is commit 2"]
    (commits / "000001.json").write_bytes(whole["000001.json"])
    reseal(store, parent="0" * 64)
    named = {damage.name: damage.what for damage in verify(store).damaged}
    assert named["commits/000003.json"] == "differs from COMMIT.json"
    assert named["commits/000002.json"] == "is not what commit 3 follows"


def test_what_nothing_names_is_left_over_not_damage(store):
    (store / "image" / "pixels" / "c" / "7").mkdir()
    extra = ["notes.txt", "image/pixels/c/7/x", "image/partitions/old/scales/c/0"]
    for name in extra:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"?")
    report = verify(store)
    assert report.intact
    assert sorted(report.leftovers) == sorted(extra)
    assert read_all(store)


def test_an_object_where_there_is_none_is_not_read(store):
    """All of `num_cloud` is fill value, so it has no object; one that appears would be read."""
    path = store / "image" / "num_cloud" / "c" / "0"
    path.parent.mkdir()
    shutil.copy(store / "image" / "num_valid" / "c" / "0", path)
    assert verify(store).leftovers == ("image/num_cloud/c/0",)
    with pytest.raises(
        IntegrityError, match="num_cloud/c/0 is 56 bytes long; the ledger says none"
    ):
        open_store(store).per_frame("image", "num_cloud")


def test_a_lost_object_of_a_whole_array_is_no_zero(store):
    (store / "image" / "num_valid" / "c" / "2").unlink()
    with pytest.raises(IntegrityError, match="num_valid/c/2 is missing"):
        open_store(store).per_frame("image", "num_valid")


def test_an_unfinished_store_is_no_damage(tmp_path):
    save_scene(tmp_path / "archive" / "a.tif", textured((2, 64, 96), seed=1))
    config = settings("store.shard_tiles=2")
    with pytest.raises(KeyboardInterrupt):
        run_job(str(tmp_path / "archive"), tmp_path / "store", config, Watching(interrupt_after=1))
    report = verify(tmp_path / "store")
    assert report.commit is None
    assert report.intact
    assert (
        "1 of 3 shards are done; run its `aptile preprocess` command again" in report.under_way[0]
    )
    assert "unfinished" in in_words(report)[0]
    # A worker may have written more than the ledger knows.
    (row,) = Ledger.read(LocalObjects(tmp_path / "store"), 1).shards.values()
    (tmp_path / "store" / next(iter(row["objects"]))).unlink()
    assert [d.what for d in verify(tmp_path / "store").damaged] == ["is missing"]


def test_an_append_and_a_partition_under_way_are_named_as_such(store, made):
    save_scene(store.parent / "archive" / "d.tif", textured((2, 64, 160), seed=4))
    with pytest.raises(KeyboardInterrupt):
        run_job(
            str(store.parent / "archive"),
            store,
            settings(),
            Watching(interrupt_after=1),
            append=True,
        )
    rule, run = FurtherRule(uniform_px=8), RunConfig(workers=1)
    with pytest.raises(KeyboardInterrupt):
        repartition(store, "flat", rule, run, Watching(interrupt_after=2))
    report = verify(store)
    assert report.intact
    assert report.leftovers == ()
    append, partition = report.under_way
    assert "scenes are being appended, or that was interrupted: 1 of 3 shards are done" in append
    assert "partition flat of image is being made, or that was interrupted" in partition
    assert {"ledger/000003.jsonl", "image/partitions/flat/ledger/000001.jsonl"} < set(
        report.unfinished
    )


def test_a_commit_that_was_not_made_visible_is_no_damage(store):
    objects = LocalObjects(store)
    shutil.copy(store / "commits" / "000002.json", store / "COMMIT.json")
    report = verify(store)
    assert read_commit(objects).number == report.commit == 2
    assert "commits/000003.json was not made visible" in report.under_way[0]


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "", "a\0b", "image/../../outside"]
)
def test_names_that_lead_out_of_the_store_are_not_followed(store, name):
    (store.parent / "outside").write_bytes(b"secret")
    commit = read_commit(LocalObjects(store))
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    for call in ("read", "size", "digest"):
        with pytest.raises(IntegrityError, match="no name below the store"):
            getattr(LocalObjects(store), call)(name)
    reseal(store, manifest={"path": name, **entry})
    assert not verify(store).intact
    with pytest.raises(IntegrityError):
        _ = open_store(store).manifest
    row = {"shard": 0, "objects": {name: entry}, "failed": {}, "findings": {}, "thresholds": {}}
    head = {"batch": 1, "first_shard": 0, "num_shards": 3}
    rows = [head, {**row, "left_out": {}, "tiles_left_out": []}]
    forged = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (store / "ledger" / "000009.jsonl").write_bytes(forged)
    first = replace(commit.batches[0], ledger=named("ledger/000009.jsonl", forged))
    reseal(store, manifest=commit.manifest, batches=(first, *commit.batches[1:]))
    assert any("no object of its shard" in damage.what for damage in verify(store).damaged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"header": {}}, "cannot be used"),
        ({"partitions": {"image": {"../x": {"ledgers": []}}}}, "names a partition '../x'"),
        ({"summary": {"tiles": 3}}, "the manifest has 14 tiles, the commit 3"),
    ],
)
def test_a_forged_commit_is_no_crash(store, changes, said):
    reseal(store, **changes)
    if changes.get("header") == {}:
        with pytest.raises(StoreError, match="format version"):
            verify(store)
        return
    (store / "commits" / "000003.json").write_bytes((store / "COMMIT.json").read_bytes())
    assert any(said in damage.what for damage in verify(store).damaged)


def test_a_manifest_that_contradicts_the_arrays_is_found(store):
    table = pq.read_table(store / "manifest" / "000002.parquet")
    for changed, said in (
        (table.take([0, *range(13)]), "several rows of one tile"),
        (table.slice(1), "the manifest has 13 tiles, the commit 14"),
    ):
        content = encode_manifest(changed)
        (store / "manifest" / "000009.parquet").write_bytes(content)
        reseal(store, manifest=named("manifest/000009.parquet", content))
        (store / "commits" / "000003.json").write_bytes((store / "COMMIT.json").read_bytes())
        assert any(said in damage.what for damage in verify(store).damaged)


def test_damage_is_remembered_until_it_is_gone(store):
    path = store / "image" / "valid" / "c" / "0" / "0" / "0"
    before = path.read_bytes()
    flip(path, 3, 1)
    report = verify(store)
    assert report.remembered
    assert json.loads((store / "damaged.json").read_text()) == {"objects": ["image/valid/c/0/0/0"]}
    path.write_bytes(before)
    assert verify(store).leftovers == ()
    assert not (store / "damaged.json").exists()


def test_progress_reaches_the_end(store):
    heard = []
    report = verify(store, 3, lambda done, total: heard.append((done, total)))
    assert heard[0] == (0, report.objects)
    assert heard[-1] == (report.objects, report.objects)
