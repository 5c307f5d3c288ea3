"""One STAC item as a scene: which asset is which band, and what the catalogue states."""

import json
import math
from pathlib import Path

import pytest
from rasterio.crs import CRS

from pipeline.errors import SceneError
from pipeline.scenes import Access, Plane, Scene
from pipeline.settings.modality import MaskConfig, ModalityConfig
from pipeline.sources.stac_items import drafted, finished, wanted_of
from pipeline.sources.stac_links import Hrefs
from stac_catalogues import MODALITY, access_to, item_of, newer

ROOT = "https://data.example/scenes"


def scene_of(
    item, modality: ModalityConfig = MODALITY, access: Access | None = None
) -> Scene | None:
    """The scene of an item beside which its rasters lie; None if it is of another kind."""
    hrefs = Hrefs(access or access_to(ROOT))
    draft = drafted(json.loads(json.dumps(item)), ROOT, wanted_of(modality), modality.name, hrefs)
    return None if draft is None else finished(draft, {})


def draft_of(item, modality: ModalityConfig = MODALITY):
    return drafted(item, ROOT, wanted_of(modality), modality.name, Hrefs(access_to(ROOT)))


def modality(*bands: str, **options) -> ModalityConfig:
    return ModalityConfig(name="s2", bands=bands, **options)


def multi_band(name: str = "data", bands=("blue", "green", "nir")) -> dict:
    """An item with one file of several bands, named by common name."""
    item = item_of("one", bands=())
    asset = {**item_of("x", bands=("B02",))["assets"]["B02"], "href": "one.tif"}
    asset["eo:bands"] = [
        {"name": f"band{n}", "common_name": band} for n, band in enumerate(bands, 1)
    ]
    asset["raster:bands"] = [
        {"data_type": "int16", "nodata": -n, "scale": 0.5 * n} for n in range(1, len(bands) + 1)
    ]
    item["assets"] = {name: asset, "preview": {"href": "preview.tif"}}
    return item


def test_both_versions_of_stac_say_the_same():
    assert scene_of(newer(item_of("one"))) == scene_of(item_of("one"))


def test_facts_of_all_bands_may_stand_beside_the_list():
    item = newer(item_of("one"))
    for asset in item["assets"].values():
        for field in ("data_type", "nodata", "raster:scale", "raster:offset"):
            if "bands" in asset:
                asset[field] = asset["bands"][0].pop(field)
    assert scene_of(item) == scene_of(item_of("one"))


def test_facts_of_all_assets_may_stand_in_the_properties():
    item = item_of("one")
    for asset in item["assets"].values():
        for field in ("proj:shape", "proj:transform"):
            if field in asset:
                item["properties"][field] = asset.pop(field)
    assert scene_of(item) == scene_of(item_of("one"))


@pytest.mark.parametrize(
    ("own", "shared", "complete"),
    [
        ({"proj:shape": [8, 12]}, {"proj:shape": [16, 24], "proj:transform": [10, 0, 0, 0, -10, 0]}, False),
        ({"proj:shape": [8, 12]}, {"proj:transform": [10, 0, 0, 0, -10, 0]}, True),
        ({"proj:transform": [20, 0, 0, 0, -20, 0]}, {"proj:shape": [8, 12]}, True),
        (
            {"proj:transform": [20, 0, 0, 0, -20, 0]},
            {"proj:shape": [16, 24], "proj:transform": [10, 0, 0, 0, -10, 0]},
            False,
        ),
    ],
)  # fmt: skip
def test_half_a_grid_of_another_resolution_is_not_completed(own, shared, complete):
    item = item_of("one", **shared)
    for field in ("proj:shape", "proj:transform"):
        del item["assets"]["B02"][field]
    item["assets"]["B02"].update(own)
    assert draft_of(item).assets[0].complete == complete


@pytest.mark.parametrize("ending", [[], [0, 0, 1]])
def test_transforms_have_six_or_nine_numbers(ending):
    item = item_of("one")
    for band in ("B02", "B03"):
        item["assets"][band]["proj:transform"] += ending
    assert scene_of(item) == scene_of(item_of("one"))


