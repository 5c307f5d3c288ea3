import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import rasterio
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.bandstats import BandStats, BandSummary
from pipeline.errors import IntegrityError

SMALL = ("uint8", "int8", "uint16", "int16")
WIDE = ("uint32", "int32", "uint64", "int64", "float16", "float32", "float64")
BOUND = 2.0**-13


def numbers_of(dtype):
    """Numbers like those of real pixels and the hardest ones; squares of the largest leave float64."""
    if np.dtype(dtype).kind != "f":
        return hnp.from_dtype(np.dtype(dtype))
    any_number = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    return any_number | st.sampled_from(np.array([0.0, -0.0, 0.1, 1000.5, -12.25], dtype).tolist())


@st.composite
def pixels_of(draw, dtypes=SMALL + WIDE, smallest=0):
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(smallest, 40)))
    return draw(hnp.arrays(dtype, shape, elements=numbers_of(dtype)))


def facts(stats):
    """Everything that can be asked, bit for bit."""
    rows = [stats.count, stats.min, stats.max, stats.mean, stats.std]
    rows += [stats.percentile(q) for q in (0, 1, 2, 50, 98, 99, 100)]
    return [np.asarray(row, np.float64).tobytes() for row in rows]


@given(pixels_of(), st.data())
def test_any_split_in_any_order_gives_the_whole(pixels, data):
    order = np.array(data.draw(st.permutations(range(pixels.shape[1]))), np.int64)
    cuts = sorted(data.draw(st.lists(st.integers(0, pixels.shape[1]), max_size=4)))
    pieces = [BandStats.of(piece) for piece in np.split(pixels[:, order], cuts, axis=1)]
    while len(pieces) > 1:
        place = data.draw(st.integers(0, len(pieces) - 2))
        first, second = pieces.pop(place), pieces.pop(place)
        pieces.insert(
            place, second.merge(first) if data.draw(st.booleans()) else first.merge(second)
        )
    assert facts(pieces[0]) == facts(BandStats.of(pixels))


@given(pixels_of(smallest=1))
def test_mean_and_std_are_those_of_exact_fractions(pixels):
    stats = BandStats.of(pixels)
    for band, mean, std in zip(pixels.astype(np.float64), stats.mean, stats.std, strict=True):
        exact = [Fraction(value) for value in band.tolist()]
        middle = sum(exact) / len(exact)
        variance = sum((value - middle) ** 2 for value in exact) / len(exact)
        assert mean == float(middle)
        unit = Fraction(1, 2**1074)
        assert abs(Fraction(std) ** 2 - variance) <= variance / 2**50 + unit
        assert std > 0 or variance <= unit**2


