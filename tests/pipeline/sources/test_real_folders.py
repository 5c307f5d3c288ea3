"""What real folders come to, as their files say it."""

import pytest

from pipeline.scenes import Listing
from pipeline.settings.modality import ModalityConfig
from pipeline.settings.run import RunConfig
from pipeline.sources import archive_access, list_scenes, source_files


def listed(archive, **modality) -> Listing:
    config, access = ModalityConfig(**modality), archive_access(str(archive), RunConfig())
    listing = list_scenes(str(archive), config, access)
    assert source_files(str(archive), config, access) == listing.files
    assert (listing.refused, listing.skipped) == ({}, {})
    return listing


def test_a_time_series_whose_bands_are_described(real_data):
    qa60 = {"band": "QA60", "kind": "bits", "cloud": [10, 11]}
    bands = ["B8A", "B2"]
    listing = listed(real_data / "ravaen", pattern="{tile}/{date}.tif", bands=bands, mask=qa60)
    assert [(s.place, s.datetime[:10]) for s in listing.scenes] == [
        *(("LAHINCH", f"2017-{day}") for day in ("09-18", "09-21", "09-26", "10-08", "10-18")),
        *(("WATERVILLE", f"2017-{day}") for day in ("09-13", "09-21", "10-08", "10-11", "10-18")),
    ]
    for scene in listing.scenes:
        assert [(p.band, p.key) for p in scene.assets[0].planes] == [("B8A", 8), ("B2", 1)]
        assert scene.mask.planes[0].key == 13
        assert scene.mask.href == scene.assets[0].href


@pytest.mark.parametrize(
    ("source", "num_bands", "dtype", "tag", "datetimes"),
    [
        ("S2L1C", 13, "int16", None, [None, None]),
        ("S2L2A", 12, "int16", None, [None, None]),
        ("S1RTC", 2, "float64", "datetime", ["2020-04-11T23:43:09Z", "2017-10-30T05:32:30Z"]),
        ("DEM", 1, "int16", None, [None, None]),
        ("LULC", 1, "uint8", "datetime", ["2020-04-08T14:37:29Z", "2017-10-30T10:41:51Z"]),
    ],
)
def test_modalities_in_folders_of_their_own(real_data, source, num_bands, dtype, tag, datetimes):
    dates = {"tag": tag} if tag else None
    scenes = listed(
        real_data / "terramind", source=source, pattern="{tile}.tif", dates=dates
    ).scenes
    assert [scene.id for scene in scenes] == [f"{source}/433D_629L_3_1", f"{source}/637U_59R_1_3"]
    assert [scene.place for scene in scenes] == ["433D_629L_3_1", "637U_59R_1_3"]
    assert [scene.datetime for scene in scenes] == datetimes
    for scene, crs in zip(scenes, ("EPSG:32718", "EPSG:32632"), strict=True):
        (asset,) = scene.assets
        assert (len(asset.planes), asset.dtype) == (num_bands, dtype)
        assert (asset.grid.height, asset.grid.width, asset.grid.crs) == (224, 224, crs)


def test_a_scene_and_its_cloud_mask(real_data):
    mask = {"source": "cl_mask.tif", "cloud": [1]}
    (scene,) = listed(real_data / "s2cloudless", bands=["B10", "B8A"], mask=mask).scenes
    assert [plane.key for plane in scene.assets[0].planes] == [10, 8]
    assert scene.assets[0].grid.crs is None
    assert scene.mask.href.endswith("cl_mask.tif")
    assert scene.mask.grid == scene.assets[0].grid


def test_bands_without_telling_descriptions_count_in_file_order(satclip):
    bands = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    for scene in listed(satclip, bands=bands).scenes:
        assert [(p.band, p.key) for p in scene.assets[0].planes] == list(zip(bands, range(12)))  # noqa: B905


def test_photographs_with_their_class_as_the_folder(real_data):
    scenes = listed(real_data / "eurosat_rgb/[FR]*/*", pattern="{label}/*.jpg").scenes
    assert len(scenes) == 750
    assert {scene.label for scene in scenes} == {"Forest", "River", "Residential"}
    assert all(scene.label == scene.id.partition("/")[0] for scene in scenes)
    assert {len(scene.assets[0].planes) for scene in scenes} == {3}
