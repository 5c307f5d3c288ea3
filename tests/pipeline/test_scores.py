import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracle
from pipeline import score_maps
from pipeline.errors import ConfigError
from pipeline.scorers.binning import bin_indices

DTYPES = ["uint8", "int8", "uint16", "int16", "int32", "uint32", "float32", "float64"]


@st.composite
def frames(draw, dtypes=tuple(DTYPES)):
    """image [band, y, x], valid, base patch size, scales, bins, ranges; whole roots only."""
    num_scales, p = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    root = p * 2 ** (num_scales - 1)
    shape = (
        draw(st.integers(1, 3)),
        root * draw(st.integers(1, 2)),
        root * draw(st.integers(1, 2)),
    )
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    if dtype.kind == "f":
        elements = st.floats(-10, 10, width=32)
    else:
        info = np.iinfo(dtype)
        elements = st.one_of(
            st.integers(max(info.min, -20), 20), st.sampled_from([int(info.min), int(info.max)])
        )
    image = draw(hnp.arrays(dtype, shape, elements=elements))
    valid = draw(hnp.arrays(np.bool_, shape[1:], elements=st.booleans()))
    low = draw(st.integers(-20, 10))
    ranges = tuple((float(low), float(low + draw(st.integers(1, 30)))) for _ in range(shape[0]))
    return image, valid, p, num_scales, draw(st.sampled_from([2, 3, 16, 32, 300])), ranges


def maps_of(image, valid, p, num_scales, num_bins, ranges):
    return score_maps(
        image,
        base_patch_size=p,
        num_scales=num_scales,
        num_bins=num_bins,
        value_range=ranges,
        valid=valid,
    )


@pytest.mark.parametrize(("size", "total"), [(2, 485.478), (4, 292.1996), (8, 121.4704)])
def test_golden_score_map_sums(golden_image, size, total):
    maps = score_maps(golden_image, base_patch_size=2, num_scales=3)
    by_size = dict(zip((2, 4, 8), maps, strict=True))
    assert by_size[size].sum(dtype=np.float64) == pytest.approx(total, abs=6e-4)


@given(frames())
@settings(max_examples=150)
def test_scores_equal_the_definition(frame):
    image, valid, p, _num_scales, num_bins, ranges = frame
    maps = maps_of(*frame)
    for scale, found in enumerate(maps):
        expected = oracle.score_map(image, valid, p * 2**scale, num_bins, ranges)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@given(frames())
def test_scores_lie_between_zero_and_the_attainable_maximum(frame):
    _, valid, p, _, num_bins, _ = frame
    for scale, found in enumerate(maps_of(*frame)):
        size = p * 2**scale
        counts = valid.reshape(found.shape[0], size, found.shape[1], size).sum((1, 3))
        assert (np.isnan(found) == (counts == 0)).all()
        limit = np.log2(np.minimum(num_bins, np.maximum(counts, 1)))
        inside = ~np.isnan(found)
        assert (found[inside] >= 0).all()
        assert (found[inside] <= limit[inside] + 1e-6).all()


@given(frames(), st.randoms(use_true_random=False))
def test_order_of_pixels_inside_a_base_cell_changes_no_bit(frame, random):
    image, valid, p, *rest = frame
    order = list(range(p * p))
    random.shuffle(order)

    def shuffled(array):
        rows, cols = array.shape[-2] // p, array.shape[-1] // p
        blocks = array.reshape(-1, rows, p, cols, p).swapaxes(2, 3).reshape(-1, rows, cols, p * p)
        mixed = blocks[..., order].reshape(-1, rows, cols, p, p).swapaxes(2, 3)
        return np.ascontiguousarray(mixed.reshape(array.shape))

    for before, after in zip(
        maps_of(*frame), maps_of(shuffled(image), shuffled(valid), p, *rest), strict=True
    ):
        np.testing.assert_array_equal(before, after)


@given(frames(), st.integers(0, 3), st.booleans())
def test_rotations_and_flips_move_scores_and_change_no_bit(frame, quarters, flip):
    def moved(array):
        turned = np.rot90(array, quarters, axes=(-2, -1))
        return np.ascontiguousarray(turned[..., ::-1] if flip else turned)

    image, valid, *rest = frame
    for before, after in zip(
        maps_of(*frame), maps_of(moved(image), moved(valid), *rest), strict=True
    ):
        np.testing.assert_array_equal(moved(before), after)