@pytest.mark.parametrize(
    "crs",
    [
        {"proj:code": "EPSG:32632"},
        {"proj:code": "epsg:32632"},
        {"proj:code": "EPSG:32632", "proj:epsg": 32632},
        {"proj:epsg": 32632.0},
        {"proj:epsg": None, "proj:wkt2": CRS.from_epsg(32632).to_wkt(version="WKT2_2019")},
        {"proj:code": None, "proj:projjson": CRS.from_epsg(32632).to_dict(projjson=True)},
        {"proj:projjson": json.dumps(CRS.from_epsg(32632).to_dict(projjson=True))},
    ],
)
def test_every_way_to_name_a_crs(crs):
    item = item_of("one")
    del item["properties"]["proj:epsg"]
    item["properties"].update(crs)
    assert scene_of(item).assets[0].grid.crs == "EPSG:32632"


@pytest.mark.parametrize("field", ["proj:code", "proj:wkt2", "proj:projjson"])
def test_a_crs_is_never_read_from_a_file(field, tmp_path: Path, monkeypatch):
    (tmp_path / "CRS.TXT").write_text(CRS.from_epsg(32632).to_wkt())
    monkeypatch.chdir(tmp_path)
    assert CRS.from_user_input("CRS.TXT") == CRS.from_epsg(32632)
    item = item_of("one", **{"proj:epsg": None, field: "CRS.TXT"})
    with pytest.raises(SceneError, match=f"has {field} 'CRS.TXT'; expected a known CRS"):
        scene_of(item)


def test_a_crs_of_the_asset_counts_before_that_of_the_item():
    item = item_of("one")
    item["assets"]["B03"]["proj:epsg"] = 32633
    assert [a.grid.crs for a in scene_of(item).assets] == ["EPSG:32632", "EPSG:32633"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("proj:code", "/etc/passwd", "has proj:code '/etc/passwd'; expected a known CRS"),
        ("proj:code", "http://127.0.0.1:9/crs", "expected a known CRS"),
        ("proj:code", "EPSG:99999", "expected a known CRS"),
        ("proj:code", "EPSG:32633", "has proj:code 'EPSG:32633' and proj:epsg 32632"),
        ("proj:epsg", -4, "has proj:epsg -4"),
        ("proj:epsg", 32632.5, "has proj:epsg 32632.5"),
        ("proj:epsg", "32632", "has proj:epsg '32632'"),
        ("proj:shape", [0, 24], "expected rows and columns"),
        ("proj:shape", [16.5, 24], "expected rows and columns"),
        ("proj:shape", [16, 24, 1], "expected a list of numbers"),
        ("proj:shape", [10**40, 24], "expected rows and columns"),
        ("proj:transform", [10, 0, 0, 0, -10], "expected the six numbers"),
        ("proj:transform", [0, 10, 0, 0, 0, -10], "whose pixels have no area"),
        ("proj:transform", [10, 0, 0, 0, -10, 10**400], "expected the six numbers"),
        ("proj:transform", [10, 0, 0, 0, -10, math.inf], "whose pixels have no area"),
        ("proj:transform", [10, 0, 0, 0, -10, 0, 0, 0, 2], "end in 0, 0, 1"),
        ("datetime", "yesterday", "its date 'yesterday' cannot be read"),
        ("datetime", 20230701, "has datetime 20230701; expected a short text"),
        ("earthsearch:boa_offset_applied", "true", "expected true or false"),
        ("s2:processing_baseline", ["05.09"], "expected a short text"),
    ],
)
def test_wrong_properties_are_refused_with_their_value(field, value, reason):
    item = item_of("one")
    for band in ("B02", "B03"):
        item["assets"][band].pop(field, None)
    item["properties"][field] = value
    with pytest.raises(SceneError) as error:
        scene_of(item)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("data_type", "cfloat32", "has complex pixels (cfloat32); expected real numbers"),
        ("data_type", "float16", "has data_type 'float16'; expected one of float32"),
        ("data_type", 16, "has data_type 16"),
        ("nodata", "none", "has nodata 'none'; expected a number, nan, inf or -inf"),
        ("nodata", [0], "has a band whose nodata is [0]"),
        ("scale", 0, "scale 0"),
        ("scale", "x", "has scale 'x'"),
        ("offset", math.nan, "has offset nan"),
        ("offset", 10**400, "has offset a huge number"),
    ],
)
def test_wrong_bands_are_refused_with_their_value(field, value, reason):
    item = item_of("one")
    item["assets"]["B03"]["raster:bands"][0][field] = value
    with pytest.raises(SceneError, match=r"^asset 'B03' ") as error:
        scene_of(item)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("given", "found"), [("nan", math.nan), ("-inf", -math.inf), (None, None), (7, 7.0)]
)
def test_nodata_in_every_form(given, found):
    item = item_of("one")
    item["assets"]["B02"]["raster:bands"][0]["nodata"] = given
    assert scene_of(item).assets[0].planes[0].nodata == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize(
    ("scale", "offset", "pair"),
    [
        (2, None, (2.0, 0.0)),
        (None, -1, (1.0, -1.0)),
        (None, None, (None, None)),
        (2, 3, (2.0, 3.0)),
    ],
)
def test_scale_and_offset_come_together(scale, offset, pair):
    item = item_of("one")
    item["assets"]["B02"]["raster:bands"][0].update(scale=scale, offset=offset)
    plane = scene_of(item).assets[0].planes[0]
    assert (plane.scale, plane.offset) == pair


