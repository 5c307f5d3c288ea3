import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SceneError
from pipeline.readers.rasters import RasterHeader
from pipeline.scenes import Grid, Plane
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.bands import choose_planes, plane_of

QA = {"band": "QA60", "kind": "bits", "cloud": [10]}


def header(descriptions, nodata=None, scale=None, offset=None) -> RasterHeader:
    num = len(descriptions)
    return RasterHeader(
        Grid(4, 5, None, None), "uint16", (nodata,) * num, (scale,) * num, (offset,) * num,
        tuple(descriptions), (4, 5), {},
    )  # fmt: skip


def chosen(descriptions, **modality) -> tuple[dict[str, int], int | None]:
    """0-based numbers of the bands by name, and of the mask."""
    planes, mask = choose_planes(header(descriptions), ModalityConfig(**modality))
    return {plane.band: plane.key for plane in planes}, mask and mask.key


@pytest.mark.parametrize(
    ("descriptions", "modality", "bands", "mask"),
    [
        ([None] * 2, {}, {"band_1": 0, "band_2": 1}, None),
        (["B4", "QA60", "B3"], {"mask": QA}, {"band_1": 0, "band_3": 2}, 1),
        ([None] * 3, {"bands": ["r", "g", "b"]}, {"r": 0, "g": 1, "b": 2}, None),
        (["x", "x", "x"], {"bands": ["r", "g", "b"]}, {"r": 0, "g": 1, "b": 2}, None),
        (["B4", "QA60", "B3", "B2"], {"bands": ["B2", "B4"], "mask": QA}, {"B2": 3, "B4": 0}, 1),
        (["B4", "B3"], {"bands": ["red"], "assets": {"red": "B4"}}, {"red": 0}, None),
        (["B4", "B3"], {"assets": {"red": "B4"}}, {"red": 0}, None),
        ([None] * 3, {"bands": ["r", "b"], "assets": {"r": "3", "b": "1"}}, {"r": 2, "b": 0}, None),
        (["B4", None], {"bands": ["B4", "x"], "assets": {"x": "2"}}, {"B4": 0, "x": 1}, None),
        ([None] * 3, {"bands": ["r", "b"], "assets": {"QA60": "2"}, "mask": QA}, {"r": 0, "b": 2}, 1),
        (["B8A", "B8"], {"bands": ["B08", "B8A"]}, {"B08": 1, "B8A": 0}, None),
        (["nir", "red", "B04"], {"bands": ["B08", "B04"]}, {"B08": 0, "B04": 2}, None),
        ([None] * 3, {"assets": {"QA60": "1"}, "mask": QA}, {"band_2": 1, "band_3": 2}, 0),
    ],
)  # fmt: skip
def test_which_bands_of_a_file(descriptions, modality, bands, mask):
    assert chosen(descriptions, **modality) == (bands, mask)


@pytest.mark.parametrize(
    ("descriptions", "modality", "message"),
    [
        ([None] * 2, {"bands": ["r", "g", "b"]},
         "has 2 bands without descriptions; modality image has 3; name each in modality.assets"),
        (["x", "y"], {"bands": ["r", "g", "b"]}, "has 2 bands described as x, y; modality image has 3"),
        ([None] * 3, {"bands": ["r"], "assets": {"QA60": "1"}, "mask": QA},
         "has 3 bands without descriptions, one of them the mask; modality image has 1"),
        (["B4", "B3"], {"bands": ["B4", "B2"]}, "lacks the bands B2; it has 2 bands described as B4, B3"),
        (["B4", "B3"], {"bands": ["r", "g"], "assets": {"r": "B04"}}, "lacks the bands r, g; it has"),
        (["B4"], {"bands": ["B4"], "mask": QA}, "lacks the mask band QA60; it has 1 band described as"),
        (["QA60"], {"mask": QA}, "has no band besides the mask"),
        (["B4", "B4", "B3"], {"bands": ["B4", "B3"]}, "describes 2 of its bands as 'B4'"),
        ([None] * 2, {"bands": ["r"], "assets": {"r": "3"}}, "has 2 bands; .* says that r is number 3"),
        ([None] * 2, {"bands": ["r"], "assets": {"r": "0"}}, "says that r is number 0"),
        (["B4", "B3"], {"bands": ["B4", "r"], "assets": {"r": "1"}}, "one band, number 1, for two"),
        (["nir08", "x"], {"bands": ["B8A", "nir"]}, "one band, number 1, for two"),
        (["B8"], {"bands": ["B08"], "assets": {"B08": "B08"}}, "lacks the bands B08"),
        (["a\nb\x1b", "c" * 99], {"bands": ["r"]}, r"described as a\\nb\\x1b, c{40}; modality image has 1"),
        (["b"] * 30, {"bands": ["r"]}, "has 30 bands described as b; modality"),
        ([f"b{n}" for n in range(30)], {"bands": ["r"]}, "b18, b19, ...; modality"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(descriptions, modality, message):
    with pytest.raises(SceneError, match=message) as caught:
        chosen(descriptions, **modality)
    assert "\n" not in str(caught.value)


@given(st.permutations([f"B{number}" for number in range(6)]), st.integers(1, 6))
def test_descriptions_find_bands_in_any_order(descriptions, num_bands):
    bands = [f"B{number}" for number in range(num_bands)]
    numbers, _ = chosen(descriptions, bands=bands)
    assert list(numbers) == bands
    assert [descriptions[number] for number in numbers.values()] == bands


@pytest.mark.parametrize(
    ("tags", "modality", "plane"),
    [
        ({}, {}, Plane("b", 0)),
        ({"nodata": 7}, {}, Plane("b", 0, 7)),
        ({"nodata": 7}, {"nodata": 0}, Plane("b", 0, 0)),
        ({"scale": 2, "offset": 0}, {"scale": 3, "offset": 1}, Plane("b", 0, None, 2, 0)),
        ({}, {"scale": 3, "offset": -0.1}, Plane("b", 0)),
    ],
)
def test_the_file_speaks_last_of_nodata_and_alone_of_scale(tags, modality, plane):
    assert plane_of(header([None], **tags), 0, "b", ModalityConfig(**modality)) == plane


def test_tags_of_a_file_do_not_speak_of_its_mask():
    _, mask = choose_planes(
        header(["B4", "QA60"], nodata=0, scale=2, offset=1), ModalityConfig(mask=QA, nodata=9)
    )
    assert mask == Plane("QA60", 1)


def test_nan_as_nodata_stays():
    assert math.isnan(plane_of(header([None], nodata=math.nan), 0, "b", ModalityConfig()).nodata)
