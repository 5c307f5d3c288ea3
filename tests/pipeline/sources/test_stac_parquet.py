"""stac-geoparquet: the same scenes as from JSON, and tables that are none."""

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError
from pipeline.sources import stac_parquet
from pipeline.sources.stac import files_of, list_stac
from pipeline.sources.stac_parquet import parquet_items
from stac_catalogues import (
    MODALITY,
    access_to,
    item_of,
    newer,
    write_collection,
    write_json,
    write_parquet,
    write_rasters,
)


def listed(location: Path, modality=MODALITY):
    folder = location.parent
    return list_stac(str(location), str(folder), modality, access_to(folder))


def different_items() -> list[dict]:
    """Items that differ in everything a table may leave out."""
    plain, bare, half, other = (item_of(name) for name in ("a", "b", "c", "d"))
    checked, shifted, radar = item_of("e"), item_of("f"), item_of("g", bands=("VV",))
    checked["assets"]["B02"].update({"file:checksum": "1220" + "ab" * 32, "file:size": 2**40})
    del bare["properties"]["updated"], bare["properties"]["grid:code"]
    del half["assets"]["B03"]
    other["properties"]["proj:epsg"] = 32633
    shifted["properties"]["earthsearch:boa_offset_applied"] = True
    shifted["assets"]["B02"]["raster:bands"][0]["offset"] = 0.0
    return [plain, bare, half, other, checked, shifted, radar]


@pytest.mark.parametrize("form", ["1.0", "1.1"])
@pytest.mark.parametrize("batch_rows", [1, 3, 2000])
def test_a_table_lists_the_same_scenes_as_json(tmp_path: Path, monkeypatch, form, batch_rows):
    monkeypatch.setattr(stac_parquet, "BATCH_ROWS", batch_rows)
    items = different_items() if form == "1.0" else [newer(item) for item in different_items()]
    from_json = listed(write_collection(tmp_path / "x.json", items))
    from_table = listed(write_parquet(tmp_path / "x.parquet", items, row_group_size=2))
    assert from_table.scenes == from_json.scenes
    assert [scene.id for scene in from_table.scenes] == ["a", "b", "d", "e", "f"]
    assert from_table.refused == from_json.refused
    assert list(from_table.refused) == ["c"]
    assert from_table.skipped == from_json.skipped
    assert list(from_table.skipped) == ["g"]


def test_the_file_is_the_listing_s_only_file(tmp_path: Path):
    file = write_parquet(tmp_path / "x.parquet", [item_of("one")])
    files = listed(file).files
    assert list(files) == [str(file)]
    assert files_of(str(file), str(tmp_path), MODALITY, access_to(tmp_path)) == files


def test_the_rasters_of_a_table_lie_beside_it(tmp_path: Path):
    write_rasters(tmp_path / "data", "one")
    item = item_of("one", rasters="data")
    del item["assets"]["B03"]["raster:bands"]
    (scene,) = listed(write_parquet(tmp_path / "x.parquet", [item])).scenes
    assert [asset.header_seen for asset in scene.assets] == [False, True]
    assert scene.assets[0].href == str(tmp_path / "data/one_B02.tif")


def test_two_rows_of_one_id(tmp_path: Path):
    file = write_parquet(tmp_path / "x.parquet", [item_of("one"), item_of("one")])
    with pytest.raises(ArchiveError, match="two items have the id 'one'"):
        listed(file)


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("ns", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("ms"), pa.timestamp("s"),
        pa.timestamp("us", "Europe/Berlin"), pa.string(), pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)  # fmt: skip
def test_dates_in_every_type(tmp_path: Path, kind):
    file = write_parquet(tmp_path / "x.parquet", [item_of("one")])
    table = pq.read_table(file)
    moment = datetime(2023, 7, 1, 10, 46, 30, tzinfo=UTC)
    value = moment if pa.types.is_timestamp(kind) else "2023-07-01T12:46:30+02:00"
    if pa.types.is_timestamp(kind):
        column = pa.array([moment], pa.timestamp("us", "UTC")).cast(pa.int64())
        column = column.cast(pa.timestamp("us")).cast(pa.timestamp(kind.unit))
        column = column.cast(pa.int64()).cast(kind)
    else:
        column = pa.array([value]).cast(kind)
    number = table.schema.get_field_index("datetime")
    pq.write_table(table.set_column(number, "datetime", column), file)
    assert listed(file).scenes[0].datetime == "2023-07-01T10:46:30Z"


