"""Zero borders against a plain flood fill, however the scene is cut into strips."""

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.readers.borders import find_border
from pipeline.scenes import Window


def border_of(pixels: np.ndarray, strip_rows: int) -> np.ndarray:
    """The whole mask of pixels [plane, y, x], read in strips."""
    height, width = pixels.shape[1:]

    def read(window: Window) -> np.ndarray:
        assert window.left == 0
        assert window.width == width
        assert window.height <= strip_rows
        return pixels[:, window.top : window.top + window.height]

    return find_border(read, height, width, strip_rows).window(Window(0, 0, height, width))


def flooded(pixels: np.ndarray) -> np.ndarray:
    """Zeros that a flood from the edge reaches, one pixel at a time."""
    zero = (pixels == 0).all(axis=0)
    height, width = zero.shape
    reached = np.zeros_like(zero)
    waiting = [(y, x) for y in range(height) for x in (0, width - 1)]
    waiting += [(y, x) for y in (0, height - 1) for x in range(width)]
    while waiting:
        y, x = waiting.pop()
        if 0 <= y < height and 0 <= x < width and zero[y, x] and not reached[y, x]:
            reached[y, x] = True
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return reached


@st.composite
def scenes(draw):
    """Pixels [plane, y, x] with zeros in many shapes: mazes are what seams get wrong."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)))
    share = draw(st.sampled_from([0.0, 0.3, 0.5, 0.65, 0.8, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    zero = rng.random(shape[1:]) < share
    pixels = np.where(zero, 0, rng.integers(1, 9, shape)).astype(np.uint16)
    single = rng.random(shape) < 0.05
    return np.where(single, 0, pixels)


@given(scenes(), st.integers(1, 30))
def test_the_border_is_what_a_flood_from_the_edge_reaches(pixels, strip_rows):
    assert (border_of(pixels, strip_rows) == flooded(pixels)).all()


@given(scenes(), st.data())
def test_windows_are_cut_from_the_whole(pixels, data):
    height, width = pixels.shape[1:]
    mask = find_border(lambda w: pixels[:, w.top : w.top + w.height], height, width, 5)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    size = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    expected = flooded(pixels)[top : top + size[0], left : left + size[1]]
    found = mask.window(Window(top, left, *size))
    assert found.dtype == np.bool_
    assert (found == expected).all()


@pytest.mark.parametrize("strip_rows", [1, 2, 3, 7, 100])
def test_a_spiral_that_crosses_every_seam_is_followed_to_its_end(strip_rows):
    size = 31
    pixels = np.ones((1, size, size), np.uint8)
    for ring in range(0, size // 2, 2):
        low, high = ring, size - 1 - ring
        pixels[0, low, low : high + 1] = pixels[0, high, low : high + 1] = 0
        pixels[0, low : high + 1, low] = pixels[0, low : high + 1, high] = 0
        pixels[0, low + 1, low] = 1
        pixels[0, low + 2, low + 1] = 0
    expected = flooded(pixels)
    assert (expected == (pixels[0] == 0)).all()
    assert (border_of(pixels, strip_rows) == expected).all()


def test_neither_scattered_zeros_nor_zeros_of_one_band_are_border():
    pixels = np.ones((2, 20, 20), np.uint16)
    pixels[:, 8:12, 8:12] = 0
    pixels[0, :, 0] = 0
    assert not border_of(pixels, 6).any()
    pixels[:, 10, 12:] = 0
    assert border_of(pixels, 6).sum() == 16 + 8


def test_diagonal_neighbours_are_not_connected_and_nan_is_not_zero():
    pixels = np.ones((1, 4, 4), np.float32)
    pixels[0, 0, 0] = pixels[0, 1, 1] = 0
    pixels[0, 3] = np.nan
    pixels[0, 0, 3] = -0.0
    found = border_of(pixels, 2)
    assert np.argwhere(found).tolist() == [[0, 0], [0, 3]]


def test_a_scene_without_a_border_keeps_no_bits_and_any_other_one_per_pixel():
    pixels = np.ones((1, 64, 64), np.uint8)
    pixels[0, 30, 30] = 0
    assert find_border(lambda w: pixels[:, w.top : w.top + w.height], 64, 64, 16).bits is None
    pixels[0, 0, 0] = 0
    mask = find_border(lambda w: pixels[:, w.top : w.top + w.height], 64, 64, 16)
    assert mask.bits.nbytes == 64 * 64 // 8


@given(hnp.arrays(np.bool_, (9, 17)), st.integers(1, 9), st.integers(1, 9))
def test_the_number_of_strips_does_not_matter(zero, one, other):
    pixels = (~zero)[None].astype(np.float64)
    assert (border_of(pixels, one) == border_of(pixels, other)).all()


def test_a_swath_in_real_pixels(satclip):
    with rasterio.open(satclip / "patch_445.tif") as raster:
        pixels = raster.read()
    scattered = (pixels == 0).all(axis=0)
    y, x = np.mgrid[:256, :256]
    swath = x + 0.3 * y < 90
    pixels[:, swath] = 0
    found = border_of(pixels, 50)
    assert (found[swath]).all()
    assert (found & ~swath).sum() <= scattered.sum()