@pytest.mark.parametrize(("applied", "offset"), [(True, 0.0), (False, -0.1), (None, -0.1)])
def test_earth_search_says_whether_the_offset_is_still_in_the_numbers(applied, offset):
    item = item_of("one", **{"earthsearch:boa_offset_applied": applied})
    assert {a.planes[0].offset for a in scene_of(item).assets} == {offset}
    assert {a.planes[0].scale for a in scene_of(item).assets} == {0.0001}


@pytest.mark.parametrize(
    ("properties", "place"),
    [
        ({"grid:code": "MGRS-31UFU"}, "31UFU"),
        ({"grid:code": None, "s2:mgrs_tile": "05VMG"}, "05VMG"),
        ({"grid:code": "MGRS-5VMG"}, "05VMG"),
        (
            {"grid:code": None, "mgrs:utm_zone": 5, "mgrs:latitude_band": "V", "mgrs:grid_square": "MG"},
            "05VMG",
        ),
        ({"grid:code": "WRS2-097073"}, "WRS2-097073"),
        ({"grid:code": None}, None),
    ],
)  # fmt: skip
def test_the_tile_code_is_the_place(properties, place):
    assert scene_of(item_of("one", **properties)).place == place


@pytest.mark.parametrize(
    ("properties", "baseline"),
    [
        ({"s2:processing_baseline": "05.09"}, "05.09"),
        ({"s2:processing_baseline": 4.0}, "04.00"),
        ({"s2:processing_baseline": None, "processing:version": "04.00"}, "04.00"),
        ({"s2:processing_baseline": None}, None),
    ],
)
def test_the_processing_baseline(properties, baseline):
    assert scene_of(item_of("one", **properties)).baseline == baseline


@pytest.mark.parametrize(
    ("properties", "date"),
    [
        ({"datetime": "2023-07-01T12:00:00+02:00"}, "2023-07-01T10:00:00Z"),
        ({"datetime": None, "start_datetime": "2023-07-01T00:00:00Z"}, "2023-07-01T00:00:00Z"),
        ({"datetime": None}, None),
    ],
)
def test_the_date(properties, date):
    assert scene_of(item_of("one", **properties)).datetime == date


def test_the_fingerprint_is_the_checksum_else_size_and_update():
    item = item_of("one")
    item["assets"]["B02"].update({"file:checksum": "1220" + "AB" * 32, "file:size": 5})
    item["assets"]["B03"]["file:size"] = 12.0
    first, second = scene_of(item).assets
    assert (first.checksum, first.fingerprint) == ("1220" + "ab" * 32, "1220" + "ab" * 32)
    assert (second.checksum, second.fingerprint) == (None, "12-2023-07-02T01:49:17.191Z")
    item = item_of("one", updated=None)
    assert {asset.fingerprint for asset in scene_of(item).assets} == {"stated"}


@pytest.mark.parametrize("checksum", ["12 20", "xyz", "122", 1220, "", ["1220"]])
def test_a_checksum_that_is_none(checksum):
    item = item_of("one")
    item["assets"]["B02"]["file:checksum"] = checksum
    with pytest.raises(SceneError, match="expected a multihash in hex"):
        scene_of(item)