@given(frames(), st.data())
def test_invalid_pixels_change_no_score(frame, data):
    image, valid, *rest = frame
    other = data.draw(hnp.arrays(image.dtype, image.shape))
    changed = np.where(valid, image, other)
    for before, after in zip(maps_of(*frame), maps_of(changed, valid, *rest), strict=True):
        np.testing.assert_array_equal(before, after)


@given(frames(dtypes=("float64",)))
def test_a_cell_sees_only_its_own_pixels(frame):
    image, valid, p, num_scales, *rest = frame
    changed = image.copy()
    changed[:, :p, :p] += 7
    maps, others = maps_of(*frame), maps_of(changed, valid, p, num_scales, *rest)
    for before, after in zip(maps, others, strict=True):
        before[0, 0] = after[0, 0] = 0
        np.testing.assert_array_equal(before, after)


def test_nan_and_infinity_are_invalid():
    image = np.random.default_rng(0).random((2, 8, 8))
    valid = np.ones((8, 8), np.bool_)
    valid[1, 2] = valid[6, 6] = False
    broken = image.copy()
    broken[0, 1, 2], broken[1, 6, 6] = np.nan, np.inf
    for before, after in zip(
        score_maps(image, base_patch_size=4, num_scales=2, valid=valid),
        score_maps(broken, base_patch_size=4, num_scales=2),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


def test_an_image_that_is_no_multiple_of_the_root_is_padded_with_invalid_pixels():
    image = np.random.default_rng(0).random((1, 20, 20))
    (base, coarse) = score_maps(image, base_patch_size=4, num_scales=2)
    assert base.shape == (6, 6)
    assert np.isnan(base[5]).all()
    assert np.isnan(base[:, 5]).all()
    # The coarse cell at the corner holds a 4 x 4 px rest of the image.
    assert coarse[2, 2] == pytest.approx(oracle.entropy(image[:, 16:, 16:], 32, 0, 1), abs=1e-6)


def test_many_threads_at_once_give_the_same_bits():
    images = np.random.default_rng(0).random((40, 3, 64, 64))

    def score(image):
        return [m.tobytes() for m in score_maps(image, base_patch_size=4, num_scales=3)]

    alone = [score(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(score, images)) == alone


def test_only_the_named_bands_are_scored():
    image = np.random.default_rng(0).random((4, 8, 8))
    image[0] = np.nan
    chosen = score_maps(image, base_patch_size=4, num_scales=1, bands=(3, 1))
    same = score_maps(image[[1, 3]], base_patch_size=4, num_scales=1)
    np.testing.assert_allclose(chosen[0], same[0], atol=1e-6)


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
    st.integers(2, 500),
    st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=40),
)
def test_bins_by_arithmetic_equal_bins_by_edges(low, span, num_bins, positions):
    edges = np.linspace(low, low + span, num_bins + 1)
    # Values on, just below and just above edges are where arithmetic goes wrong.
    near = list(itertools.chain(edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf)))
    values = np.array([[near + [low + p * span for p in positions]]])
    found = bin_indices(values, ((low, low + span),), num_bins)
    expected = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, num_bins - 1)
    np.testing.assert_array_equal(found, expected)


def test_the_top_edge_belongs_to_the_last_bin():
    values = np.array([[[10_000, 9_687, 9_688, 65_535, 0]]], np.uint16)
    found = bin_indices(values, ((0.0, 10_000.0),), 32)
    assert found.tolist() == [[[31, 30, 31, 31, 0]]]


def test_signed_integers_are_binned_by_value():
    image = np.arange(-128, 128, dtype=np.int8).reshape(1, 16, 16)
    (scores,) = score_maps(image, base_patch_size=16, num_scales=1, value_range=(-128, 128))
    assert scores[0, 0] == 5.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 8), np.float32)}, r"expected real numbers \[band, y, x\]"),
        ({"image": np.zeros((1, 8, 8), np.complex64)}, "complex64"),
        ({"image": np.zeros((1, 8, 8), np.uint16)}, r"name the range.*\(0, 10000\)"),
        ({"valid": np.ones((4, 4), np.bool_)}, r"expected bool \(8, 8\)"),
        ({"value_range": (3.0, 3.0)}, "low < high"),
        ({"value_range": ((0.0, 1.0), (0.0, 1.0))}, "one per scored band"),
        ({"scorer": "entropie"}, r"expected one of \["),
    ],
)
def test_what_cannot_be_scored_is_said_in_words(change, message):
    arguments = {"image": np.zeros((1, 8, 8)), "base_patch_size": 4, "num_scales": 2} | change
    with pytest.raises(ConfigError, match=message):
        score_maps(**arguments)
