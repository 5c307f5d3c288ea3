"""Pixels read from GeoTIFFs are those that were written, however the file is laid out."""

import contextlib
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning

from pipeline.errors import SceneError
from pipeline.readers import rasters
from pipeline.readers.rasters import open_raster_asset, read_header
from pipeline.scenes import Access, Asset, Plane, Window
from support import save_scene, textured

LOSSLESS = [
    None,
    "lzw",
    "deflate",
    "zstd",
    "packbits",
    "lzma",
    "lerc",
    "lerc_deflate",
    "lerc_zstd",
    "webp",
]
PREDICTED = {"lzw", "deflate", "zstd"}
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float32", "float64")


def asset_of(path: Path, access: Access, bands: tuple[int, ...] | None = None) -> Asset:
    header = read_header(str(path), access)
    numbers = range(header.num_bands) if bands is None else bands
    planes = tuple(Plane(f"b{n}", n, header.nodata[n]) for n in numbers)
    return Asset(str(path), "raster", header.grid, header.dtype, planes, header.block_shape, "")


def access_to(folder: Path, **options: object) -> Access:
    return Access(roots=(str(folder.resolve()),), **options)


def read(path: Path, window: Window, bands=None) -> tuple[np.ndarray, np.ndarray | None]:
    access = access_to(path.parent)
    with open_raster_asset(asset_of(path, access, bands), access) as reader:
        return reader.read(window), reader.readable(window)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


