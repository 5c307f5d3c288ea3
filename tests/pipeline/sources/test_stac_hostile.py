"""STAC items with garbage in them: a scene, a refusal or an ArchiveError, never anything else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError
from pipeline.scenes import Scene
from pipeline.settings.modality import MaskConfig, ModalityConfig
from pipeline.sources.stac import files_of, list_stac
from stac_catalogues import MODALITY, access_to, item_of, newer, write_catalogue, write_rasters

NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, -(10**400), 1e308, 1e-320, 0.5]
TEXTS = [
    "", " ", "x", "\0", "\ud800", "\n", "x" * 5000, "../" * 40, "%s%n", "NaN", "1e999", "EPSG:0",
    "https://[", "https://host:port/x.tif", "//", "/", "file:", "s3://", "{", "GEOGCS[", "+proj=utm",
    "2023-13-45T99:99:99Z", "0000-00-00", "9999999-01-01", "١٢٣", "\u202e",
]  # fmt: skip
garbage = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | st.sampled_from(TEXTS)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FULL = item_of("one", **{"earthsearch:boa_offset_applied": True, "start_datetime": "2020-01-01"})
FULL["assets"]["B02"].update({"file:size": 10, "file:checksum": "1220" + "ab" * 32})
MASKED = ModalityConfig(name="s2", bands=("B02",), mask=MaskConfig(band="B03", cloud=(8,)))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value, itself included."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], by)
    return value


def outcome(folder: Path, content: Any, modality: ModalityConfig = MODALITY) -> None:
    """List a document: everything in it becomes a scene or has a reason, in one printable line each."""
    file = folder / "x.json"
    file.write_text(json.dumps(content))
    access = access_to(folder)
    try:
        listing = list_stac(str(file), str(folder), modality, access)
    except ArchiveError as error:
        names, reasons = [], [str(error)]
    else:
        for scene in listing.scenes:
            assert isinstance(scene, Scene)
            for asset in (*scene.assets, *([scene.mask] if scene.mask else [])):
                assert asset.href.startswith(str(folder))
        left_out = {**listing.refused, **listing.skipped}
        names, reasons = list(left_out), list(left_out.values())
        assert files_of(str(file), str(folder), modality, access) == listing.files
    assert all(text.isprintable() for text in (*names, *reasons)), (names, reasons)
    assert all(0 < len(reason) < 1000 for reason in reasons), reasons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rasters of item "one", so that headers can be read where garbage hides facts."""
    path = tmp_path_factory.mktemp("hostile")
    write_rasters(path, "one")
    return path


@pytest.mark.parametrize("item", [FULL, newer(FULL)], ids=["1.0", "1.1"])
@pytest.mark.parametrize("modality", [MODALITY, MASKED], ids=["bands", "mask"])
@given(data=st.data())
def test_any_value_of_an_item_may_be_garbage(folder, item, modality, data):
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(item)))
        item = replaced(item, place, data.draw(garbage))
    outcome(folder, item, modality)
    outcome(folder, {"type": "FeatureCollection", "features": [item, FULL["id"], item]}, modality)


@pytest.mark.parametrize(
    "by", [None, True, 10**400, float("nan"), "", "\ud800", [], {}, [[[]]], {"a": {}}]
)
def test_every_value_of_an_item_replaced_by_a_usual_suspect(folder, by):
    for item in (FULL, newer(FULL)):
        for place in places(item):
            outcome(folder, replaced(item, place, by))


@given(data=st.data())
def test_any_value_of_a_catalogue_may_be_garbage(folder, data):
    start = write_catalogue(folder / "c.json", [("item", "y.json"), ("child", "z.json")])
    content = json.loads(start.read_text())
    place = data.draw(st.sampled_from(places(content)))
    outcome(folder, replaced(content, place, data.draw(garbage)))


@given(st.binary(max_size=64))
def test_any_bytes_may_be_in_a_catalogue(folder, content):
    (folder / "bytes.json").write_bytes(content)
    with pytest.raises(ArchiveError):
        list_stac(str(folder / "bytes.json"), str(folder), MODALITY, access_to(folder))


def test_deep_and_huge_values(folder):
    for text in (
        '{"a":' * 3000 + "1" + "}" * 3000,
        "[" * 900 + "]" * 900,
        "9" * 10_000,
        "9" * 4000,
        "-1e99999",
        '"' + "x" * 2_000_000 + '"',
        "[" + "1," * 200_000 + "1]",
    ):
        item = json.dumps(replaced(FULL, ("assets", "B02", "proj:transform"), "HERE"))
        for field in ("proj:projjson", "proj:shape", "raster:bands", "href", "file:size"):
            (folder / "x.json").write_text(
                item.replace('"HERE"', text) if field == "proj:shape" else
                json.dumps(replaced(FULL, ("assets", "B02"), {**FULL["assets"]["B02"], field: "HERE"}))
                .replace('"HERE"', text)
            )  # fmt: skip
            try:
                listing = list_stac(
                    str(folder / "x.json"), str(folder), MODALITY, access_to(folder)
                )
            except ArchiveError:
                continue
            assert len(listing.scenes) + len(listing.refused) == 1
            assert all(len(reason) < 1000 for reason in listing.refused.values())
