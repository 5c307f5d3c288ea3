"""Pixels on another grid: the same however they are asked for, and never made of what is not data."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform

from pipeline.errors import SceneError
from pipeline.readers import warp
from pipeline.readers.rasters import read_header
from pipeline.readers.validity import valid_pixels
from pipeline.readers.warp import open_warped_asset
from pipeline.scenes import Access, Asset, Grid, Plane, Window
from support import save_scene, textured

KERNELS = ("nearest", "bilinear", "cubic", "average")
HERE = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)


def asset_onto(path: Path, target: Grid, resampling: str, nodata=()) -> Asset:
    """All bands of a file, warped; `nodata` per band instead of the file's tag."""
    header = read_header(str(path), access_to(path))
    tags = nodata or header.nodata
    planes = tuple(Plane(f"b{n}", n, tag) for n, tag in enumerate(tags))
    return Asset(
        str(path), "raster", header.grid, header.dtype, planes, header.block_shape, "",
        warp_onto=target, resampling=resampling,
    )  # fmt: skip


def access_to(path: Path) -> Access:
    return Access(roots=(str(path.parent.resolve()),))


def warped(path, target, resampling, nodata=(), window=None):
    """(pixels, readable) of a window, or of all of the target."""
    window = window or Window(0, 0, target.height, target.width)
    asset = asset_onto(path, target, resampling, nodata)
    with open_warped_asset(asset, access_to(path)) as reader:
        return reader.read(window), reader.readable(window)


def around(
    crs: str, size_px: float, angle: float, shape: tuple[int, int], offset=(0.0, 0.0)
) -> Grid:
    """A grid turned by `angle` (radians) whose centre is that of a 40 x 50 px scene at HERE."""
    (x,), (y,) = transform("EPSG:32632", crs, [500_250 + offset[0]], [4_999_800 + offset[1]])
    if crs == "EPSG:4326":
        size_px = size_px / 111_320
    cos, sin = size_px * math.cos(angle), size_px * math.sin(angle)
    height, width = shape
    left = x - cos * width / 2 - sin * height / 2
    top = y - sin * width / 2 + cos * height / 2
    return Grid(height, width, crs, (cos, sin, left, sin, -cos, top))


