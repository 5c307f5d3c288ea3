import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster

from faulty_proxy import FAULTS, at_random, faulty_proxy
from model.data import TileDataset
from pipeline import open_store
from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.jobs.job import run_job
from pipeline.jobs.repartition import repartition
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from pipeline.storage import lock
from pipeline.storage.buckets import BucketObjects
from pipeline.storage.commit import (
    APPEND,
    COMMIT,
    REPARTITION,
    all_commits,
    commit_name,
    read_commit,
    write_commit,
)
from pipeline.storage.lock import LOCK
from pipeline.storage.objects import LocalObjects, objects_at
from support import Watching, aptile, assert_same_bytes, files, save_scene, textured

SMALL = (
    "store.tile_size_px=32",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "partition.thresholds=[1.5, 2.5]",
)
RUN = RunConfig(workers=1)


@pytest.fixture(scope="module")
def workers():
    """A worker in this process, so that a job costs no start of another one."""
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(processes=False, **options) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    first = textured((2, 100, 90), seed=1)
    first[:, 40:75, 60:] = 0
    save_scene(folder / "a.tif", first, nodata=0)
    save_scene(folder / "b.tif", textured((2, 40, 70), seed=2), nodata=0)
    return folder


def run(archive, store, workers, observer=None, **options):
    config = load_config(PreprocessConfig, None, [*SMALL, f"run.scheduler={workers}"])
    return run_job(str(archive), store, config, observer or Watching(), **options)


@pytest.fixture(scope="module")
def local(archive, workers, tmp_path_factory):
    """The same store in a folder."""
    path = tmp_path_factory.mktemp("local") / "store"
    assert run(archive, path, workers).tiles == 12 + 6
    return path


def assert_same_objects(folder: Path, url: str) -> None:
    """Same names and bytes; the lock of both is free."""
    there = objects_at(url)
    names = sorted(there.names())
    assert names == files(folder)
    assert [name for name in names if there.read(name) != (folder / name).read_bytes()] == []
    assert there.read(LOCK) == b""


# --- jobs ---


def test_a_store_in_a_bucket_has_the_objects_of_one_in_a_folder(bucket, archive, workers, local):
    url = f"{bucket}/same/store"
    report = run(archive, url, workers)
    assert (report.store, report.tiles) == (url, 18)
    assert_same_objects(local, url)
    assert run(archive, url, workers).shards_written == 0


@pytest.mark.parametrize("shards", [1, 3])
def test_an_interrupted_job_is_completed(bucket, archive, workers, local, shards):
    url = f"{bucket}/interrupted-{shards}"
    with pytest.raises(KeyboardInterrupt):
        run(archive, url, workers, Watching(interrupt_after=shards))
    rows = [name for name in objects_at(url).names() if ".rows/" in name]
    assert len(rows) == shards
    with pytest.raises(StoreError, match="has not finished; run its `aptile preprocess`"):
        open_store(url)
    assert run(archive, url, workers).shards_written == 5 - shards
    assert_same_objects(local, url)


def test_a_job_that_ended_before_its_first_object_is_begun_again(
    bucket, archive, workers, local, tmp_path
):
    for store in (str(tmp_path / "store"), f"{bucket}/begun"):
        script = (
            "import os, sys; from pipeline.storage.lock import exclusive; "
            "from pipeline.storage.objects import objects_at\n"
            "with exclusive(objects_at(sys.argv[1])): os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", script, store]).returncode == -9
        assert list(objects_at(store).names()) == [LOCK]
        run(archive, store, workers)
    assert_same_bytes(local, tmp_path / "store")
    assert_same_objects(local, f"{bucket}/begun")