@given(pixels_of(dtypes=SMALL, smallest=1), st.integers(0, 100))
def test_percentiles_of_small_integers_are_exact(pixels, q):
    count = pixels.shape[1]
    rank = max(1, -(-q * count // 100))
    expected = np.sort(pixels, axis=1)[:, rank - 1]
    np.testing.assert_array_equal(BandStats.of(pixels).percentile(q), expected)
    assume(q * count % 100)
    np.testing.assert_array_equal(np.percentile(pixels, q, axis=1, method="inverted_cdf"), expected)


@given(pixels_of(dtypes=WIDE, smallest=1), st.integers(0, 100))
def test_percentiles_of_other_numbers_are_within_the_bound(pixels, q):
    rank = max(1, -(-q * pixels.shape[1] // 100))
    expected = np.sort(pixels.astype(np.float64), axis=1)[:, rank - 1]
    found = BandStats.of(pixels).percentile(q)
    assert (np.abs(found - expected) <= BOUND * np.abs(expected) + 2.0**-1030).all()


@given(pixels_of(smallest=1), st.floats(0, 100), st.floats(0, 100))
def test_percentiles_rise_from_the_smallest_to_the_largest(pixels, p, q):
    stats = BandStats.of(pixels)
    low, high = stats.percentile(min(p, q)), stats.percentile(max(p, q))
    assert (low <= high).all()
    np.testing.assert_array_equal(stats.percentile(0), pixels.min(axis=1).astype(np.float64))
    np.testing.assert_array_equal(stats.percentile(100), pixels.max(axis=1).astype(np.float64))


@given(st.lists(st.integers(-8192, 8192), min_size=1, max_size=60), st.integers(0, 100))
def test_whole_numbers_to_8192_are_exact_in_any_type(values, q):
    exact = BandStats.of(np.array([values], np.int16)).percentile(q)
    for dtype in ("int64", "float32", "float64"):
        np.testing.assert_array_equal(BandStats.of(np.array([values], dtype)).percentile(q), exact)


def test_a_table_by_hand():
    stats = BandStats.of(np.array([[1, 2, 3, 4], [5, 5, 5, 9]], np.uint16))
    assert stats.count.tolist() == [4, 4]
    assert stats.mean.tolist() == [2.5, 6.0]
    assert stats.std.tolist() == pytest.approx([math.sqrt(1.25), math.sqrt(3)], rel=1e-15)
    assert stats.percentile(50).tolist() == [2, 5]
    assert stats.percentile(51).tolist() == [3, 5]
    assert stats.percentile(75).tolist() == [3, 5]
    assert stats.percentile(76).tolist() == [4, 9]


@pytest.mark.parametrize("dtype", SMALL + WIDE)
def test_constants(dtype):
    value = np.array(0.1 if np.dtype(dtype).kind == "f" else 7, dtype)
    stats = BandStats.of(np.full((1, 1000), value))
    assert {float(fact[0]) for fact in (stats.mean, stats.min, stats.max, stats.percentile(3))} == {
        float(value)
    }
    assert stats.std[0] == 0
    ((low, high),) = stats.value_ranges(1, 99)
    assert (low, high) == (float(value), float(value) + 1)


def test_a_spread_far_from_zero_does_not_cancel():
    values = 1e9 + np.arange(5.0)
    assert BandStats.of(values[None]).std[0] == pytest.approx(math.sqrt(2), rel=1e-15)
    assert statistics.pvariance([1, 2, 3, 4, 5]) == 2


def test_the_largest_numbers_do_not_overflow():
    largest = np.finfo(np.float64).max
    stats = BandStats.of(np.array([[-largest, largest]]))
    assert (stats.mean[0], stats.std[0], stats.percentile(100)[0]) == (0, largest, largest)


def test_wide_ranges_never_close():
    assert BandStats.of(np.full((1, 3), 1e300)).value_ranges(1, 99)[0][1] > 1e300


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_nothing_is_the_neutral_element(dtype):
    nothing = BandStats.of(np.empty((2, 0), dtype))
    some = BandStats.of(np.array([[1, 2], [3, 4]], dtype))
    assert facts(nothing.merge(some)) == facts(some.merge(nothing)) == facts(some)
    assert nothing.count.tolist() == [0, 0]
    assert np.isnan([nothing.min, nothing.max, nothing.mean, nothing.std]).all()
    assert np.isnan(nothing.percentile(50)).all()
    with pytest.raises(ValueError, match="no pixel"):
        nothing.value_ranges(1, 99)


@pytest.mark.parametrize(
    "pixels",
    [
        np.array([[1.0, np.nan]]),
        np.array([[1.0, np.inf]], np.float32),
        np.array([[-np.inf]]),
        np.array([[1 + 2j]]),
        np.array([[True]]),
        np.zeros(3, np.uint8),
    ],
)
def test_what_has_no_statistics_is_refused(pixels):
    with pytest.raises(ValueError, match="pixels"):
        BandStats.of(pixels)


def test_other_bands_or_types_cannot_join():
    stats = BandStats.of(np.zeros((1, 2), np.uint8))
    for other in (np.zeros((2, 2), np.uint8), np.zeros((1, 2), np.uint16)):
        with pytest.raises(ValueError, match="cannot join those of 1 uint8 bands"):
            stats.merge(BandStats.of(other))


@pytest.mark.parametrize("q", [-1, 101, math.nan])
def test_a_percentile_lies_in_0_to_100(q):
    with pytest.raises(ValueError, match=r"lies in 0 \.\.\. 100"):
        BandStats.of(np.zeros((1, 2), np.uint8)).percentile(q)


def test_byte_order_and_strides_do_not_matter():
    values = np.arange(2000, dtype=np.int16).reshape(2, 1000) - 700
    expected = facts(BandStats.of(values))
    assert facts(BandStats.of(values.astype(">i2"))) == expected
    assert facts(BandStats.of(np.repeat(values, 3, axis=1)[:, ::3])) == expected
    assert facts(BandStats.of(values.T.copy().T)) == expected


def test_sums_of_squares_beyond_64_bits(monkeypatch):
    values = np.full((1, 10), 65535, np.uint16)
    expected = facts(BandStats.of(values))
    monkeypatch.setattr("pipeline.bandstats._INT64_SQUARES", 1)
    assert facts(BandStats.of(values)) == expected


@given(pixels_of())
def test_what_the_store_keeps_survives_json(pixels):
    stats = BandStats.of(pixels)
    names = [f"band_{band}" for band in range(len(pixels))]
    kept = stats.to_json(names)
    assert list(kept) == names
    for summary, entry in zip(stats.summaries(), kept.values(), strict=True):
        assert BandSummary.from_json(entry) == summary
        assert list(entry) == [
            "count", "mean", "std", "min", "max", "p01", "p02", "p50", "p98", "p99",
        ]  # fmt: skip
        assert (entry["mean"] is None) == (entry["count"] == 0)


@pytest.mark.parametrize("entry", [None, {}, {"count": -1}, {"count": "x"}])
def test_damaged_statistics_are_refused(entry):
    with pytest.raises(IntegrityError, match="store is damaged"):
        BandSummary.from_json(entry)


def test_real_imagery_agrees_with_numpy(real_data):
    for name in ("satclip/patch_445.tif", "terramind/S1RTC/637U_59R_1_3.tif"):
        with rasterio.open(real_data / name) as scene:
            pixels = scene.read().reshape(scene.count, -1)
        whole = BandStats.of(pixels)
        rows = [BandStats.of(part) for part in np.array_split(pixels, 7, axis=1)]
        merged = rows[0]
        for row in rows[1:]:
            merged = merged.merge(row)
        assert facts(merged) == facts(whole)
        numbers = pixels.astype(np.float64)
        np.testing.assert_allclose(whole.mean, numbers.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(whole.std, numbers.std(axis=1), rtol=1e-12)
        for q in (1, 2, 50, 98, 99):
            exact = np.percentile(numbers, q, axis=1, method="inverted_cdf")
            np.testing.assert_allclose(whole.percentile(q), exact, rtol=BOUND)