@st.composite
def targets(draw):
    return around(
        draw(st.sampled_from(["EPSG:32632", "EPSG:32633", "EPSG:4326", "EPSG:3857"])),
        draw(st.sampled_from([3.0, 10.0, 14.142, 31.0])),
        draw(st.sampled_from([0.0, 0.0, 0.3, math.pi / 4, 2.0])),
        (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        (draw(st.floats(-200, 200)), draw(st.floats(-200, 200))),
    )


def holed(seed: int, dtype: str) -> np.ndarray:
    """Pixels [2, 40, 50] with 0, and NaN in floats, in patches and single pixels that differ by band."""
    rng = np.random.default_rng(seed)
    pixels = textured((2, 40, 50), seed, "float64").astype(dtype)
    patches = np.kron(rng.random((2, 8, 10)) < 0.2, np.ones((5, 5))) > 0
    pixels[patches | (rng.random(pixels.shape) < 0.05)] = 0
    if np.dtype(dtype).kind == "f":
        pixels[rng.random(pixels.shape) < 0.05] = np.nan
    return pixels


@settings(max_examples=60)
@given(
    st.data(),
    targets(),
    st.sampled_from(KERNELS),
    st.sampled_from(["uint8", "uint16", "int16", "float32", "float64"]),
    st.integers(0, 99),
)
def test_windows_may_be_cut_in_any_way(tmp_path, data, target, resampling, dtype, seed):
    path = save_scene(tmp_path / "a.tif", holed(seed, dtype), nodata=0)
    whole, readable = warped(path, target, resampling)
    rows = sorted(
        {0, target.height, *data.draw(st.lists(st.integers(0, target.height), max_size=3))}
    )
    cols = sorted({0, target.width, *data.draw(st.lists(st.integers(0, target.width), max_size=3))})
    with open_warped_asset(asset_onto(path, target, resampling), access_to(path)) as reader:
        for top, bottom in pairwise(rows):
            for left, right in pairwise(cols):
                window = Window(top, left, bottom - top, right - left)
                part = np.s_[..., top:bottom, left:right]
                assert (reader.readable(window) == readable[part]).all()
                assert reader.read(window).tobytes() == whole[part].tobytes()


@settings(max_examples=60)
@given(
    targets(),
    st.sampled_from(["bilinear", "average"]),
    st.sampled_from(["uint16", "float64"]),
    st.integers(0, 99),
)
def test_nothing_but_data_enters_a_pixel(tmp_path, target, resampling, dtype, seed):
    pixels = holed(seed, dtype)
    path = save_scene(tmp_path / "a.tif", pixels, nodata=0)
    found, readable = warped(path, target, resampling)
    valid = valid_pixels(found, asset_onto(path, target, resampling).planes, readable)
    for band, source in zip(found, pixels, strict=True):
        data = source[np.isfinite(source) & (source != 0)]
        numbers = band[valid]
        assert np.isfinite(numbers).all()
        assert ((numbers >= data.min()) & (numbers <= data.max())).all()
    assert (found[:, ~readable] == 0).all()


@given(st.sampled_from(KERNELS), st.data())
@settings(max_examples=60)
def test_a_grid_of_the_same_pixels_changes_no_bit(tmp_path, resampling, data):
    dtype = np.dtype(
        data.draw(st.sampled_from(["uint8", "int16", "int64", "uint64", "float32", "float64"]))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    bits = rng.integers(0, 256, 2000 * dtype.itemsize, np.uint8)
    pixels = bits.view(dtype).reshape(1, 40, 50)
    path = save_scene(tmp_path / "a.tif", pixels)
    top, left = data.draw(st.integers(-45, 45)), data.draw(st.integers(-55, 55))
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    noise = data.draw(st.sampled_from([0.0, 1e-7]))
    corner = (500_000 + 10 * left + noise, 5_000_000 - 10 * top)
    target = Grid(height, width, "EPSG:32632", (10.0, 0.0, corner[0], 0.0, -10.0, corner[1]))
    found, readable = warped(path, target, resampling)
    padded = np.pad(pixels[0], 100)[100 + top : 100 + top + height, 100 + left : 100 + left + width]
    inside = np.pad(np.ones((40, 50), np.bool_), 100)
    inside = inside[100 + top : 100 + top + height, 100 + left : 100 + left + width]
    assert (readable == inside).all()
    assert found[0].tobytes() == padded.tobytes()


@pytest.mark.parametrize("resampling", KERNELS)
def test_a_quarter_turn_only_turns(tmp_path, resampling):
    pixels = textured((2, 40, 50), dtype="float64")
    path = save_scene(tmp_path / "a.tif", pixels)
    # Columns run south, rows run east.
    target = Grid(50, 40, "EPSG:32632", (0.0, 10.0, 500_000.0, -10.0, 0.0, 5_000_000.0))
    found, readable = warped(path, target, resampling)
    assert readable.all()
    assert (found == pixels.transpose(0, 2, 1)).all()


def test_hand_made_numbers(tmp_path):
    pixels = np.array([[[1, 2, 10, 20], [3, 4, 30, 41], [0, 0, 0, 9], [0, 5, 9, 9]]], np.uint16)
    path = save_scene(tmp_path / "a.tif", pixels, nodata=0)
    coarse = Grid(2, 2, "EPSG:32632", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0))
    found, readable = warped(path, coarse, "average")
    assert readable.tolist() == [[True, True], [False, True]]
    assert found.tolist() == [[[3, 25], [0, 9]]]  # 2.5 and 25.25; one of four; three of four
    half = Grid(1, 3, "EPSG:32632", (10.0, 0.0, 500_005.0, 0.0, -10.0, 5_000_000.0))
    assert warped(path, half, "bilinear")[0].tolist() == [[[2, 6, 15]]]  # 1.5, 6, 15
    halfway = Grid(1, 2, "EPSG:32632", (10.0, 0.0, 500_005.0, 0.0, -10.0, 4_999_970.0))
    found, readable = warped(path, halfway, "bilinear")
    assert readable.all()  # half of the weight on data is enough
    assert found.tolist() == [[[5, 7]]]
    assert warped(path, halfway, "nearest")[0].tolist() == [[[5, 9]]]


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint64"])
def test_integers_are_rounded_half_up_and_clipped_where_cubic_overshoots(tmp_path, dtype):
    limits = np.iinfo(dtype)
    edge = np.zeros((1, 20, 20))
    edge[:, :, 10:] = 250
    target = Grid(20, 40, "EPSG:32632", (5.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0))
    exact, _ = warped(save_scene(tmp_path / "a.tif", edge), target, "cubic")
    assert exact.min() < 0
    assert exact.max() > 255
    found, _ = warped(save_scene(tmp_path / "b.tif", edge.astype(dtype)), target, "cubic")
    expected = np.clip(np.floor(exact + 0.5), float(limits.min), min(float(limits.max), 1e6))
    assert (found == expected.astype(dtype)).all()
    edge = np.where(edge > 0, limits.max, limits.min).astype(dtype)
    found, _ = warped(save_scene(tmp_path / "c.tif", edge), target, "cubic")
    assert (found[0, 0, :15] == limits.min).all()
    # The largest 64-bit integers have no float64 of their own.
    assert (found[0, 0, 25:] >= limits.max - 2048).all()


def by_gdal(path: Path, target: Grid, resampling: str, **options) -> np.ndarray:
    with (
        rasterio.open(path) as raster,
        WarpedVRT(
            raster,
            crs=target.crs,
            transform=rasterio.Affine(*target.transform),
            height=target.height,
            width=target.width,
            resampling=Resampling[resampling],
            tolerance=1e-9,
            **options,
        ) as virtual,
    ):
        return virtual.read()


def inside(path: Path, crs: str, size_px: float, angle: float) -> Grid:
    """A grid of 200 x 200 px well inside a scene of the archive."""
    with rasterio.open(path) as raster:
        left, bottom, right, top = raster.bounds
        (x,), (y,) = transform(raster.crs, crs, [(left + right) / 2], [(top + bottom) / 2])
    a, b = size_px * math.cos(angle), size_px * math.sin(angle)
    return Grid(200, 200, crs, (a, b, x - 100 * (a + b), b, -a, y - 100 * (b - a)))


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "cubic"])
@pytest.mark.parametrize(
    ("crs", "size_px", "angle"),
    [("EPSG:32653", 4.13, 0), ("EPSG:32653", 4, 0.7), ("EPSG:32652", 4, 0), ("EPSG:4326", 4e-5, 0)],
)
def test_finer_pixels_are_those_of_gdal(satclip, resampling, crs, size_px, angle):
    path = satclip / "patch_511198.tif"
    target = inside(path, crs, size_px, angle)
    found, readable = warped(path, target, resampling)
    expected = by_gdal(path, target, resampling)
    assert readable.all()
    differ = np.abs(found.astype(int) - expected.astype(int))
    # GDAL's positions are not rounded: a number half way between two falls on either side.
    assert differ.max() <= (1 if resampling != "nearest" else 10_000)
    assert (differ > 0).mean() < 0.001


