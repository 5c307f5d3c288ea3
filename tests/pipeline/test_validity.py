"""Which pixels count: nodata in the numbers' own type, quality masks, masks of other resolutions."""

import warnings

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.readers.validity import holds_data, mask_flags, onto_coarser, onto_finer, valid_pixels
from pipeline.scenes import Plane
from pipeline.settings.modality import MaskConfig

MASKS = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
FLOAT32_LOWEST = -3.4028234663852886e38


def planes(*nodata):
    return tuple(Plane(f"b{n}", n, tag) for n, tag in enumerate(nodata))


@pytest.mark.parametrize(
    ("dtype", "numbers", "tag", "valid"),
    [
        ("uint8", [0, 255, 7], 255, [1, 0, 1]),
        ("uint16", [0, 55537, 65535], -9999, [1, 1, 1]),  # 55537 is -9999 wrapped
        ("uint16", [0, 65535], 65536, [1, 1]),
        ("uint8", [0, 1], 0.5, [1, 1]),
        ("int16", [-9999, -9998], -9999.0, [0, 1]),
        ("int16", [0, -1], float("nan"), [1, 1]),
        ("uint16", [0, 65535], float("inf"), [1, 1]),
        ("uint16", [0, 65535], 1e20, [1, 1]),
        ("int64", [-(2**63), -(2**63) + 1], -(2.0**63), [0, 1]),
        ("int64", [2**63 - 1, 2**63 - 2], float(2**63 - 1), [0, 1]),
        ("uint64", [2**64 - 1, 2**64 - 2, 0], float(2**64 - 1), [0, 1, 1]),
        ("uint64", [2**53 + 1, 2**53], 2**53 + 1, [0, 1]),
        ("float32", [-9999, -9999.001, 0], -9999, [0, 1, 1]),
        ("float32", [np.float32(0.1), 0.11], 0.1, [0, 1]),
        ("float32", [1e20, 9.9e19], 1e20, [0, 1]),
        ("float32", [np.float32(-9999.1), -9999], -9999.099609375, [0, 1]),
        ("float32", [np.finfo(np.float32).max, 1e30], 3.4028235e38, [0, 1]),
        ("float32", [np.finfo(np.float32).min, -1e30], -3.40282347e38, [0, 1]),
        ("float32", [np.finfo(np.float32).min, -1e30, 3e38], -3.40282e38, [0, 1, 1]),
        ("float32", [np.float32(-3.4e38), -1e38, 1e38], -3.4e38, [0, 1, 1]),
        ("float32", [np.finfo(np.float32).min, 0], -1.7976931348623157e308, [0, 1]),
        ("float64", [-1.7976931348623157e308, 1e300, FLOAT32_LOWEST], -1.79769e308, [0, 1, 1]),
        ("float64", [FLOAT32_LOWEST, 0], FLOAT32_LOWEST, [0, 1]),
        ("float32", [np.nan, np.inf, -np.inf, 0], None, [0, 0, 0, 1]),
        ("float32", [np.nan, np.inf, 0], float("nan"), [0, 0, 1]),
        ("float32", [np.nan, np.inf, 0], float("-inf"), [0, 0, 1]),
        ("float32", [-0.0, 0.0, 1e-40], 0, [0, 0, 1]),
    ],
)
def test_nodata_is_compared_in_the_type_of_the_numbers(dtype, numbers, tag, valid):
    assert holds_data(np.array(numbers, dtype), tag).tolist() == [bool(v) for v in valid]


@given(
    st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]),
    st.floats(allow_nan=True, allow_infinity=True) | st.integers(-70000, 70000),
    st.integers(0, 2**32 - 1),
)
def test_a_tag_matches_the_numbers_it_was_read_from_and_no_tag_fails(dtype, tag, seed):
    bits = np.random.default_rng(seed).integers(0, 256, 64 * np.dtype(dtype).itemsize, np.uint8)
    numbers = bits.view(dtype)
    finite = np.isfinite(numbers)
    data = holds_data(numbers, float(tag))
    assert data.shape == numbers.shape
    assert not data[~finite].any()
    for number in numbers[finite][:4]:
        assert not holds_data(numbers[finite], float(number))[numbers[finite] == number].any()
    assert (holds_data(numbers, None) == finite).all()


def test_a_pixel_is_valid_where_every_plane_is_and_the_reader_lets_it_through():
    pixels = np.array([[[1, 0, 2, 3]], [[1, 1, 9, 3]]], np.int16)
    readable = np.array([[True, True, True, False]])
    assert valid_pixels(pixels, planes(0, 9), readable).tolist() == [[True, False, False, False]]
    assert valid_pixels(pixels, planes(9, 0), None).tolist() == [[True, True, True, True]]
    assert readable.tolist() == [[True, True, True, False]]


