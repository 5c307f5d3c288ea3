"""Stores of several modalities, dates and resolutions, held against the files they come from."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
import yaml

from model import TileDataset
from pipeline import open_store, segments
from pipeline.jobs.job import run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from sentinels import CONFIG, DATES, PLACES, make_archive
from support import Watching, aptile, assert_same_bytes, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("modalities") / "archive")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(CONFIG)
    return lambda *more: load_config(PreprocessConfig, file, ["run.workers=1", *more])


@pytest.fixture(scope="module")
def store(archive, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "one"
    report = run_job(str(archive), path, settings(), Watching())
    assert (report.inputs, report.quarantined, report.skipped) == (5 + 2 + 2 + 1, {}, {})
    assert (report.tiles, report.shards) == (2 * 3 + 1, 4)
    return open_store(path)


def raster(path):
    with rasterio.open(path) as file:
        return file.read()


def inside(image, tile, row, col):
    """The tile's part of a whole image [band, y, x], and where it lies in the tile."""
    part = image[:, row * tile : (row + 1) * tile, col * tile : (col + 1) * tile]
    return part, np.s_[:, : part.shape[1], : part.shape[2]]


def tiles_of(store):
    for row in store.manifest.to_pylist():
        yield row["id"], row["place"], row["row"], row["col"], row


SETS = (("", ("B02", "B03"), 96), ("20m", ("B05",), 48), ("60m", ("B09",), 16))


def test_every_band_of_every_date_is_in_the_store_on_its_own_grid(archive, store):
    for tile_id, place, row, col, _ in tiles_of(store):
        tile = store.tile(tile_id, "s2")
        for frame, timestep in enumerate(tile.timesteps.tolist()):
            date = tile.datetimes[timestep].strftime("%Y%m%d")
            for name, bands, size in SETS:
                pixels, valid = (tile.pixels, tile.valid) if not name else tile.further[name]
                files = [archive / "s2" / f"{place}_{date}_{band}.tif" for band in bands]
                image, there = inside(np.concatenate([raster(f) for f in files]), size, row, col)
                np.testing.assert_array_equal(pixels[frame][there], image)
                np.testing.assert_array_equal(valid[frame][there[1:]], (image != 0).all(0))
                assert valid[frame].sum() == (image != 0).all(0).sum()


def test_other_modalities_are_what_their_files_hold(archive, store):
    for tile_id, place, row, col, _ in tiles_of(store):
        radar = store.tile(tile_id, "s1")
        image, there = inside(raster(archive / "s1" / f"{place}_{DATES[1]}.tif"), 96, row, col)
        assert radar.pixels.dtype == np.float64
        assert radar.timesteps.tolist() == [1]
        np.testing.assert_array_equal(radar.pixels[0][there], image)
        ground = store.tile(tile_id, "dem")
        image, there = inside(raster(archive / "dem" / f"{place}.tif"), 48, row, col)
        np.testing.assert_array_equal(ground.pixels[0][there], image)
        assert ground.score_maps == []
    classes = store.tile("south/r0c0", "classes")
    np.testing.assert_array_equal(classes.pixels[0], raster(archive / "classes" / "south.tif"))
    np.testing.assert_array_equal(classes.valid[0], classes.pixels[0][0] != 255)
    assert classes.scales == []
    assert len(store.tile("north/r0c0", "classes").pixels) == 0


def test_what_is_missing_is_explicit_and_costs_no_token(store):
    north, south = (next(r for r in store.manifest.to_pylist() if r["place"] == p) for p in PLACES)
    assert [when.strftime("%Y%m%d") for when in north["datetimes"]] == list(DATES)
    assert [slot is None for slot in north["s2"]["frames"]] == [False, True, False]
    assert north["s2"]["missing"] == [None, "no scene", None]
    assert north["s2"]["scene_ids"] == ["s2:s2/north_20200101", None, "s2:s2/north_20200111"]
    assert north["s2"]["thresholds"][1] is north["s2"]["valid_fraction"][1] is None
    assert [slot is None for slot in south["s2"]["frames"]] == [False, False, False]
    assert south["s1"]["missing"] == ["no scene", None, "no scene"]
    assert len(north["dem"]["frames"]) == len(north["classes"]["frames"]) == 1
    assert north["classes"]["missing"] == ["no scene"]
    assert "tokens" not in north["classes"]
    tile = store.tile("north/r0c0", "s2")
    tokens = sum(int((~segments.is_missing(scales)).sum()) for scales in tile.scales)
    assert sum(north["s2"]["tokens"]) == tokens


def test_uniform_modalities_have_one_token_per_valid_patch(store):
    tile = store.tile("north/r1c2", "dem")
    (scales,) = tile.scales
    present = ~segments.is_missing(scales)
    blocks = tile.valid[0].reshape(6, 8, 6, 8).any((1, 3))
    np.testing.assert_array_equal(present, blocks.ravel())
    assert segments.levels(scales).max() == 0


def test_the_header_says_what_each_modality_is(store):
    entry = store.header["modalities"]
    assert list(entry) == ["s2", "s1", "dem", "classes"]
    assert [s["name"] for s in entry["s2"]["band_sets"]] == ["", "20m", "60m"]
    assert entry["s2"]["ground_sample_distance_m"] == 10
    assert entry["dem"]["ground_sample_distance_m"] == 20
    assert entry["s1"]["value_range"] == [[-30, 0]] * 2
    low, high = entry["dem"]["value_range"][0]
    assert (entry["dem"]["statistics"]["band_1"]["p01"], low < high) == (low, True)
    assert (entry["classes"]["kind"], entry["classes"]["ignore_index"]) == ("label", 255)
    assert store.tokenized == ["s2", "s1", "dem"]