@pytest.mark.parametrize(
    ("resampling", "options"),
    [("average", {}), ("bilinear", {"XSCALE": 0.25, "YSCALE": 0.25})],
)
def test_coarser_pixels_are_those_of_gdal(satclip, resampling, options):
    path = satclip / "patch_57755.tif"
    with rasterio.open(path) as raster:
        left, top = raster.transform.c + 13, raster.transform.f - 8
    target = Grid(60, 60, "EPSG:32722", (40.0, 0.0, left, 0.0, -40.0, top))
    found, readable = warped(path, target, resampling)
    differ = np.abs(found.astype(int) - by_gdal(path, target, resampling, **options).astype(int))
    assert readable.all()
    assert differ[:, 2:-2, 2:-2].max() <= 1


@pytest.mark.parametrize("resampling", ["bilinear", "cubic"])
def test_a_slope_stays_a_slope(tmp_path, resampling):
    y, x = np.mgrid[:40, :50] + 0.5
    path = save_scene(tmp_path / "a.tif", (3 * x + 7 * y)[None])
    target = around("EPSG:32632", 4.0, 0.4, (9, 9))
    found, readable = warped(path, target, resampling)
    a, b, c, d, e, f = target.transform
    rows, cols = np.mgrid[:9, :9] + 0.5
    source_cols = (a * cols + b * rows + c - 500_000) / 10
    source_rows = (5_000_000 - (d * cols + e * rows + f)) / 10
    assert readable.all()
    assert np.abs(found[0] - (3 * source_cols + 7 * source_rows)).max() < 1e-4


def test_nodata_counts_per_band_and_masks_for_all(tmp_path):
    pixels = np.full((2, 20, 20), 100, np.int16)
    pixels[0, :10], pixels[1, :, :10] = -1, -2
    path = save_scene(tmp_path / "a.tif", pixels)
    target = Grid(10, 10, "EPSG:32632", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0))
    found, readable = warped(path, target, "bilinear", (-1, -2))
    y, x = np.mgrid[:10, :10]
    assert (readable == ((y >= 5) & (x >= 5))).all()
    assert (found[:, readable] == 100).all()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as raster:
        raster.write_mask(np.tile(np.arange(20) < 16, (20, 1)))
    for resampling in KERNELS:
        _, masked = warped(path, target, resampling, (-1, -2) if resampling != "nearest" else ())
        assert not masked[:, 8:].any()
        assert masked[5:, 5:8].all()


def test_nearest_keeps_nodata_as_it_is(tmp_path):
    path = save_scene(tmp_path / "a.tif", holed(3, "uint16"), nodata=0)
    target = around("EPSG:32633", 7.0, 0.0, (30, 30))
    found, readable = warped(path, target, "nearest")
    assert readable.all()
    assert (found == 0).any()
    valid = valid_pixels(found, asset_onto(path, target, "nearest").planes, readable)
    assert (valid == (found != 0).all(axis=0)).all()


