import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from distributed import LocalCluster

from pipeline import open_store, partition_image, segments
from pipeline.errors import ArchiveError, StoreError
from pipeline.jobs import clients
from pipeline.jobs.job import run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.storage.ledger import ledger_name
from support import Watching, aptile, assert_same_bytes, files, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")

SMALL = (
    "store.tile_size_px=32",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "partition.thresholds=[1.5, 2.5]",
    "run.workers=1",
)


def settings(*overrides: str) -> PreprocessConfig:
    return load_config(PreprocessConfig, None, [*SMALL, *overrides])


def run(source: Path, store: Path, *overrides: str, observer: Watching | None = None):
    return run_job(str(source), store, settings(*overrides), observer or Watching())


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Three scenes of odd sizes, one with nodata, in strips, tiles and one block."""
    folder = tmp_path_factory.mktemp("archive")
    first = textured((3, 100, 150), seed=1)
    first[:, 40:75, 60:] = 0
    save_scene(folder / "a.tif", first, nodata=0, compress="lzw")
    tiled = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    save_scene(folder / "b.tif", textured((3, 130, 70), seed=2), **tiled)
    save_scene(folder / "deep" / "c.tif", textured((3, 33, 33), seed=3), crs=None)
    return folder


@pytest.fixture(scope="module")
def store(archive, tmp_path_factory):
    """The archive preprocessed undisturbed by one worker."""
    path = tmp_path_factory.mktemp("store") / "one"
    report = run(archive, path)
    assert (report.inputs, report.done, report.tiles) == (3, 3, 20 + 15 + 4)
    return path


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_every_pixel_of_every_scene_is_in_the_store(archive, store):
    opened = open_store(store)
    for name, nodata in (("a", 0), ("b", None), ("deep/c", None)):
        with rasterio.open(archive / f"{name}.tif") as raster:
            image = raster.read()
        valid = np.ones(image.shape[1:], bool) if nodata is None else (image != nodata).all(0)
        for tile_id in opened.manifest["id"].to_pylist():
            if not tile_id.startswith(f"{name}/"):
                continue
            row, col = map(int, tile_id.rsplit("/r")[1].split("c"))
            cut = np.s_[..., row * 32 : row * 32 + 32, col * 32 : col * 32 + 32]
            height, width = image[cut].shape[1:]
            tile = opened.tile(tile_id)
            np.testing.assert_array_equal(tile.pixels[0][:, :height, :width], image[cut])
            np.testing.assert_array_equal(tile.valid[0][:height, :width], valid[cut])
            assert not tile.valid[0][height:].any()
            assert not tile.valid[0][:, width:].any()


def test_stored_partitions_equal_those_made_from_the_pixels(store):
    opened = open_store(store)
    for tile_id in opened.manifest["id"].to_pylist():
        tile = opened.tile(tile_id)
        partition = partition_image(
            tile.pixels[0],
            base_patch_size=4,
            num_scales=3,
            thresholds=(1.5, 2.5),
            value_range=(0, 10_000),
            valid=tile.valid[0],
        )
        np.testing.assert_array_equal(partition.scales, tile.scales[0])
        for stored, made in zip(tile.score_maps, partition.score_maps, strict=True):
            np.testing.assert_array_equal(stored[0], made)


def test_footprints_are_where_the_scene_is(store):
    rows = {row["id"]: row for row in open_store(store).manifest.to_pylist()}
    assert rows["a/r0c0"]["crs"] == "EPSG:32632"
    assert rows["a/r0c0"]["bounds"] == [500_000, 4_999_680, 500_320, 5_000_000]
    # The last tile reaches to the scene's edge only.
    assert rows["a/r3c4"]["bounds"] == [501_280, 4_999_000, 501_500, 4_999_040]
    west_south = np.frombuffer(rows["a/r0c0"]["geometry"][13:], "<f8").reshape(-1, 2).min(0)
    np.testing.assert_allclose(west_south, [9.0, 45.15], atol=0.01)
    assert rows["deep/c/r0c0"]["geometry"] is rows["deep/c/r0c0"]["crs"] is None


def test_the_bytes_do_not_depend_on_the_number_of_workers(archive, store, tmp_path):
    run(archive, tmp_path / "two", "run.workers=2")
    assert_same_bytes(store, tmp_path / "two")


def test_a_running_scheduler_is_used_and_gives_the_same_bytes(archive, store, tmp_path):
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
    ) as cluster:
        config = settings("run.workers=null", f"run.scheduler={cluster.scheduler_address}")
        run_job(str(archive), tmp_path / "there", config, Watching())
    assert_same_bytes(store, tmp_path / "there")


def test_a_scheduler_that_does_not_answer_is_named_and_nothing_is_lost(
    archive, store, tmp_path, monkeypatch
):
    monkeypatch.setattr(clients, "_CONNECT_S", 1)
    config = settings("run.workers=null", "run.scheduler=tcp://127.0.0.1:9")
    with pytest.raises(StoreError, match="127.0.0.1:9: no Dask scheduler answers there"):
        run_job(str(archive), tmp_path / "late", config, Watching())
    run(archive, tmp_path / "late")
    assert_same_bytes(store, tmp_path / "late")


@pytest.mark.parametrize("shards", [1, 6])
def test_an_interrupted_job_is_completed_to_the_same_bytes(archive, store, tmp_path, shards):
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(archive, stopped, observer=Watching(interrupt_after=shards))
    with pytest.raises(StoreError, match="has not finished"):
        open_store(stopped)
    (stopped / "image" / "pixels" / "left.9.partial").write_bytes(b"by a killed writer")
    observer = Watching()
    report = run(archive, stopped, observer=observer)
    assert report.shards_written == observer.done == report.shards - shards
    assert observer.tiles == report.tiles
    assert_same_bytes(store, stopped)


def started(archive: Path, store: Path) -> subprocess.Popen:
    """The job as a process group of its own, workers included."""
    command = [sys.executable, "-m", "workflows.cli", "preprocess", archive, store]
    for override in SMALL:
        command += ["--set", override]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def kill(job: subprocess.Popen) -> None:
    """End the job and its workers at once, unless it ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def test_a_job_killed_with_its_workers_is_completed_to_the_same_bytes(archive, store, tmp_path):
    job = started(archive, tmp_path / "killed")
    ledger = tmp_path / "killed" / ledger_name(1)
    while job.poll() is None and not (ledger.exists() and b'"shard"' in ledger.read_bytes()):
        time.sleep(0.01)
    kill(job)
    run(archive, tmp_path / "killed")
    assert_same_bytes(store, tmp_path / "killed")