def test_bands_by_asset_key_whatever_its_case():
    assert scene_of(item_of("one"), modality("b02", "b03")).assets[1].planes[0].band == "b03"


def test_bands_by_the_configured_key():
    scene = scene_of(item_of("one"), modality("blue", "B03", assets={"blue": "B02"}))
    assert [a.planes[0].band for a in scene.assets] == ["blue", "B03"]
    assert scene_of(item_of("one"), ModalityConfig(name="s2", assets={"x": "B02"})).assets[
        0
    ].planes == (Plane("x", 0, 0.0, 0.0001, -0.1),)


def test_bands_by_the_names_and_common_names_a_catalogue_lists():
    item = item_of("one")
    item["assets"] = {f"asset {key}": asset for key, asset in item["assets"].items()}
    assert scene_of(item) == scene_of(item_of("one"))
    scene = scene_of(item, modality("Common_B03"))
    assert [a.href for a in scene.assets] == [f"{ROOT}/one_B03.tif"]


def test_a_file_of_several_bands_gives_several_planes():
    scene = scene_of(multi_band(), modality("nir", "blue"))
    (asset,) = scene.assets
    assert asset.planes == (Plane("nir", 2, -3.0, 1.5, 0.0), Plane("blue", 0, -1.0, 0.5, 0.0))
    assert asset.dtype == "int16"
    named = modality("red", assets={"red": "data"})
    with pytest.raises(
        SceneError, match=r"lists the bands .*; expected one of them to be named 'red'"
    ):
        scene_of(multi_band(), named)


def test_several_bands_in_a_file_that_lists_none():
    item = item_of("one")
    del item["assets"]["B02"]["eo:bands"], item["assets"]["B02"]["raster:bands"]
    with pytest.raises(
        SceneError, match=r"lists 0 bands, and \['red', 'nir'\] are all said to be in it"
    ):
        scene_of(item, modality("red", "nir", assets={"red": "B02", "nir": "B02"}))


def test_a_band_in_two_assets_names_both():
    item = item_of("one")
    item["assets"] = {"x": item["assets"]["B02"], "y": item["assets"]["B02"]}
    with pytest.raises(
        SceneError, match=r"offers 'B02' in the assets 'x', 'y'; .* modality\.assets"
    ):
        scene_of(item, modality("B02"))
    assert scene_of(item, modality("B02", assets={"B02": "y"})) is not None


def test_lists_of_bands_that_do_not_go_together():
    item = multi_band()
    item["assets"]["data"]["raster:bands"].pop()
    with pytest.raises(SceneError, match="lists 3 eo:bands and 2 raster:bands"):
        scene_of(item, modality("nir"))
    item = multi_band()
    item["assets"]["data"]["raster:bands"][0]["data_type"] = "uint8"
    with pytest.raises(SceneError, match=r"bands of several types \['int16', 'uint8'\]"):
        scene_of(item, modality("nir"))


def test_a_broken_asset_nobody_asked_for_does_no_harm():
    item = item_of("one")
    item["assets"]["thumbnail"].update({"eo:bands": [{"name": "x"}], "raster:bands": [{}, {}]})
    item["assets"]["nothing"] = 7
    assert scene_of(item) == scene_of(item_of("one"))


def test_the_mask_is_an_asset_of_its_own():
    item = item_of("one", **{"earthsearch:boa_offset_applied": True})
    item["assets"]["scl"] = {
        **item["assets"]["B02"],
        "href": "scl.tif",
        "raster:bands": [{"data_type": "uint8"}],
    }
    masked = modality("B02", mask=MaskConfig(band="SCL", cloud=(8, 9)))
    scene = scene_of(item, masked)
    assert (scene.mask.href, scene.mask.dtype) == (f"{ROOT}/scl.tif", "uint8")
    assert scene.mask.planes == (Plane("SCL", 0),)
    with pytest.raises(SceneError, match=r"lacks \['SCL'\]"):
        scene_of(item_of("one"), masked)
    keys = ModalityConfig(
        name="s2", assets={"B02": "B02", "SCL": "scl"}, mask=MaskConfig(band="SCL", cloud=(8,))
    )
    assert [len(scene_of(item, keys).assets), scene_of(item, keys).mask.planes] == [
        1,
        (Plane("SCL", 0),),
    ]