def test_a_scene_across_the_antimeridian_has_no_gap(tmp_path):
    pixels = textured((1, 100, 200), dtype="float64")
    # 179 ... 181 degrees east onto the zones on both sides.
    path = save_scene(
        tmp_path / "a.tif", pixels, crs="EPSG:4326",
        transform=rasterio.Affine(0.01, 0, 179, 0, -0.01, 1),
    )  # fmt: skip
    for crs, x in (("EPSG:32660", 834_000.0), ("EPSG:32601", 166_000.0)):
        target = Grid(80, 80, crs, (1000.0, 0.0, x - 40_000, 0.0, -1000.0, 90_000.0))
        _, readable = warped(path, target, "bilinear")
        assert readable.all()
        lon, lat = transform(crs, "EPSG:4326", [x - 40_000 + 500, x + 39_500], [50_500, 50_500])
        assert lon[0] > 0 > lon[1]
        for col, (east, north) in ((0, (lon[0], lat[0])), (79, (lon[1] + 360, lat[1]))):
            near = pixels[0, int((1 - north) * 100), int((east - 179) * 100)]
            nearest, _ = warped(path, target, "nearest")
            assert nearest[0, 39, col] == near


def test_points_that_a_crs_cannot_express_are_not_readable_and_spoil_no_others(tmp_path):
    path = save_scene(
        tmp_path / "a.tif", textured((1, 60, 60)), crs="EPSG:32632",
        transform=rasterio.Affine(5000, 0, 350_000, 0, -5000, 9_990_000),
    )  # fmt: skip
    # Rows from 94 to 85 degrees of latitude.
    target = Grid(90, 40, "EPSG:4326", (0.5, 0.0, 0.0, 0.0, -0.1, 94.0))
    found, readable = warped(path, target, "nearest")
    assert not readable[:40].any()
    assert readable[45:].any()
    below = replace(target, height=48, transform=(0.5, 0.0, 0.0, 0.0, -0.1, 89.8))
    assert (warped(path, below, "nearest")[1] == readable[42:]).all()
    window = Window(37, 3, 20, 19)
    part, shown = warped(path, target, "nearest", window=window)
    assert (shown == readable[37:57, 3:22]).all()
    assert (part == found[:, 37:57, 3:22]).all()


@pytest.mark.parametrize("resampling", KERNELS)
def test_steps_of_bounded_size_change_nothing(tmp_path, monkeypatch, resampling):
    path = save_scene(tmp_path / "a.tif", holed(5, "float32"), nodata=0)
    target = around("EPSG:32633", 25.0, 0.5, (23, 31))
    whole = warped(path, target, resampling)
    monkeypatch.setattr(warp, "_MAX_TARGET_PX", 50)
    monkeypatch.setattr(warp, "_MAX_SOURCE_NUMBERS", 1000)
    for one, other in zip(whole, warped(path, target, resampling), strict=True):
        assert one.tobytes() == other.tobytes()
    monkeypatch.setattr(warp, "_MAX_SOURCE_NUMBERS", 3)
    with pytest.raises(
        SceneError, match="covers more than 3 of its numbers; warp onto finer pixels"
    ):
        warped(path, target, resampling)


def test_a_grid_beside_the_scene_has_nothing(tmp_path):
    path = save_scene(tmp_path / "a.tif", textured((1, 40, 50)))
    for offset in ((3000, 0), (0, -3000), (10_000_000, 0)):
        found, readable = warped(path, around("EPSG:3857", 10.0, 0.0, (9, 9), offset), "cubic")
        assert not readable.any()
        assert not found.any()


def test_what_cannot_be_warped_is_refused(tmp_path):
    path = save_scene(tmp_path / "a.tif", textured((1, 40, 50)))
    bare = save_scene(tmp_path / "b.tif", textured((1, 40, 50)), crs=None)
    target = around("EPSG:32633", 10.0, 0.0, (9, 9))
    asset, access = asset_onto(path, target, "bilinear"), access_to(path)
    flat = replace(asset.grid, transform=(10.0, 10.0, 0.0, 10.0, 10.0, 0.0))
    cases = {
        "both grids need a CRS": asset_onto(bare, target, "bilinear"),
        "9 x 9 px without a CRS": replace(asset, warp_onto=Grid(9, 9, None, None)),
        "is an array": replace(asset, kind="array"),
        "resampling 'lanczos' is not known": replace(asset, resampling="lanczos"),
        "cannot be inverted": replace(asset, grid=flat),
    }
    for message, case in cases.items():
        with pytest.raises(SceneError, match=message), open_warped_asset(case, access):
            pass