def test_scenes_are_appended_and_cut_anew_as_in_a_folder(bucket, archive, workers, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, names in ((before, ("a.tif",)), (after, ("a.tif", "b.tif"))):
        folder.mkdir()
        for name in names:
            (folder / name).hardlink_to(archive / name)
    rule = FurtherRule(tokens_per_tile=40)
    for store in (tmp_path / "store", f"{bucket}/grown"):
        run(before, store, workers)
        repartition(store, "tokens-40", rule, RUN, Watching())
        with pytest.raises(KeyboardInterrupt):
            run(after, store, workers, Watching(interrupt_after=1), append=True)
        assert open_store(store).manifest.num_rows == 12
        run(after, store, workers, append=True)
        repartition(store, "tokens-40", rule, RUN, Watching())
        assert open_store(store).manifest.num_rows == 18
        assert open_store(store, commit=1).manifest.num_rows == 12
    assert_same_objects(tmp_path / "store", f"{bucket}/grown")


def test_readers_of_a_bucket_see_what_readers_of_a_folder_see(bucket, local):
    url = f"{bucket}/same/store"
    here, there = TileDataset(local), TileDataset(url)
    assert len(there) == len(here) == 18
    for index in range(len(here)):
        one, other = here[index], there[index]
        assert one.id == other.id
        for a, b in (
            (one.pixels, other.pixels),
            (one.valid, other.valid),
            *zip(one.scales, other.scales, strict=True),
            *zip(one.score_maps, other.score_maps, strict=True),
        ):
            np.testing.assert_array_equal(a, b)
    tiles = [17, 3, 3, 0, 11]
    one, other = here.batch(tiles), there.batch(tiles)
    np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)
    np.testing.assert_array_equal(one.scales, other.scales)
    for a, b in zip(one.modalities[0].band_sets, other.modalities[0].band_sets, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        np.testing.assert_array_equal(a.valid, b.valid)


def test_the_command_line_takes_urls(bucket, archive, local, capsys, tmp_path):
    url = f"{bucket}/commands"
    options = [f"--set={setting}" for setting in SMALL]
    assert aptile("preprocess", archive, url, *options, "--workers", 1, "--json") == 0
    assert_same_objects(local, url)
    assert f'"store": "{url}"' in capsys.readouterr().out
    assert aptile("repartition", url, "--name", "t", "--tokens-per-tile", 40, "--workers", 1) == 0
    assert aptile("inspect", url, "--partition", "t", "--json") == 0
    assert '"tiles": 18' in capsys.readouterr().out
    assert aptile("log", url) == 0
    assert "repartition" in capsys.readouterr().out
    small = ["steps=1", "warmup_steps=0", "batch_tiles=2", "size=nano"]
    chosen = [f"--set={setting}" for setting in small]
    assert aptile("train", url, "--out", tmp_path / "run", *chosen) == 0


def test_what_is_lost_or_altered_is_no_fill_value(bucket, local):
    url = f"{bucket}/damaged"
    there = objects_at(url)
    for name in files(local):
        there.write(name, (local / name).read_bytes())
    frames = np.arange(4)
    name = "image/pixels/c/0/0/0/0"
    whole = there.read(name)
    for content, message in (
        (whole[:-1], rf"{name} is {len(whole) - 1} bytes long; the ledger says {len(whole)}"),
        (bytes([whole[0] ^ 1]) + whole[1:], "has the size the ledger says, but other"),
    ):
        there.write(name, content)
        with pytest.raises(IntegrityError, match=message):
            open_store(url).read_frames("image", frames)
    there.remove([name])
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        open_store(url).read_frames("image", frames)
    store = open_store(local)
    many = [path for row in store.history.shards.values() for path in row["objects"]]
    sizes = there.sizes([*many, "image/pixels/c/99/0/0/0"])
    assert sizes == {path: LocalObjects(local).size(path) for path in many if path != name}


# --- places ---


@pytest.mark.parametrize(
    ("url", "kind", "facts"),
    [
        ("s3://tiles", "S3Store", {"bucket": "tiles"}),
        ("s3://tiles/a/b/", "S3Store", {"bucket": "tiles"}),
        ("gs://tiles/a", "GCSStore", {"bucket": "tiles"}),
        ("az://tiles/a", "AzureStore", {"container_name": "tiles"}),
        ("abfs://tiles/a", "AzureStore", {"container_name": "tiles"}),
        (
            "abfs://tiles@owner.dfs.core.windows.net/a",
            "AzureStore",
            {"container_name": "tiles", "account_name": "owner"},
        ),
    ],
)
def test_urls_name_the_store_of_their_provider(monkeypatch, url, kind, facts):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "somebody")
    found = BucketObjects(url)
    assert type(found.store).__name__ == kind
    assert {key: found.store.config[key] for key in facts} == facts
    assert found.location == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "https://tiles/a",
        "ftp://tiles/a",
        "file:///tmp/a",
        "memory:///",
        "s3://",
        "s3:///a",
        "s3://tiles/a/../b",
        "s3://tiles/a%2e%2e/b",
        "s3://tiles/a//b",
        "s3://tiles/a?secret=hush",
        "s3://key:hush@tiles/a",
    ],
)
def test_other_urls_are_no_place_for_a_store(url):
    with pytest.raises(StoreError, match="no place for a store") as caught:
        objects_at(url)
    assert "hush" not in str(caught.value)


