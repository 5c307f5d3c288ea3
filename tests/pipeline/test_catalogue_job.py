"""Jobs over catalogues: what is stated is planned with, what the files say decides in the end."""

import hashlib

import numpy as np
import pytest
import yaml

from pipeline import open_store
from pipeline.jobs.job import run_job
from pipeline.planning.inputs import plan_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from stac_catalogues import item_of, write_collection, write_parquet, write_rasters
from support import Watching, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")

SECTIONS = {
    "modality": {"name": "s2", "bands": ["B02", "B03"], "value_range": [0, 10_000]},
    "store": {"tile_size_px": 16},
    "run": {"workers": 1},
}


@pytest.fixture
def config(tmp_path):
    def load(**modality):
        file = tmp_path / "config.yaml"
        sections = {**SECTIONS, "modality": {**SECTIONS["modality"], **modality}}
        file.write_text(yaml.safe_dump(sections))
        return load_config(PreprocessConfig, file)

    return load


def dated(name, day, **properties):
    return item_of(name, datetime=f"2023-07-{day:02}T10:00:00Z", **properties)


@pytest.mark.parametrize("write", [write_collection, write_parquet])
def test_a_catalogue_that_states_everything_is_planned_without_opening_a_raster(
    tmp_path, config, monkeypatch, write
):
    name = "items.json" if write is write_collection else "items.parquet"
    catalogue = write(tmp_path / "archive" / name, [dated("a", 1), dated("b", 2)])
    job = plan_job(str(catalogue), config())
    assert len(job.plan.tiles) == 2
    (stack,) = job.plan.stacks
    assert (len(stack.datetimes), job.refused) == (2, {})


def test_the_files_behind_a_catalogue_become_a_store(tmp_path, config):
    folder = tmp_path / "archive"
    for name in ("a", "b"):
        write_rasters(folder, name)
    catalogue = write_collection(folder / "items.json", [dated("a", 1), dated("b", 2)])
    report = run_job(str(catalogue), tmp_path / "store", config(), Watching())
    assert (report.done, report.tiles) == (2, 2)
    store = open_store(tmp_path / "store")
    tile = store.tile(store.manifest["id"][0].as_py())
    image = np.concatenate([textured((1, 16, 24), band) for band in (0, 1)])
    for frame in range(2):
        np.testing.assert_array_equal(tile.pixels[frame], image[:, :, :16])
    assert store.header["modalities"]["s2"]["offset"] == -0.1


def test_scenes_that_contradict_their_catalogue_are_quarantined_with_both_values(tmp_path, config):
    folder = tmp_path / "archive"
    items = [
        dated(name, day) for day, name in enumerate(["size", "type", "nodata", "sum", "gone"], 1)
    ]
    for name in ("good", "size", "type", "nodata", "sum"):
        write_rasters(folder, name)
    save_scene(folder / "size_B02.tif", textured((1, 16, 20)), nodata=0)
    save_scene(folder / "type_B02.tif", textured((1, 16, 24), dtype="int16"), nodata=0)
    save_scene(folder / "nodata_B02.tif", textured((1, 16, 24)), nodata=7)
    stated = hashlib.sha256(b"another file").hexdigest()
    items[3]["assets"]["B03"]["file:checksum"] = f"1220{stated}"
    catalogue = write_collection(folder / "items.json", [*items, dated("good", 9)])
    report = run_job(str(catalogue), tmp_path / "store", config(), Watching())
    assert (report.inputs, report.done) == (6, 1)
    reasons = report.quarantined
    assert "16 x 20 px" in reasons["size"]
    assert "16 x 24 px" in reasons["size"]
    assert "int16" in reasons["type"]
    assert "uint16" in reasons["type"]
    assert "7" in reasons["nodata"]
    assert "0" in reasons["nodata"]
    assert stated in reasons["sum"]
    assert "gone_B02.tif" in reasons["gone"]


def test_nodata_that_only_the_file_states_counts(tmp_path, config):
    folder = tmp_path / "archive"
    image = textured((1, 16, 24))
    image[:, :5] = 0
    for band in ("B02", "B03"):
        save_scene(folder / f"a_{band}.tif", image, nodata=0)
    item = dated("a", 1)
    for asset in item["assets"].values():
        for band in asset.get("raster:bands", []):
            del band["nodata"]
    catalogue = write_collection(folder / "items.json", [item])
    run_job(str(catalogue), tmp_path / "store", config(), Watching())
    tile = open_store(tmp_path / "store").tile("31UFU/r0c0")
    np.testing.assert_array_equal(tile.valid[0], image[0, :, :16] != 0)


def test_the_configured_nodata_wins_over_the_catalogue(tmp_path, config):
    write_rasters(tmp_path / "archive", "a")
    catalogue = write_collection(tmp_path / "archive" / "items.json", [dated("a", 1)])
    job = plan_job(str(catalogue), config(nodata=5))
    (scene,) = job.plan.modalities["s2"].scenes
    assert {plane.nodata for asset in scene.assets for plane in asset.planes} == {5}


def test_a_mask_that_no_scene_has_is_asked_for_in_vain(tmp_path, config):
    write_rasters(tmp_path / "archive", "a")
    catalogue = write_collection(tmp_path / "archive" / "items.json", [dated("a", 1)])
    with pytest.raises(ValueError, match=r"(?i)mask|scl"):
        plan_job(str(catalogue), config(mask={"band": "scl", "cloud": [8, 9]}))
