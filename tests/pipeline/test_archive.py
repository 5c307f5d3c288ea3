from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.windows import Window

from pipeline.archive import find_scenes, open_raster, read_header, read_window
from pipeline.errors import ArchiveError, SceneError

BUDGET = 2**20


def pixels(dtype="uint16", bands=2):
    return np.arange(bands * 40 * 50).reshape(bands, 40, 50).astype(dtype)


def read(path: Path, nodata=None, window=Window(0, 0, 50, 40)):  # noqa: B008
    scene = read_header(path, path.parent, BUDGET)
    with open_raster(str(path)) as raster:
        return read_window(raster, scene, nodata, window)


def test_scenes_are_found_below_the_folder_in_order(write_scene, tmp_path):
    for name in ("b.tif", "deep/er/a.TIFF", "a.tif"):
        write_scene(name, pixels())
    (tmp_path / "archive" / "notes.txt").write_text("no scene")
    source = find_scenes(str(tmp_path / "archive"))
    found = [file.relative_to(source.root).as_posix() for file in source.files]
    assert found == ["a.tif", "b.tif", "deep/er/a.TIFF"]


def test_a_glob_selects_scenes(write_scene, tmp_path):
    for name in ("x/a.tif", "y/a.tif", "y/b.tif"):
        write_scene(name, pixels())
    source = find_scenes(str(tmp_path / "archive" / "*" / "a.tif"))
    assert source.root == tmp_path / "archive"
    assert [file.parent.name for file in source.files] == ["x", "y"]


def test_header_facts(write_scene):
    path = write_scene("a.tif", pixels(), nodata=7)
    scene = read_header(path, path.parent, BUDGET)
    assert (scene.id, scene.num_bands, scene.height, scene.width) == ("a", 2, 40, 50)
    assert (scene.dtype, scene.nodata, scene.crs) == ("uint16", (7.0, 7.0), "EPSG:32632")
    assert scene.ground_sample_distance_m == 10


@pytest.mark.parametrize(
    ("crs", "transform", "metres"),
    [
        ("EPSG:32632", Affine(6, 8, 500_000, 8, -6, 5_000_000), 10),
        ("EPSG:2263", Affine(10, 0, 1_000_000, 0, -10, 200_000), 10 * 1200 / 3937),
        ("EPSG:4326", Affine(1e-4, 0, 9, 0, -1e-4, 45), None),
    ],
    ids=["rotated", "survey feet", "degrees"],
)
def test_the_ground_sample_distance_is_in_metres_or_unknown(write_scene, crs, transform, metres):
    path = write_scene("a.tif", pixels(), crs=crs, transform=transform)
    found = read_header(path, path.parent, BUDGET).ground_sample_distance_m
    assert found == (None if metres is None else pytest.approx(metres))


def test_a_scene_without_georeference_gets_none(write_scene):
    path = write_scene("a.tif", pixels(), crs=None)
    scene = read_header(path, path.parent, BUDGET)
    assert scene.crs is scene.transform is scene.ground_sample_distance_m is None


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("interleave", ["band", "pixel"])
def test_windows_hold_the_files_own_numbers(write_scene, dtype, interleave):
    path = write_scene("a.tif", pixels(dtype), interleave=interleave, compress="deflate")
    found, valid = read(path, window=Window(10, 5, 20, 30))
    np.testing.assert_array_equal(found, pixels(dtype)[:, 5:35, 10:30])
    assert found.dtype == dtype
    assert valid.all()


def test_nodata_in_any_band_makes_a_pixel_invalid(write_scene):
    image = pixels() + 1
    image[1, 3, 4] = 0
    path = write_scene("a.tif", image, nodata=0)
    _, valid = read(path)
    assert np.argwhere(~valid).tolist() == [[3, 4]]


def test_configured_nodata_overrides_the_tag(write_scene):
    image = pixels() + 1
    image[:, 3, 4], image[:, 5, 6] = 0, 9999
    path = write_scene("a.tif", image, nodata=0)
    _, valid = read(path, nodata=9999)
    assert np.argwhere(~valid).tolist() == [[5, 6]]


def test_zero_is_a_value_unless_something_says_otherwise(write_scene):
    _, valid = read(write_scene("a.tif", np.zeros((2, 40, 50), np.uint16)))
    assert valid.all()


def test_nan_and_infinity_are_invalid(write_scene):
    image = pixels("float32")
    image[0, 1, 2], image[1, 3, 4] = np.nan, -np.inf
    _, valid = read(write_scene("a.tif", image))
    assert np.argwhere(~valid).tolist() == [[1, 2], [3, 4]]


def test_a_mask_inside_the_file_counts(write_scene):
    path = write_scene("a.tif", pixels())
    mask = np.full((40, 50), 255, np.uint8)
    mask[7, 8] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as raster:
        raster.write_mask(mask)
    _, valid = read(path)
    assert np.argwhere(~valid).tolist() == [[7, 8]]


def test_a_vrt_under_another_name_is_not_opened(write_scene, tmp_path):
    inner = write_scene("inner.tif", pixels())
    vrt = tmp_path / "archive" / "outer.tif"
    vrt.write_text(
        '<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand dataType="UInt16" band="1">'
        f"<SimpleSource><SourceFilename>{inner}</SourceFilename></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(SceneError, match="not recognized"):
        read_header(vrt, vrt.parent, BUDGET)


def test_a_link_out_of_the_folder_is_not_followed(write_scene, tmp_path):
    outside = write_scene("../outside.tif", pixels())
    link = tmp_path / "archive" / "link.tif"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(SceneError, match="outside.tif, outside"):
        read_header(link, link.parent, BUDGET)


def test_a_block_that_decodes_to_too_much_is_refused_from_the_header(write_scene):
    path = write_scene(
        "a.tif", np.zeros((1, 2048, 2048), np.uint8),
        tiled=True, blockxsize=2048, blockysize=2048, compress="deflate",
    )  # fmt: skip
    assert path.stat().st_size < 50_000
    with pytest.raises(SceneError, match="4194304 bytes .* more than run.max_block_bytes 1048576"):
        read_header(path, path.parent, BUDGET)


def test_complex_pixels_are_refused(write_scene):
    path = write_scene("a.tif", pixels("complex64"))
    with pytest.raises(SceneError, match="complex64; expected real numbers"):
        read_header(path, path.parent, BUDGET)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no scene found; expected files ending in .tif or .tiff"),
    ],
)
def test_a_source_without_scenes_is_refused(tmp_path, make, message):
    make(tmp_path / "archive")
    with pytest.raises(ArchiveError, match=message):
        find_scenes(str(tmp_path / "archive"))


def test_scenes_that_differ_in_the_suffix_only_are_refused(write_scene, tmp_path):
    write_scene("a.tif", pixels())
    write_scene("a.tiff", pixels())
    with pytest.raises(ArchiveError, match="same name but for the suffix"):
        find_scenes(str(tmp_path / "archive"))