@pytest.mark.full
def test_a_job_killed_again_and_again_ends_with_the_same_bytes(archive, store, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(20):
        job = started(archive, tmp_path / "killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(rng.uniform(0.5, 5))
        kill(job)
    run(archive, tmp_path / "killed")
    assert_same_bytes(store, tmp_path / "killed")


def test_a_job_interrupted_before_its_commit_only_commits(archive, store, tmp_path, capsys):
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(
            archive,
            stopped,
            observer=Watching(interrupt_after=open_store(store).layout_of().num_shards),
        )
    options = [word for setting in SMALL for word in ("--set", setting)]
    reports = []
    for _ in range(2):
        assert aptile("preprocess", archive, stopped, *options, "--json") == 0
        shown = capsys.readouterr()
        reports.append(json.loads(shown.out))
        assert ("complete already, nothing to do" in shown.err) is not reports[-1]["committed"]
    assert [(r["shards_written"], r["committed"]) for r in reports] == [(0, True), (0, False)]
    assert_same_bytes(store, stopped)


def test_a_finished_job_is_left_alone(archive, store):
    before = {name: (store / name).stat().st_mtime_ns for name in files(store)}
    report = run(archive, store)
    assert (report.shards_written, report.committed) == (0, False)
    assert {name: (store / name).stat().st_mtime_ns for name in files(store)} == before


def test_another_configuration_is_refused_in_words(archive, store):
    with pytest.raises(StoreError, match=r"thresholds is \[1.5, 2.5\] there and \[1.0, 2.0\] now"):
        run(archive, store, "partition.thresholds=[1, 2]")


def test_another_archive_is_refused_in_words(archive, store, tmp_path):
    with pytest.raises(ArchiveError, match="2 of its files differ, a.tif is gone"):
        run(Path(f"{archive}/*b.tif"), store)


def test_a_job_cannot_go_on_with_another_choice_of_scenes(archive, store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(archive, tmp_path / "begun", observer=Watching(interrupt_after=1))
    with pytest.raises(ArchiveError, match="b: accepted then, one block of it decodes to"):
        run(archive, tmp_path / "begun", "run.max_block_bytes=10000")
    run(archive, tmp_path / "begun")
    assert_same_bytes(store, tmp_path / "begun")


def test_unreadable_scenes_are_quarantined_and_the_rest_is_done(archive, tmp_path):
    folder = tmp_path / "archive"
    save_scene(folder / "good.tif", textured((3, 64, 64)))
    (folder / "text.tif").write_text("not a raster")
    whole = (archive / "b.tif").read_bytes()
    (folder / "torn.tif").write_bytes(whole[: len(whole) * 2 // 3])
    report = run(folder, tmp_path / "store")
    assert (report.inputs, report.done, report.tiles) == (3, 1, 4)
    assert list(report.quarantined) == ["text", "torn"]
    assert "not recognized" in report.quarantined["text"]
    assert report.quarantined["torn"]
    store = open_store(tmp_path / "store")
    assert store.quarantined() == report.quarantined
    assert {row["image"]["scene_ids"][0] for row in store.manifest.to_pylist()} == {"good"}
    again = run(folder, tmp_path / "store")
    assert again.quarantined == report.quarantined


def test_a_job_without_a_usable_scene_leaves_no_store(archive, tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    whole = (archive / "b.tif").read_bytes()
    (folder / "torn.tif").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ArchiveError, match="none of the 1 scenes can be used; the first, torn"):
        run(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_thresholds_of_the_default_rule_are_each_scenes_own(archive, tmp_path):
    plain = load_config(PreprocessConfig, None, ["store.tile_size_px=32", "run.workers=1"])
    run_job(str(archive), tmp_path / "store", plain, Watching())
    rows = open_store(tmp_path / "store").manifest.to_pylist()
    by_scene = {row["image"]["scene_ids"][0]: tuple(row["image"]["thresholds"][0]) for row in rows}
    assert len(by_scene) == len(set(by_scene.values())) == 3
    opened = open_store(tmp_path / "store")
    maps = [
        opened.tile(row["id"]).score_maps for row in rows if row["image"]["scene_ids"] == ["deep/c"]
    ]
    coarsest = np.concatenate([m[2].ravel() for m in maps])
    kept = np.mean(coarsest[~np.isnan(coarsest)] < by_scene["deep/c"][1])
    assert kept == pytest.approx(0.5, abs=0.15)


def test_the_default_rule_keeps_15_to_80_percent_of_each_satclip_scene(satclip, tmp_path):
    for name, preset in (("plain", None), ("preset", "s2_l2a")):
        config = load_config(PreprocessConfig, None, ["run.workers=1"], preset)
        run_job(str(satclip), tmp_path / name, config, Watching())
        store = open_store(tmp_path / name)
        modality = store.modalities[0]
        kept: dict[str, list[int]] = {}
        for row in store.manifest.to_pylist():
            counts = kept.setdefault(row[modality]["scene_ids"][0], [0, 0])
            counts[0] += sum(row[modality]["tokens"])
            counts[1] += row[modality]["base_cells"]
        assert len(kept) == 4
        assert all(0.15 <= tokens / cells <= 0.80 for tokens, cells in kept.values()), kept


def test_missing_leaves_cost_no_token(store):
    opened = open_store(store)
    tile = opened.tile("a/r1c2")
    missing = segments.is_missing(tile.scales[0])
    row = opened.manifest.to_pylist()[opened.tile_index("a/r1c2")]
    assert missing.any()
    assert sum(row["image"]["tokens"]) == np.count_nonzero(~missing)