def test_nan_edges_of_real_series_are_what_numpy_says(real_data):
    for path in sorted((real_data / "ravaen").rglob("*.tif")):
        with rasterio.open(path) as raster:
            pixels = raster.read()
        found = valid_pixels(pixels, planes(*[None] * len(pixels)), None)
        assert (found == np.isfinite(pixels).all(axis=0)).all()


def test_classes():
    scl = np.array([[0, 1, 3, 4, 8, 9, 10, 11]], np.uint8)
    mask = MaskConfig(band="scl", cloud=(8, 9, 10), invalid=(0, 1))
    cloud, invalid = mask_flags(scl, mask)
    assert cloud.tolist() == [[False, False, False, False, True, True, True, False]]
    assert invalid.tolist() == [[True, True] + [False] * 6]
    as_floats = np.where(scl == 4, np.nan, scl).astype(np.float32)
    assert (mask_flags(as_floats, mask)[0] == cloud).all()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int64", "uint64", "float32", "float64"])
def test_bits_also_in_files_of_floats(dtype):
    qa60 = np.array([[0, 1024, 2048, 3072, 1]], dtype)
    mask = MaskConfig(band="qa60", kind="bits", cloud=(10, 11), invalid=(0,))
    cloud, invalid = mask_flags(qa60, mask)
    assert cloud.tolist() == [[False, True, True, True, False]]
    assert invalid.tolist() == [[False, False, False, False, True]]


def test_numbers_that_hold_no_flags_are_neither_cloud_nor_invalid():
    mask = MaskConfig(band="qa", kind="bits", cloud=tuple(range(64)), invalid=(0, 63))
    odd = np.array([[np.nan, np.inf, -1, 1024.5, -np.inf, 2.0**64, 1e300]], np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cloud, invalid = mask_flags(odd, mask)
    assert not cloud.any()
    assert not invalid.any()


def test_the_sign_bit_of_a_narrow_type_is_its_own_highest_bit():
    values = np.array([[-128, 127]], np.int8)
    highest = MaskConfig(band="qa", kind="bits", cloud=(7,), invalid=(8, 63))
    cloud, invalid = mask_flags(values, highest)
    assert cloud.tolist() == [[True, False]]
    assert not invalid.any()


@given(hnp.arrays(np.uint16, (3, 4)), st.sets(st.integers(0, 15), min_size=1))
def test_bits_are_those_of_the_binary_digits(values, positions):
    mask = MaskConfig(band="qa", kind="bits", cloud=tuple(positions))
    cloud, _ = mask_flags(values, mask)
    expected = [[any(f"{v:016b}"[15 - p] == "1" for p in positions) for v in row] for row in values]
    assert cloud.tolist() == expected


def test_probability_of_an_unknown_pixel_is_no_cloud():
    mask = MaskConfig(band="p", kind="probability", cloud_above=60)
    cloud, invalid = mask_flags(np.array([[60, 61, 255]], np.uint8), mask, nodata=255)
    assert cloud.tolist() == [[False, True, False]]
    assert not invalid.any()
    cloud, _ = mask_flags(np.array([[0.5, np.nan, 61]], np.float32), mask)
    assert cloud.tolist() == [[False, False, True]]


def test_codes_count_even_where_the_tag_calls_them_nodata_but_not_beyond_the_mask():
    # Landsat's QA_PIXEL has nodata 1, its fill bit.
    qa = np.array([[1, 1, 8]], np.uint16)
    mask = MaskConfig(band="qa", kind="bits", cloud=(3,), invalid=(0,))
    covered = np.array([[True, False, True]])
    cloud, invalid = mask_flags(qa, mask, nodata=1, covered=covered)
    assert invalid.tolist() == [[True, False, False]]
    assert cloud.tolist() == [[False, False, True]]


@given(MASKS, st.integers(1, 4), st.integers(1, 4))
def test_a_mask_repeated_onto_finer_pixels_and_back_is_itself(mask, factor_y, factor_x):
    finer = onto_finer(mask, factor_y, factor_x)
    assert finer.shape == (mask.shape[0] * factor_y, mask.shape[1] * factor_x)
    for (y, x), value in np.ndenumerate(finer):
        assert value == mask[y // factor_y, x // factor_x]
    assert (onto_coarser(finer, factor_y, factor_x) == mask).all()


@given(MASKS, st.integers(1, 4), st.integers(1, 4))
def test_a_larger_pixel_is_marked_where_any_inside_is_also_at_a_ragged_edge(mask, fy, fx):
    coarser = onto_coarser(mask, fy, fx)
    assert coarser.shape == (-(-mask.shape[0] // fy), -(-mask.shape[1] // fx))
    for (y, x), value in np.ndenumerate(coarser):
        assert value == mask[y * fy : (y + 1) * fy, x * fx : (x + 1) * fx].any()
