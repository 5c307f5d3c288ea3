"""Combinations of bands, normalisation, and the computer-vision flavour of the entropy score."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracle
from pipeline import partition_image, score_maps
from pipeline.errors import ConfigError
from pipeline.scorers.config import LUMA, EntropyConfig

RANGE = (0.0, 20.0)


@pytest.fixture(scope="module")
def gray_golden() -> np.ndarray:
    """float64 [rgb, 256, 256]: a flat, a ramp, a checkerboard and a noisy quadrant."""
    n, half = 256, 128
    y, x = np.mgrid[:n, :n]
    a = ((x * x + 3 * y * y + 7 * x * y) % 251).astype(np.float64)
    a[:half, :half] = 77
    a[:half, half:] = (x % 256)[:half, half:]
    a[half:, :half] = (((x // 4 + y // 4) % 2) * 200)[half:, :half]
    return np.stack([a, np.floor(a / 2), 255 - a])


@pytest.mark.parametrize(
    ("top", "sums"),
    [(255, (713.4718, 201.2803, 54.7270)), (256, (711.6266, 200.7553, 54.5945))],
    ids=["equal width over [0, 255]", "floor(v * 512 / 256)"],
)
@pytest.mark.parametrize(
    ("thresholds", "counts"),
    [((5.5, 5.5), [64, 0, 12]), ((6, 4), [64, 16, 8]), ((2, 2), [128, 0, 8])],
)
def test_both_public_binnings_of_the_gray_flavour(gray_golden, top, sums, thresholds, counts):
    partition = partition_image(
        gray_golden,
        base_patch_size=16,
        num_scales=3,
        thresholds=thresholds,
        value_range=(0, top),
        scorer=EntropyConfig(num_bins=512, combine="gray"),
    )
    found = [m.sum(dtype=np.float64) for m in partition.score_maps]
    assert found == pytest.approx(sums, abs=6e-5)
    assert partition.counts_per_scale.tolist() == counts


images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(8), st.just(16)),
                    elements=st.integers(0, 25))  # fmt: skip
masks = hnp.arrays(np.bool_, (8, 16))


def maps(image, valid, p=2, **settings):
    return score_maps(
        image,
        base_patch_size=p,
        num_scales=3,
        value_range=RANGE,
        valid=valid,
        scorer=EntropyConfig(**settings),
    )


@given(images, masks)
@settings(max_examples=40)
def test_the_largest_of_the_bands(image, valid):
    per_band = [maps(band[None], valid, num_bins=8) for band in image]
    for level, found in enumerate(maps(image, valid, num_bins=8, combine="max")):
        expected = np.max([bands[level] for bands in per_band], axis=0)
        np.testing.assert_array_equal(found, expected)


@given(images.filter(lambda image: len(image) == 3), masks)
@settings(max_examples=40)
def test_one_gray_plane(image, valid):
    gray = sum(weight * band for weight, band in zip(LUMA, image, strict=True))
    found = maps(image, valid, combine="gray")
    for size, level in zip((2, 4, 8), found, strict=True):
        expected = oracle.score_map(gray[None], valid, size, 32, [RANGE])
        np.testing.assert_allclose(level, expected, atol=2e-6)


@given(images, masks, st.integers(2, 16))
@settings(max_examples=40)
def test_the_joint_histogram_counts_combinations(image, valid, num_bins):
    edges = np.linspace(*RANGE, num_bins + 1)
    found = maps(image, valid, num_bins=num_bins, combine="joint")
    for size, level in zip((2, 4, 8), found, strict=True):
        for (y, x), score in np.ndenumerate(level):
            cut = np.s_[..., y * size : (y + 1) * size, x * size : (x + 1) * size]
            pixels = np.clip(image[cut][:, valid[cut]].astype(float), *RANGE)
            bins = np.clip(np.searchsorted(edges, pixels, "right") - 1, 0, num_bins - 1)
            _, counts = np.unique(bins, axis=1, return_counts=True)
            p = counts / counts.sum() if counts.size else np.array([np.nan])
            assert score == pytest.approx(float(-(p * np.log2(p)).sum()), abs=2e-6, nan_ok=True)


@given(images, masks, st.sampled_from([2, 8, 32, 300]))
@settings(max_examples=40)
def test_normalised_scores_are_shares_of_the_attainable_maximum(image, valid, num_bins):
    plain = maps(image, valid, num_bins=num_bins)
    shares = maps(image, valid, num_bins=num_bins, normalize=True)
    for size, score, share in zip((2, 4, 8), plain, shares, strict=True):
        counts = valid.reshape(score.shape[0], size, score.shape[1], size).sum((1, 3))
        limit = np.log2(np.clip(counts, 1, num_bins))
        np.testing.assert_allclose(share * np.maximum(limit, 1e-9), score, atol=1e-5)
        assert np.nanmax(share, initial=0) <= 1 + 1e-6


def test_cells_of_more_pixels_than_sixteen_bits_count():
    image = np.zeros((1, 512, 512))
    image[:, 256:] = 1
    found = score_maps(image, base_patch_size=64, num_scales=4)
    assert found[3].tolist() == [[1.0]]
    assert found[2].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_cells_with_too_few_valid_pixels_count_as_missing():
    image = np.random.default_rng(0).random((1, 8, 8))
    valid = np.zeros((8, 8), np.bool_)
    valid[:4, :4] = valid[4, 4] = True
    scorer = EntropyConfig(min_valid_fraction=0.25)
    partition = partition_image(
        image, base_patch_size=4, num_scales=2, thresholds=(0.1,), valid=valid, scorer=scorer
    )
    assert partition.descriptors["missing"].tolist() == [False, True, True, True]
    alone = score_maps(image[:, :4, :4], base_patch_size=4, num_scales=1)
    # The lone pixel is not counted in the coarse cell either.
    assert partition.score_maps[1][0, 0] == alone[0][0, 0]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"combine": "gray"}, {}, "combine gray has 3 weights and 2 bands"),
        ({"combine": "joint", "num_bins": 65}, {}, "joint histogram of 2 bands with 65 bins"),
        (
            {"combine": "gray", "gray_weights": (0.5, 0.5)},
            {"value_range": ((0, 1), (0, 2))},
            "one value range for all bands",
        ),
        ({}, {"num_bins": 8}, "num_bins has no effect beside a scorer configuration"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(config, arguments, message):
    with pytest.raises(ConfigError, match=message):
        score_maps(
            np.zeros((2, 8, 8)),
            base_patch_size=4,
            num_scales=2,
            scorer=EntropyConfig(**config),
            **arguments,
        )


def test_thresholds_of_normalised_scores_end_at_one():
    with pytest.raises(ConfigError, match=r"scores at most 1 with this scorer"):
        partition_image(
            np.zeros((1, 8, 8)),
            base_patch_size=4,
            num_scales=2,
            thresholds=(1.5,),
            scorer=EntropyConfig(normalize=True),
        )