def test_only_the_columns_that_matter_are_read(tmp_path: Path):
    item = item_of("one", **{"eo:cloud_cover": 3.0})
    item["assets"]["B02"]["raster:bands"][0]["histogram"] = {"buckets": [1, 2, 3]}
    file = write_parquet(tmp_path / "x.parquet", [item])
    (row,) = parquet_items(str(file), access_to(tmp_path))
    assert "eo:cloud_cover" not in row["properties"]
    assert "title" not in row["assets"]["B02"]
    columns = stac_parquet._columns(str(file), pq.ParquetFile(file))
    assert not [name for name in columns if "histogram" in name or "geometry" in name]
    assert [name for name in columns if name.endswith("data_type")]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"assets": [{"x": 1}]}, "column 'id' is missing; expected text"),
        ({"id": ["a"]}, "column 'assets' is missing; expected one struct of assets"),
        ({"id": [1], "assets": [{"x": {"href": "x"}}]}, "column 'id' is int64; expected text"),
        ({"id": ["a"], "assets": ["{}"]}, "column 'assets' is string; expected one struct"),
    ],
)
def test_a_table_that_has_no_items(tmp_path: Path, columns, reason):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ArchiveError, match=reason):
        listed(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "columns",
    [
        {"assets": [{"B02": 7, "B03": 8}], "datetime": ["2020"]},
        {"assets": [{"B02": {"href": 7}, "B03": {"href": b"x"}}], "datetime": [7]},
        {"assets": [{"B02": {"href": "x.tif", "proj:shape": "x"}}], "proj:epsg": [b"x"]},
        {"assets": [{"B02": {"href": "x.tif", "raster:bands": "x", "eo:bands": [1]}}]},
        {"assets": [{"B02": {"href": "x.tif", "bands": [[1]]}}], "proj:code": [{"a": 1}]},
        {"assets": [{"B02": {"href": "x.tif", "bands": {"name": [{"a": 1}]}}}]},
        {"assets": [None], "datetime": [None]},
    ],
)
def test_columns_of_wrong_types_never_end_in_a_traceback(tmp_path: Path, columns):
    pq.write_table(pa.table({"id": ["a"], **columns}), tmp_path / "x.parquet")
    try:
        listing = listed(tmp_path / "x.parquet")
    except ArchiveError:
        return
    assert listing.scenes == ()
    assert list(listing.refused) + list(listing.skipped) == ["a"]


def test_a_file_that_is_no_table(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ArchiveError, match="cannot be read as stac-geoparquet"):
        listed(tmp_path / "x.parquet")
    write_json(tmp_path / "y.parquet", {})
    with pytest.raises(ArchiveError, match="cannot be read as stac-geoparquet"):
        listed(tmp_path / "y.parquet")
    with pytest.raises(ArchiveError, match="cannot be read as stac-geoparquet"):
        listed(tmp_path / "absent.parquet")


@given(st.integers(0, 2**32), st.integers(0, 400))
def test_a_damaged_table_is_listed_or_refused_as_a_whole(tmp_path: Path, seed, flips):
    file = write_parquet(tmp_path / "x.parquet", [item_of(name) for name in "abc"])
    rng, content = np.random.default_rng(seed), bytearray(file.read_bytes())
    for place in rng.integers(0, len(content), flips):
        content[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))
    try:
        listing = listed(file)
    except ArchiveError:
        return
    assert len(listing.scenes) + len(listing.refused) + len(listing.skipped) <= 3


values = st.one_of(st.none(), st.integers(-3, 3), st.just(7))
bands = st.none() | st.lists(
    st.none()
    | st.fixed_dictionaries(
        {
            "nodata": st.none() | st.sampled_from([0.0, 1.5, math.nan]),
            "data_type": st.none() | st.sampled_from(["uint8", "int16"]),
            "list": st.none() | st.lists(values, max_size=3),
        }
    ),
    max_size=3,
)
KIND = pa.list_(
    pa.struct({"nodata": pa.float64(), "data_type": pa.string(), "list": pa.list_(pa.int64())})
)


@given(st.lists(bands, max_size=12), st.integers(0, 3), st.booleans())
def test_values_are_those_pyarrow_gives(rows, start, large):
    kind = pa.large_list(KIND.value_type) if large else KIND
    array = pa.array(rows, kind)[start:]
    assert str(stac_parquet._values(array)) == str(array.to_pylist())


@given(st.lists(bands, max_size=12), st.integers(0, 3))
def test_rows_have_one_code_if_and_only_if_they_are_equal(rows, start):
    array = pa.array(rows, KIND)[start:]
    codes = stac_parquet._codes(array).tolist()
    texts = [str(row) for row in array.to_pylist()]
    assert len(codes) == len(texts)
    assert len(set(codes)) == len(set(texts)) == len(set(zip(codes, texts, strict=True)))