def test_a_url_that_needs_more_to_be_known_is_refused_in_words(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(
        StoreError, match="az://tiles/a: cannot be used: .*Account must be specified"
    ):
        objects_at("az://tiles/a")


def test_something_else_at_the_prefix_is_left_alone(bucket, archive, workers):
    url = f"{bucket}/others"
    objects_at(url).write("precious.txt", b"1")
    with pytest.raises(StoreError, match=r"is no aptile store \(it holds 'precious.txt'\)"):
        run(archive, url, workers)
    assert list(objects_at(url).names()) == ["precious.txt"]


# --- one writer ---


def test_a_commit_made_too_late_changes_nothing(bucket, local, tmp_path):
    first = read_commit(LocalObjects(local))
    for place in (objects_at(str(tmp_path / "late")), objects_at(f"{bucket}/late")):
        write_commit(place, first, None)
        place.write(commit_name(2), b"left by a crash")
        one, other = (first.after(kind) for kind in (REPARTITION, APPEND))
        write_commit(place, one, first)
        with pytest.raises(LockedError, match="COMMIT.json was written by another"):
            write_commit(place, other, first)
        assert list(all_commits(place)) == [first, one]
        assert place.read(commit_name(2)) == place.read(COMMIT)


class _Robbed(Watching):
    """Another machine takes the lock over after the first shard, as after a long pause of this one."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._objects = objects_at(url)

    def shard_done(self, tiles: int) -> None:
        super().shard_done(tiles)
        if self.done == 1:
            self._objects.write(LOCK, b'{"pid": 1, "host": "elsewhere", "token": "another"}')


def test_a_writer_that_lost_its_lock_stops_before_its_next_row(
    bucket, archive, workers, monkeypatch
):
    monkeypatch.setattr(lock, "STALE_S", 0.0)
    url = f"{bucket}/robbed"
    observer = _Robbed(url)
    with pytest.raises(LockedError, match="the lock is no longer this process's"):
        run(archive, url, workers, observer)
    assert observer.done == 1
    names = list(objects_at(url).names())
    assert len([name for name in names if ".rows/" in name]) == 1
    assert LOCK in names


# --- faults ---


def _told(error: StoreError, url: str) -> str:
    """The kind of an error that is one line and says where."""
    assert "\n" not in str(error)
    assert url in str(error)
    return type(error).__name__


def test_faults_on_the_way_change_no_byte(server, bucket, archive, workers, local, monkeypatch):
    with faulty_proxy(server, at_random(0.1, seed=5)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*proxy.server_address))
        url, ended = f"{bucket}/faulty", Counter()
        for _ in range(40):
            try:
                run(archive, url, workers)
                break
            except StoreError as error:
                ended[_told(error, url)] += 1
        else:
            pytest.fail(f"no end: {ended}")
        read = Counter()
        for index in range(18):
            try:
                tile = TileDataset(url)[index]
            except StoreError as error:
                read[_told(error, url)] += 1
                continue
            np.testing.assert_array_equal(tile.pixels, TileDataset(local)[index].pixels)
            read["equal"] += 1
        counts = {name: proxy.counts[name] for name in ("none", *FAULTS)}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server))
    assert_same_objects(local, url)
    assert read["equal"] > 0
    print(f"requests {counts}; runs that stopped {dict(ended)}; tiles read {dict(read)}")
