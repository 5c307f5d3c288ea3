"""What becomes of pixels on their way into a store: masks, borders, baselines, ranges, other grids."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from affine import Affine

from pipeline import open_store
from pipeline.jobs.job import run_job
from pipeline.planning.inputs import plan_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from support import Watching, save_scene, textured

TILE = {"store": {"tile_size_px": 64}, "run": {"workers": 1}}

pytestmark = pytest.mark.usefixtures("kept_workers")


@pytest.fixture
def preprocess(tmp_path):
    """`preprocess(section=...)` of tmp_path/archive: the open store and the report."""

    def run(**sections):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({**TILE, **sections}))
        config = load_config(PreprocessConfig, file)
        report = run_job(str(tmp_path / "archive"), tmp_path / "store", config, Watching())
        return open_store(tmp_path / "store"), report

    return run


def only_row(store):
    (row,) = store.manifest.to_pylist()
    return row


@pytest.mark.parametrize(("metres", "shape"), [(10, (64, 64)), (20, (32, 32)), (5, (128, 128))])
def test_a_mask_file_of_any_resolution_removes_clouds(
    write_scene, tmp_path, preprocess, metres, shape
):
    write_scene("a.tif", textured((2, 64, 64)))
    classes = np.zeros((1, *shape), np.uint8)
    classes[:, : shape[0] // 2] = 9
    classes[:, :, : shape[1] // 4] = 1
    grid = Affine(metres, 0, 500_000, 0, -metres, 5_000_000)
    save_scene(tmp_path / "masks" / "a.tif", classes, transform=grid)
    mask = {"source": str(tmp_path / "masks"), "cloud": [8, 9], "invalid": [1]}
    run = {**TILE["run"], "allow": [str(tmp_path / "masks")]}
    store, _ = preprocess(modality={"mask": mask, "value_range": [0, 10_000]}, run=run)
    row, tile = only_row(store), store.tile("a/r0c0")
    expected = np.ones((64, 64), bool)
    expected[:32] = False
    expected[:, :16] = False
    np.testing.assert_array_equal(tile.valid[0], expected)
    assert row["image"]["cloud_fraction"] == [0.5 * 0.75]
    assert row["image"]["nodata_fraction"] == [0]
    assert row["image"]["valid_fraction"] == [0.5 * 0.75]
    assert np.isnan(tile.score_maps[0][0][:8]).all()


def test_clouds_may_be_counted_without_being_removed(write_scene, preprocess):
    image = textured((3, 64, 64)).astype("float32")
    image[2] = 0
    image[2, :16] = 80
    image[0, :8] = np.nan
    write_scene("a.tif", image)
    mask = {"band": "cloud", "kind": "probability", "cloud_above": 60, "remove_clouds": False}
    bands = {"bands": ["r", "g"], "assets": {"r": "1", "g": "2", "cloud": "3"}}
    store, _ = preprocess(modality={**bands, "mask": mask, "value_range": [0, 10_000]})
    row = only_row(store)
    assert store.layouts["image"].bands == ("r", "g")
    assert row["image"]["cloud_fraction"] == [8 / 64]
    assert row["image"]["nodata_fraction"] == [8 / 64]
    assert row["image"]["valid_fraction"] == [56 / 64]


def test_a_zero_border_is_invalid_and_zeros_inside_are_not(write_scene, preprocess):
    image = textured((2, 100, 100))
    image[:, :30] = 0
    image[:, 60:64, 60:64] = 0
    image[0, 90:] = 0
    write_scene("a.tif", image)
    store, _ = preprocess(modality={"zero_border": True, "value_range": [0, 10_000]})
    assert not store.tile("a/r0c0").valid[0, :30].any()
    assert store.tile("a/r0c0").valid[0, 30:].all()
    assert store.tile("a/r1c1").valid[0, :36, :36].all()


BASELINE = {
    "bands": ["b1", "b2"],
    "scale": 0.0001,
    "value_range": [0, 10_000],
    "baseline": {"since": "04.00", "offset": -0.1},
    "pattern": "{tile}_{date}_N{baseline}.tif",
    "nodata": 0,
}


def offset_archive(write_scene):
    """The same ground before and since the baseline that adds 1000."""
    ground = np.clip(textured((2, 64, 64), dtype="int32") - 500, 1, None).astype("uint16")
    ground[:, :4] = 1
    write_scene("p_20210101_N0301.tif", ground)
    write_scene("p_20230101_N0400.tif", ground + np.uint16(1000))
    return ground


def test_scenes_of_two_baselines_agree_in_pixels_scores_and_range(write_scene, preprocess):
    ground = offset_archive(write_scene)
    store, report = preprocess(modality=BASELINE, partition={"thresholds": [1.5, 2.5]})
    entry = store.header["modalities"]["image"]
    assert report.quarantined == {}
    assert (entry["scale"], entry["offset"]) == (0.0001, -0.1)
    assert entry["value_range"] == [[1000, 11_000]] * 2
    tile = store.tile("p/r0c0")
    np.testing.assert_array_equal(tile.pixels[0], ground + 1000)
    np.testing.assert_array_equal(tile.pixels[0], tile.pixels[1])
    for maps in tile.score_maps:
        np.testing.assert_array_equal(maps[0], maps[1])
    assert report.findings == {}
    rows = store.history.ledgers[0].scenes
    assert [(row["baseline"], row["shift"]) for row in rows] == [("03.01", 1000), ("04.00", 0)]


@pytest.mark.parametrize("what", ["report", "refuse"])
def test_a_baseline_that_the_pixels_contradict(write_scene, preprocess, what):
    ground = np.clip(textured((2, 64, 64)), 1, None)
    ground[:, :10] = 20
    write_scene("p_20210101_N0400.tif", ground)
    write_scene("p_20220101_N0400.tif", np.clip(ground, 1000, None))
    baseline = {**BASELINE["baseline"], "on_disagreement": what}
    store, report = preprocess(modality={**BASELINE, "baseline": baseline})
    said = report.findings if what == "report" else report.quarantined
    assert list(said) == ["p_20210101_N0400"]
    assert "which adds 1000, but percentile 1 of its numbers is 20" in said["p_20210101_N0400"]
    assert only_row(store)["image"]["missing"][0] == (None if what == "report" else "quarantined")


def test_estimated_ranges_are_stored_with_what_they_come_from(write_scene, preprocess):
    image = textured((2, 64, 64))
    image[1] = 7
    write_scene("a.tif", image)
    store, _ = preprocess()
    entry = store.header["modalities"]["image"]
    first = entry["statistics"]["band_1"]
    assert (first["count"], first["min"], first["max"]) == (64 * 64, image[0].min(), image[0].max())
    assert first["mean"] == pytest.approx(image[0].mean())
    assert entry["value_range"] == [[first["p01"], first["p99"]], [7, 8]]


def test_a_scene_on_another_grid_is_resampled_onto_its_place(write_scene, preprocess):
    """Shifted by exactly two pixels: bilinear then is a copy, and the strip beyond has no data."""
    image = textured((1, 64, 64))
    write_scene("p_20200101.tif", image)
    shifted = Affine(10, 0, 500_020, 0, -10, 5_000_000)
    write_scene("p_20200102.tif", image, transform=shifted)
    modality = {"pattern": "{tile}_{date}.tif", "value_range": [0, 10_000]}
    store, _ = preprocess(modality=modality, grid={"warp": True})
    tile = store.tile("p/r0c0")
    np.testing.assert_array_equal(tile.pixels[1][:, :, 2:], image[:, :, :-2])
    assert tile.valid[1, :, 2:].all()
    assert not tile.valid[1, :, :2].any()
    assert only_row(store)["image"]["nodata_fraction"] == [0, 2 / 64]
    assert [row["resampling"] for row in store.history.ledgers[0].scenes] == [None, "bilinear"]


def test_without_permission_it_is_refused_with_both_grids(write_scene, preprocess):
    write_scene("p_20200101.tif", textured((1, 64, 64)))
    shifted = Affine(10, 0, 500_020, 0, -10, 5_000_000)
    write_scene("p_20200102.tif", textured((1, 64, 64)), transform=shifted)
    _, report = preprocess(modality={"pattern": "{tile}_{date}.tif"})
    (reason,) = report.quarantined.values()
    assert "origin (500020, 5000000)" in reason
    assert "origin (500000, 5000000)" in reason


def test_a_scene_that_changes_while_the_job_runs_is_quarantined(write_scene, tmp_path, preprocess):
    write_scene("good.tif", textured((1, 64, 64)))
    path = write_scene("late.tif", textured((1, 64, 64)))

    class Overwriting(Watching):
        def planned(self, plan, done_tiles):
            save_scene(path, textured((1, 64, 64), 5), compress="lzw")

    config = load_config(
        PreprocessConfig, None, ["run.workers=1", "modality.value_range=[0, 9999]"]
    )
    store = tmp_path / "store"
    report = run_job(str(tmp_path / "archive"), store, config, Overwriting())
    assert list(report.quarantined) == ["late"]
    assert "was changed since the job was planned" in report.quarantined["late"]


def test_paths_may_lead_upwards(write_scene, tmp_path, monkeypatch):
    write_scene("a.tif", textured((1, 64, 64)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(PreprocessConfig, None, ["run.workers=1"])
    run_job("../archive", Path("../store"), config, Watching())
    assert open_store("../elsewhere/../store").tile("a/r0c0").valid.sum() == 64 * 64


def test_planning_reads_no_pixels(write_scene, tmp_path, monkeypatch):
    write_scene("a.tif", textured((1, 64, 64)))

    def never(*_, **__):
        raise AssertionError("a pixel was read")

    monkeypatch.setattr("pipeline.readers.rasters.RasterReader.read", never)
    job = plan_job(str(tmp_path / "archive"), load_config(PreprocessConfig, None))
    assert len(job.plan.tiles) == 1
