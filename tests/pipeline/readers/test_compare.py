"""Headers and checksums against what a catalogue says."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS

from pipeline.errors import SceneError
from pipeline.readers import compare
from pipeline.readers.compare import (
    TOLERANCE_PX,
    compare_header,
    same_crs,
    same_transform,
    verify_checksum,
)
from pipeline.readers.rasters import RasterHeader, read_header
from pipeline.scenes import Access, Asset, Grid, Plane
from support import save_scene, textured

GRID = Grid(16, 24, "EPSG:32632", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0))
HEADER = RasterHeader(
    grid=GRID,
    dtype="float32",
    nodata=(0.0, None),
    scales=(0.5, None),
    offsets=(1.0, None),
    descriptions=(None, None),
    block_shape=(16, 24),
    tags={},
)


def asset(planes: tuple[Plane, ...] = (Plane("a", 0), Plane("b", 1)), **changes) -> Asset:
    stated = Asset(
        href="/x.tif",
        kind="raster",
        grid=GRID,
        dtype="float32",
        planes=planes,
        block_shape=(512, 512),
        fingerprint="stated",
        header_seen=False,
    )
    return replace(stated, **changes)


def moved(**changes: float) -> Grid:
    """The grid with some of its coefficients a ... f changed."""
    pairs = zip("abcdef", GRID.transform, strict=True)
    return replace(GRID, transform=tuple(changes.get(name, value) for name, value in pairs))


def test_a_file_agrees_with_its_own_header(tmp_path: Path):
    pixels = textured((2, 16, 24), dtype="float32")
    file = save_scene(tmp_path / "x.tif", pixels, nodata=math.nan)
    header = read_header(str(file), Access(roots=(str(tmp_path),)))
    planes = (Plane("a", 0, math.nan), Plane("b", 1))
    compare_header(asset(planes, grid=header.grid), header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grid": replace(GRID, height=17)},
            "has size 16 x 24 px in its file, 17 x 24 px in its catalogue",
        ),
        (
            {"grid": replace(GRID, width=23)},
            "has size 16 x 24 px in its file, 16 x 23 px in its catalogue",
        ),
        (
            {"grid": replace(GRID, crs="EPSG:32633")},
            "has CRS EPSG:32632 in its file, EPSG:32633 in its catalogue",
        ),
        (
            {"grid": moved(c=500_010.0)},
            "has transform (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0) in its",
        ),
        (
            {"grid": Grid(16, 24, None, None)},
            "has CRS EPSG:32632 in its file, none in its catalogue",
        ),
        ({"dtype": "uint16"}, "has type float32 in its file, uint16 in its catalogue"),
        (
            {"planes": (Plane("a", 2),)},
            "has 2 bands in its file; its catalogue says that 'a' is number 3",
        ),
        (
            {"planes": (Plane("a", 0, nodata=7.0),)},
            "has nodata of band 'a' 0.0 in its file, 7.0 in its catalogue",
        ),
        (
            {"planes": (Plane("a", 0, nodata=math.nan),)},
            "has nodata of band 'a' 0.0 in its file, nan in",
        ),
        (
            {"planes": (Plane("a", 0, scale=0.1),)},
            "has scale of band 'a' 0.5 in its file, 0.1 in its",
        ),
        (
            {"planes": (Plane("a", 0, offset=0.0),)},
            "has offset of band 'a' 1.0 in its file, 0.0 in its",
        ),
    ],
)
def test_contradictions_name_both_values(changes, message):
    with pytest.raises(SceneError) as error:
        compare_header(asset(**changes), HEADER)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "planes",
    [
        # What only one of the two states is no contradiction.
        (Plane("a", 0), Plane("b", 1, nodata=5.0, scale=2.0, offset=3.0)),
        (Plane("b", 1), Plane("a", 0, nodata=0.0, scale=0.5, offset=1.0)),
        (Plane("a", 0, scale=0.5 + 1e-9, offset=1.0 - 1e-9),),
    ],
)
def test_no_contradiction(planes):
    compare_header(asset(planes), HEADER)


@pytest.mark.parametrize(
    ("stated", "found", "dtype", "same"),
    [
        (math.nan, math.nan, "float32", True),
        (math.inf, math.inf, "float32", True),
        (-3.4028235e38, float(np.finfo("float32").min), "float32", True),
        (0.1, float(np.float32(0.1)), "float32", True),
        (0.1, float(np.float32(0.1)), "float64", False),
        (1e300, math.inf, "float64", False),
        (-9999, -9999.0, "int16", True),
        (-9999, -9998.0, "int16", False),
        (0.0, math.nan, "float32", False),
    ],
)
def test_nodata_is_compared_as_numbers_of_the_file(stated, found, dtype, same):
    header = replace(HEADER, dtype=dtype, nodata=(found, None))
    given = asset((Plane("a", 0, nodata=stated),), dtype=dtype)
    if same:
        compare_header(given, header)
    else:
        with pytest.raises(SceneError, match="nodata"):
            compare_header(given, header)


@pytest.mark.parametrize(
    ("shift_px", "same"), [(0.0, True), (5e-7, True), (2e-6, False), (1.0, False)]
)
def test_transforms_agree_to_a_millionth_of_a_pixel(shift_px, same):
    assert same_transform(GRID.transform, moved(c=5e5 + shift_px * 10).transform, 16, 24) == same
    # A wrong pixel size adds up over the row.
    assert (
        same_transform(GRID.transform, moved(a=10 + shift_px * 10 / 24).transform, 16, 24) == same
    )


numbers = st.floats(-1e4, 1e4)


@given(numbers, numbers, st.floats(0.1, 100), st.floats(0, 7), st.floats(-3, 3), st.floats(-3, 3))
def test_same_transform_looks_at_the_farthest_corner(x, y, size, angle, cols, rows):
    a, d = size * math.cos(angle), size * math.sin(angle)
    one = (a, d, x, d, -a, y)
    # The same, but that the far corner of 50 rows and 100 columns lies some millionths of a px off.
    off_x, off_y = (TOLERANCE_PX * (u * cols + v * rows) for u, v in ((a, d), (d, -a)))
    other = (a + off_x / 100, d, x, d, -a + off_y / 50, y)
    distance = math.hypot(cols, rows)
    if abs(distance - 1) > 1e-2:
        assert same_transform(one, other, 50, 100) == (distance < 1)


def test_systems_are_compared_by_what_they_are():
    wkt = CRS.from_epsg(32632).to_wkt(version="WKT2_2019")
    assert same_crs("EPSG:32632", wkt)
    assert not same_crs("EPSG:32633", wkt)
    assert same_crs(None, None)
    assert not same_crs(None, "EPSG:32632")


@pytest.mark.parametrize(
    ("prefix", "name"),
    [("1114", "sha1"), ("1220", "sha256"), ("1340", "sha512"), ("d50110", "md5")],
)
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_every_kind_of_checksum(tmp_path: Path, monkeypatch, prefix, name, size):
    monkeypatch.setattr(compare, "_PIECE_BYTES", 7)
    file, content = tmp_path / "x.tif", bytes(range(256)) * 4
    file.write_bytes(content[:size])
    digest = hashlib.new(name, content[:size]).hexdigest()
    verify_checksum(str(file), prefix + digest, Access((str(tmp_path),)))
    verify_checksum(str(file), (prefix + digest).upper(), Access((str(tmp_path),)))
    file.write_bytes(content[:size] + b"x")
    with pytest.raises(SceneError, match=f"in its file, {prefix}{digest} in its catalogue"):
        verify_checksum(str(file), prefix + digest, Access((str(tmp_path),)))


def test_the_examples_of_the_file_extension(tmp_path: Path):
    (tmp_path / "x").write_text("test")
    verify_checksum(
        str(tmp_path / "x"),
        "1114a94a8fe5ccb19ba61c4c0873d391e987982fbbd3",
        Access((str(tmp_path),)),
    )
    known = "12209f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    verify_checksum(str(tmp_path / "x"), known, Access((str(tmp_path),)))


@pytest.mark.parametrize(
    "checksum",
    [
        "", "1220", "1220" + "0" * 62, "90e4021044a8995dd50b6657a037a7839304535b",
        "d41d8cd98f00b204e9800998ecf8427e",
    ],
)  # fmt: skip
def test_checksums_of_unknown_kind(tmp_path: Path, checksum):
    (tmp_path / "x").write_text("test")
    with pytest.raises(SceneError, match=r"is no known multihash; expected .*1220 \(sha256\)"):
        verify_checksum(str(tmp_path / "x"), checksum, Access((str(tmp_path),)))


def test_a_file_that_is_gone(tmp_path: Path):
    with pytest.raises(SceneError, match="cannot be read"):
        verify_checksum(str(tmp_path / "x"), "1220" + "0" * 64, Access((str(tmp_path),)))