def test_xarray_opens_every_resolution_side_by_side(store):
    dataset = xr.open_zarr(Path(store.location), group="s2")
    assert dataset["pixels_20m"].dims == ("frame", "band_20m", "y_20m", "x_20m")
    assert (dataset.sizes["y"], dataset.sizes["y_20m"], dataset.sizes["y_60m"]) == (96, 48, 16)
    assert dataset.attrs["bands_60m"] == ["B09"]


@pytest.mark.parametrize("modality", ["s2", "s1", "dem"])
def test_a_dataset_packs_the_frames_there_are(store, modality):
    dataset = TileDataset(store, modalities={modality: [""]})
    batch = dataset.batch(np.arange(len(dataset)))
    tokens = [sum(row[modality]["tokens"]) for row in store.manifest.to_pylist()]
    assert batch.cu_seqlens.diff().tolist() == tokens
    steps = [t for row in store.manifest.to_pylist()
             for t, slot in enumerate(row[modality]["frames"]) if slot is not None]  # fmt: skip
    assert batch.modalities[0].timestep.tolist() == steps


def test_the_bytes_do_not_depend_on_workers_or_interruptions(archive, settings, store, tmp_path):
    run_job(str(archive), tmp_path / "two", settings("run.workers=2"), Watching())
    assert_same_bytes(Path(store.location), tmp_path / "two")
    with pytest.raises(KeyboardInterrupt):
        run_job(str(archive), tmp_path / "again", settings(), Watching(interrupt_after=2))
    run_job(str(archive), tmp_path / "again", settings(), Watching())
    assert_same_bytes(Path(store.location), tmp_path / "again")


def test_one_modality_is_repartitioned_on_its_own(archive, settings, tmp_path, capsys):
    run_job(str(archive), tmp_path / "store", settings(), Watching())
    command = ("repartition", tmp_path / "store", "--name", "lean", "--tokens-per-tile", 40)
    assert aptile(*command, "--modality", "s1") == 0
    opened = open_store(tmp_path / "store")
    assert (opened.partitions("s1"), opened.partitions("s2")) == (["default", "lean"], ["default"])
    assert aptile("inspect", tmp_path / "store", "--partition", "lean", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["modality"], content["tokens_per_tile"]["max"]) == ("s1", 40)
    assert aptile(*command, "--modality", "dem") == 2
    assert "modality dem of" in (complaint := capsys.readouterr().err)
    assert "those with scores: s2, s1" in complaint


def test_a_scene_that_cannot_be_read_costs_its_frames_and_nothing_else(tmp_path, settings):
    folder = make_archive(tmp_path / "archive")
    torn = folder / "s2" / f"south_{DATES[1]}_B05.tif"
    good = torn.read_bytes()
    report = run_job(str(folder), tmp_path / "whole", settings(), Watching())
    torn.write_bytes(good[: len(good) // 2])
    report = run_job(str(folder), tmp_path / "store", settings(), Watching())
    assert list(report.quarantined) == ["s2:s2/south_20200106"]
    assert (report.inputs, report.done, report.tiles) == (10, 9, 7)
    (row,) = (
        r for r in open_store(tmp_path / "store").manifest.to_pylist() if r["place"] == "south"
    )
    assert row["s2"]["frames"][1] is None
    assert row["s2"]["missing"][1] in {"quarantined", "no scene"}
    whole, rest = (
        open_store(tmp_path / name).tile("south/r0c0", "s2") for name in ("whole", "store")
    )
    np.testing.assert_array_equal(rest.pixels, whole.pixels[[0, 2]])


def test_frames_and_tiles_with_few_valid_pixels_are_left_out_and_counted(tmp_path):
    half = textured((1, 64, 64))
    half[:, 20:] = 0
    save_scene(tmp_path / "archive" / "p_20200101.tif", textured((1, 64, 64), 1), nodata=0)
    save_scene(tmp_path / "archive" / "p_20200102.tif", half, nodata=0)
    save_scene(tmp_path / "archive" / "q_20200101.tif", half, nodata=0)
    common = {
        "modality": {"pattern": "{tile}_{date}.tif", "value_range": [0, 10_000]},
        "store": {"tile_size_px": 64},
        "run": {"workers": 1},
    }
    for name, validity, tiles, left_out in (
        ("all", {}, 2, (0, 0)),
        ("frames", {"min_frame_valid_fraction": 0.5}, 1, (0, 2)),
        ("tiles", {"min_tile_valid_fraction": 0.5}, 1, (1, 1)),
    ):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**common, "validity": validity}))
        config = load_config(PreprocessConfig, file)
        report = run_job(str(tmp_path / "archive"), tmp_path / name, config, Watching())
        assert (report.tiles, (report.tiles_left_out, report.frames_left_out)) == (tiles, left_out)
    row = open_store(tmp_path / "frames").manifest.to_pylist()[0]
    assert (row["place"], row["image"]["missing"]) == ("p", [None, "too few valid pixels"])
    assert (open_store(tmp_path / "frames").per_frame("image", "num_valid") > 0).sum() == 1
    row = open_store(tmp_path / "tiles").manifest.to_pylist()[0]
    assert (row["place"], row["image"]["missing"]) == ("p", [None, None])