@st.composite
def windows(draw, height, width):
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Window(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


@st.composite
def layouts(draw):
    """(pixels [band, y, x], creation options) of a GeoTIFF that keeps every bit."""
    dtype = np.dtype(draw(st.sampled_from((*INTEGERS, *FLOATS))))
    bands, height, width = (draw(st.integers(1, high)) for high in (5, 70, 70))
    options = {
        "interleave": draw(st.sampled_from(["pixel", "band"])),
        "bigtiff": draw(st.sampled_from(["YES", "NO"])),
        "endianness": draw(st.sampled_from(["LITTLE", "BIG"])),
        "sparse_ok": draw(st.sampled_from(["TRUE", "FALSE"])),
        "photometric": draw(st.sampled_from(["MINISBLACK", "MINISWHITE"])),
    }
    if draw(st.booleans()):
        side = st.sampled_from([16, 32, 48])
        options |= {"tiled": True, "blockxsize": draw(side), "blockysize": draw(side)}
    else:
        options |= {"tiled": False, "blockysize": draw(st.integers(1, 70))}
    compress = draw(st.sampled_from(LOSSLESS))
    if compress == "webp":
        dtype, bands = np.dtype("uint8"), draw(st.sampled_from([3, 4]))
        options |= {"webp_lossless": True, "interleave": "pixel"}
    if compress is not None and "lerc" in compress and dtype in ("int64", "uint64"):
        dtype = np.dtype("int32")
    if compress is not None:
        options["compress"] = compress
    if compress in PREDICTED:
        options["predictor"] = draw(st.sampled_from([1, 2, 3] if dtype.kind == "f" else [1, 2]))
    if compress is None and dtype in ("uint8", "uint16") and draw(st.booleans()):
        options["nbits"] = draw(st.integers(1, 7) if dtype == "uint8" else st.integers(9, 15))
    if draw(st.booleans()) and dtype not in ("int64", "uint64"):
        options["nodata"] = draw(st.sampled_from([0, 1, 100]))
    return _pixels(draw, dtype, (bands, height, width), options), options


def _pixels(draw, dtype, shape, options):
    """Random bits, smooth numbers, or mostly zeros. Codecs of numbers do not promise to keep each NaN's
    bits, so those get finite ones."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["bits", "smooth", "sparse"]))
    if kind == "smooth" or (dtype.kind == "f" and "lerc" in options.get("compress", "")):
        pixels = np.cumsum(rng.integers(0, 3, shape), axis=2).astype(dtype)
    else:
        pixels = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    if kind == "sparse":
        pixels = np.where(rng.random(shape) < 0.01, pixels, dtype.type(0))
    if "nbits" in options:
        pixels = pixels & dtype.type(2 ** options["nbits"] - 1)
    return np.ascontiguousarray(pixels)


@settings(max_examples=250)
@given(st.data(), layouts())
def test_every_layout_reads_back_bit_for_bit(tmp_path, data, layout):
    pixels, options = layout
    path = tmp_path / "scene.tif"
    try:
        save_scene(path, pixels, **options)
    except rasterio.errors.RasterioError as error:
        # A codec that this GDAL was built without.
        assume("missing codec" not in str(error) and "not supported" not in str(error))
        raise
    window = data.draw(windows(*pixels.shape[1:]))
    top, left, height, width = window
    bands = data.draw(st.permutations(range(len(pixels))))[: data.draw(st.integers(1, len(pixels)))]
    found, readable = read(path, window, tuple(bands))
    assert same_bits(found, pixels[list(bands), top : top + height, left : left + width])
    assert readable is None
    whole, _ = read(path, Window(0, 0, *pixels.shape[1:]))
    assert same_bits(whole, pixels)


@pytest.mark.parametrize("compress", ["deflate", "lzw", "zstd", "lerc"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_a_cloud_optimised_file_with_overviews_reads_its_full_resolution(tmp_path, dtype, compress):
    pixels = textured((3, 700, 650), dtype="uint16").astype(dtype)
    plain = save_scene(tmp_path / "plain.tif", pixels)
    with rasterio.open(plain) as source:
        profile = {**source.profile, "driver": "COG", "compress": compress, "blocksize": 128}
    for name in ("tiled", "blockxsize", "blockysize", "interleave"):
        profile.pop(name, None)
    with rasterio.open(tmp_path / "cog.tif", "w", **profile) as cog:
        cog.write(pixels)
    with rasterio.open(tmp_path / "cog.tif") as cog:
        assert cog.overviews(1)
    found, _ = read(tmp_path / "cog.tif", Window(100, 3, 500, 647))
    assert same_bits(found, pixels[:, 100:600, 3:])


def test_floats_of_sixteen_bits_are_read_as_the_float32_they_hold(tmp_path):
    pixels = np.random.default_rng(0).normal(0, 1, (1, 20, 20)).astype(np.float16)
    path = save_scene(tmp_path / "half.tif", pixels.astype(np.float32), nbits=16)
    found, _ = read(path, Window(0, 0, 20, 20))
    assert same_bits(found, pixels.astype(np.float32))


def test_png_files_read_bit_for_bit_and_jpeg_as_the_library_decodes_it(tmp_path):
    pixels = textured((3, 40, 50), dtype="uint16") // 40
    for name, driver, dtype in (("a.png", "PNG", "uint16"), ("a.jpg", "JPEG", "uint8")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(
                tmp_path / name, "w", driver=driver, count=3, height=40, width=50, dtype=dtype
            ) as image:
                image.write(pixels.astype(dtype))
            with rasterio.open(tmp_path / name) as image:
                decoded = image.read()
        found, _ = read(tmp_path / name, Window(5, 6, 30, 40))
        assert same_bits(found, decoded[:, 5:35, 6:46])
    assert same_bits(read(tmp_path / "a.png", Window(0, 0, 40, 50))[0], pixels)


def test_real_imagery_reads_as_rasterio_reads_it(real_data):
    folders = [real_data / name for name in ("satclip", "ravaen", "cog", "terramind")]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.tif"))]
    assert paths
    for path in paths:
        with rasterio.open(path) as raster:
            pixels = raster.read()
        found, _ = read(path, Window(0, 0, *pixels.shape[1:]))
        assert same_bits(found, pixels)


def test_a_mask_inside_the_file_says_what_is_readable(tmp_path):
    pixels, shown = textured((2, 30, 30)), np.random.default_rng(0).random((30, 30)) < 0.5
    path = save_scene(tmp_path / "a.tif", pixels)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as raster:
        raster.write_mask(shown)
    found, readable = read(path, Window(3, 4, 20, 21))
    assert same_bits(found, pixels[:, 3:23, 4:25])
    assert (readable == shown[3:23, 4:25]).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_an_alpha_band_says_what_is_readable_unless_it_is_read_as_data(tmp_path, dtype):
    pixels = textured((4, 30, 30)).astype(dtype)
    pixels[3, :10] = 0
    path = save_scene(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES")
    _, readable = read(path, Window(0, 0, 30, 30), (0, 1, 2))
    assert (readable == (pixels[3] != 0)).all()
    found, readable = read(path, Window(0, 0, 30, 30))
    assert same_bits(found, pixels)
    assert readable is None


def test_the_fourth_band_of_a_plain_file_of_bytes_hides_nothing(tmp_path):
    # GDAL calls it alpha unless told otherwise; in aerial imagery it is the near infrared.
    pixels = np.zeros((4, 10, 10), np.uint8)
    path = save_scene(tmp_path / "naip.tif", pixels)
    with rasterio.open(path) as raster:
        assert raster.colorinterp[3] == rasterio.enums.ColorInterp.alpha
    assert read(path, Window(0, 0, 10, 10))[1] is None


def test_masks_beside_the_file_do_not_count(tmp_path):
    path = save_scene(tmp_path / "a.tif", textured((1, 10, 10)))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as raster:
        raster.write_mask(np.zeros((10, 10), np.bool_))
    assert (tmp_path / "a.tif.msk").exists()
    assert read(path, Window(0, 0, 10, 10))[1] is None


def refused(path: Path, access: Access | None = None) -> str:
    with pytest.raises(SceneError) as raised:
        read_header(str(path), access or access_to(path.parent))
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_complex_pixels_are_refused(tmp_path, dtype):
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=4, width=4, dtype=dtype, crs="EPSG:32632",
        transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
    ):  # fmt: skip
        pass
    assert refused(path) == f"its pixels are {dtype}; expected real numbers"


def test_bands_of_several_types_are_refused(tmp_path, monkeypatch):
    raster = SimpleNamespace(dtypes=("uint8", "uint16"))
    monkeypatch.setattr(rasters, "open_raster", lambda *_: contextlib.nullcontext(raster))
    assert "several types ['uint16', 'uint8']" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("driver", ["VRT", "PNG", "HFA", "ENVI"])
def test_a_file_of_another_driver_named_tif_is_refused(tmp_path, driver):
    path = tmp_path / "a.tif"
    if driver == "VRT":
        target = save_scene(tmp_path / "b.tif", textured((1, 8, 8)))
        rasterio.shutil.copy(target, path, driver="VRT")
    else:
        save = {"driver": driver, "count": 1, "height": 8, "width": 8, "dtype": "uint8"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, "w", **save) as raster:
                raster.write(np.ones((1, 8, 8), np.uint8))
    assert "not recognized" in refused(path)


def test_other_suffixes_and_drivers_that_are_not_allowed_are_refused(tmp_path):
    assert "ends in '.vrt'; expected one of .tif" in refused(tmp_path / "a.vrt")
    assert "run.jpeg2000" in refused(tmp_path / "a.jp2")
    assert "slowly" not in refused(tmp_path / "a.tif")


def test_a_block_that_decodes_to_too_much_is_refused_from_the_header(tmp_path):
    pixels = np.zeros((1, 2048, 2048), np.uint16)
    options = {"tiled": True, "blockxsize": 2048, "blockysize": 2048, "compress": "zstd"}
    path = save_scene(tmp_path / "bomb.tif", pixels, **options)
    assert path.stat().st_size < 10_000
    message = refused(path, access_to(tmp_path, max_block_bytes=2**20))
    assert "decodes to 8388608 bytes (2048 x 2048 px), more than run.max_block_bytes" in message


def test_truncated_and_empty_files_are_refused_or_fail_on_reading(tmp_path):
    content = save_scene(
        tmp_path / "a.tif", textured((1, 200, 200)), compress="deflate"
    ).read_bytes()
    for kept in (0, 3, 100, len(content) // 2):
        path = tmp_path / "cut.tif"
        path.write_bytes(content[:kept])
        with pytest.raises(SceneError):
            read(path, Window(0, 0, 200, 200))


def test_files_outside_the_roots_are_refused_also_through_links(tmp_path):
    outside = save_scene(tmp_path / "elsewhere" / "a.tif", textured((1, 8, 8)))
    root = tmp_path / "archive"
    root.mkdir()
    (root / "link.tif").symlink_to(outside)
    for path in (outside, root / "link.tif", root / ".." / "elsewhere" / "a.tif"):
        assert "outside" in refused(path, access_to(root))
    assert "archive2" in refused(tmp_path / "archive2" / "a.tif", access_to(root))
