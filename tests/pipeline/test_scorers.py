import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import partition_image, score_maps
from pipeline.errors import ConfigError
from pipeline.scorers.config import (
    SCORER_NAMES,
    CannyConfig,
    ExternalConfig,
    GradientConfig,
    LaplacianConfig,
    SpectralAngleConfig,
    UpsampleErrorConfig,
    VarianceConfig,
)
from pipeline.scores import SCORERS
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from scorer_frames import (
    CONFIGS,
    DTYPES,
    EDGES,
    LOCAL,
    MERGE,
    STENCILS,
    assert_equal_to,
    for_each,
    frames,
    layouts,
    maps_of,
    textures,
)


@for_each(CONFIGS)
@given(frame=frames(), data=st.data())
@settings(max_examples=30)
def test_invalid_pixels_change_no_bit(config, frame, data):
    image, valid, *rest = frame
    bits = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    other = np.frombuffer(bits.bytes(image.nbytes), image.dtype).reshape(image.shape)
    changed = np.where(valid, image, other)
    before, after = maps_of(config, *frame), maps_of(config, changed, valid, *rest)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, two)


def moved(array, quarters, flip):
    turned = np.rot90(array, quarters, axes=(-2, -1))
    return np.ascontiguousarray(turned[..., ::-1] if flip else turned)


@for_each(LOCAL + STENCILS)
@given(frame=frames(), quarters=st.integers(0, 3), flip=st.booleans())
@settings(max_examples=30)
def test_rotations_and_flips_move_scores(config, frame, quarters, flip):
    image, valid, *rest = frame
    turned = maps_of(config, moved(image, quarters, flip), moved(valid, quarters, flip), *rest)
    assert_equal_to(turned, [moved(m, quarters, flip) for m in maps_of(config, *frame)])


@for_each(EDGES)
@given(frame=textures(), quarters=st.integers(0, 3), flip=st.booleans())
@settings(max_examples=60)
def test_rotations_and_flips_move_edges_where_gradients_differ(config, frame, quarters, flip):
    image, valid, *rest = frame
    turned = maps_of(config, moved(image, quarters, flip), moved(valid, quarters, flip), *rest)
    assert_equal_to(turned, [moved(m, quarters, flip) for m in maps_of(config, *frame)])


@for_each(CONFIGS)
@given(frame=frames(), data=st.data())
@settings(max_examples=30)
def test_constant_frames_score_zero(config, frame, data):
    image, valid, *rest = frame
    values = data.draw(hnp.arrays(image.dtype, (len(image), 1, 1), elements=numbers(image.dtype)))
    image = np.broadcast_to(values, image.shape).copy()
    constant = np.float32(values[0, 0, 0]) if isinstance(config, ExternalConfig) else 0.0
    # Spectra are compared with a mean, which rounds.
    atol = 1e-7 if isinstance(config, SpectralAngleConfig) else 0
    for found in maps_of(config, image, valid, *rest):
        np.testing.assert_allclose(found[~np.isnan(found)], constant, rtol=1e-6, atol=atol)


def numbers(dtype):
    """Every number of a type, and often its extremes; floats as large as sums of them allow."""
    if dtype.kind == "f":
        limit = float(np.finfo(np.float32).max)
        extremes = st.sampled_from([0.0, 1e-45, limit, -limit])
        return st.one_of(st.floats(-limit, limit, width=32), extremes)
    info = np.iinfo(dtype)
    return st.one_of(
        st.integers(int(info.min), int(info.max)), st.sampled_from([int(info.min), int(info.max)])
    )


@for_each(CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(layout=layouts(), data=st.data())
@settings(max_examples=10)
def test_extreme_numbers_have_finite_scores(config, dtype, layout, data):
    p, num_scales, shape = layout
    dtype = np.dtype(dtype)
    palette = data.draw(st.lists(numbers(dtype), min_size=2, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    image = rng.choice(np.array(palette, dtype), (2, *shape))
    valid = rng.random(shape) < data.draw(st.sampled_from([0.5, 0.05, 1.0]))
    span = data.draw(st.sampled_from([1e-3, 1.0, 1e10]))
    found = maps_of(config, image, valid, p, num_scales, ((-span, span),) * 2)
    for scale, scores in enumerate(found):
        size = p * 2**scale
        counts = valid.reshape(scores.shape[0], size, scores.shape[1], size).sum((1, 3))
        np.testing.assert_array_equal(np.isnan(scores), counts == 0)
        assert not np.isinf(scores).any()
        limit = config.attainable(size, 2)
        if limit is not None:
            assert (scores[counts > 0] >= 0).all()
            assert (scores[counts > 0] <= np.float32(limit)).all()


@for_each(LOCAL)
@given(frame=frames())
@settings(max_examples=30)
def test_local_scores_see_only_their_own_cell(config, frame):
    image, valid, p, *rest = frame
    changed = image.copy()
    changed[:, :p, :p] += 7
    maps, others = maps_of(config, *frame), maps_of(config, changed, valid, p, *rest)
    for before, after in zip(maps, others, strict=True):
        before[0, 0] = after[0, 0] = 0
        np.testing.assert_array_equal(before, after)


def test_a_small_variance_far_from_zero_is_not_lost():
    image = 1e9 + np.random.default_rng(0).integers(0, 4, (1, 16, 16)).astype(np.float64)
    for found in score_maps(image, base_patch_size=4, num_scales=3, scorer="variance"):
        size = 16 // len(found)
        cells = image[0].reshape(len(found), size, len(found), size)
        np.testing.assert_allclose(found, cells.var(axis=(1, 3)), rtol=1e-6)


def test_one_bright_pixel_by_hand():
    image = np.zeros((1, 4, 4))
    image[0, 1, 1] = 0.5
    settings_of_image = {"base_patch_size": 4, "num_scales": 1}
    for scorer, expected in [
        (LaplacianConfig(neighbours=8), (8 * 0.5 + 8 * 0.5) / 16),
        (LaplacianConfig(neighbours=4), (4 * 0.5 + 4 * 0.5) / 16),
        (LaplacianConfig(statistic="max"), 4.0),
        (VarianceConfig(), 0.25 * 15 / 256),
        # 4 sides of 2/8 and 4 corners of sqrt(2)/8.
        (GradientConfig(), 0.5 * (4 * 2 / 8 + 4 * math.sqrt(2) / 8) / 16),
    ]:
        (found,) = score_maps(image, **settings_of_image, scorer=scorer)
        assert found[0, 0] == pytest.approx(expected, rel=1e-6)


def test_a_ramp_of_one_per_px_has_gradient_one_inside_and_half_at_the_frame():
    image = np.broadcast_to(np.arange(4.0), (1, 4, 4))
    (found,) = score_maps(image, base_patch_size=1, num_scales=1, scorer="gradient")
    np.testing.assert_allclose(found[1:3, 1:3], 1)
    np.testing.assert_allclose(found[1:3, 0], 0.5)


@pytest.mark.parametrize(("high", "share"), [(0.199, 6 / 8), (0.201, 0.0)])
def test_canny_thresholds_are_value_ranges_per_px(high, share):
    # The central difference is largest in column 4, where it is 0.2 per px.
    profile = np.array([0, 0, 0, 0.1, 0.3, 0.5, 0.6, 0.6]) * 100
    image = np.broadcast_to(profile, (1, 8, 8))
    config = CannyConfig(sigma_px=0.2, low=0.19, high=high)
    (found,) = score_maps(
        image, base_patch_size=1, num_scales=1, scorer=config, value_range=(0, 100)
    )
    # Neither the first nor the last pixel of a column can be an edge.
    assert found[:, 4].mean() == share
    assert not np.delete(found, 4, axis=1).any()


def test_saliency_spreads_edges():
    image = np.zeros((1, 16, 16))
    image[..., 8:] = 1
    density, saliency = (
        score_maps(image, base_patch_size=4, num_scales=1, scorer=scorer)[0][1]
        for scorer in ("canny", "saliency")
    )
    assert density[0] == 0 < saliency[0] < saliency[1] < density[1] + density[2]


def test_upsample_error_by_hand():
    checkers = np.indices((4, 4)).sum(axis=0)[None] % 2 * 1.0
    base, coarse = score_maps(
        checkers, base_patch_size=2, num_scales=2, scorer=UpsampleErrorConfig()
    )
    assert not base.any()
    assert coarse[0, 0] == 0.25


def test_spectral_angle_by_hand():
    image = np.zeros((2, 1, 2))
    # Two orthogonal spectra of equal length (in value ranges), each 45 degrees from their mean.
    image[0, 0, 0], image[1, 0, 1] = 3.0, 60.0
    (found,) = score_maps(
        image,
        base_patch_size=2,
        num_scales=1,
        scorer="spectral_angle",
        value_range=((7, 8), (80, 100)),
    )
    assert found[0, 0] == pytest.approx(math.pi / 4, abs=1e-6)


def test_spectra_that_cancel_but_for_rounding_have_no_mean_direction():
    image = np.array([[[0.1, 0.2, -0.3, 0.0]]] * 2).reshape(2, 2, 2)
    assert image[0].sum() != 0
    (found,) = score_maps(image, base_patch_size=2, num_scales=1, scorer="spectral_angle")
    assert found[0, 0] == 0


@for_each([c for c in CONFIGS if hasattr(c, "combine")])
def test_bands_are_combined_as_asked(config):
    image = np.random.default_rng(1).random((3, 16, 16))
    layout = {"base_patch_size": 4, "num_scales": 2}

    def scored(image, **change):
        return score_maps(image, **layout, scorer=config.model_copy(update=change))

    alone = np.array([np.concatenate([m.ravel() for m in scored(band[None])]) for band in image])
    for combine, merge in MERGE.items():
        together = np.concatenate([m.ravel() for m in scored(image, combine=combine)])
        np.testing.assert_allclose(together, merge(alone, axis=0), rtol=1e-6, atol=1e-7)
    weights = (0.5, 0.2, 0.3)
    gray = np.tensordot(weights, image, axes=1)[None]
    assert_equal_to(scored(image, combine="gray", gray_weights=weights), scored(gray))


def test_every_scorer_of_the_configuration_is_there():
    assert tuple(SCORERS) == SCORER_NAMES


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ("{scorer: laplacian, num_bins: 8}", "unknown key 'scoring.num_bins'"),
        ("{scorer: variance, neighbours: 4}", "unknown key 'scoring.neighbours'"),
        ("{scorer: canny, blur_px: 2}", "unknown key 'scoring.blur_px'"),
        ("{scorer: spectral_angle, combine: max}", "unknown key 'scoring.combine'"),
        ("{scorer: external, bands: [a]}", "unknown key 'scoring.bands'"),
        ("{scorer: gradient, gray_weights: [1]}", "gray_weights has no effect with combine 'mean'"),
        ("{scorer: canny, low: 0.5, high: 0.1}", "low is 0.5, above high"),
        (
            "{scorer: canny, sigma_px: 0}",
            "scoring.sigma_px is 0; input should be greater than or equal to 0.2",
        ),
        ("{scorer: upsample_error, interpolation: cubic}", "scoring.interpolation is 'cubic'"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, scoring, message):
    file = tmp_path / "aptile.yaml"
    file.write_text(f"scoring: {scoring}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(PreprocessConfig, file)


@pytest.mark.parametrize(
    ("scorer", "threshold", "limit"), [("canny", 1.5, "1"), ("spectral_angle", 3.2, "3.142")]
)
def test_thresholds_no_cell_can_reach_are_refused(scorer, threshold, limit):
    image = np.zeros((3, 8, 8))
    with pytest.raises(ConfigError, match=rf"8 px scores at most {limit} with this scorer"):
        partition_image(
            image, base_patch_size=4, num_scales=2, thresholds=(threshold,), scorer=scorer
        )


@pytest.mark.parametrize(
    ("scorer", "num_bands", "message"),
    [
        ("spectral_angle", 1, "at least two scoring.bands"),
        ("external", 2, "external scores are one plane, not 2"),
        (GradientConfig(combine="gray"), 2, "3 weights and 2 bands are scored"),
    ],
)
def test_a_wrong_number_of_bands_is_refused(scorer, num_bands, message):
    with pytest.raises(ConfigError, match=message):
        score_maps(np.zeros((num_bands, 8, 8)), base_patch_size=4, num_scales=1, scorer=scorer)


@for_each(CONFIGS)
def test_an_image_of_any_size_is_scored_and_partitioned(config):
    image = np.random.default_rng(0).random((1 if config.scorer == "external" else 2, 21, 13))
    image[:, 3, 4] = image[:, 10:] = np.nan
    found = partition_image(
        image, base_patch_size=4, num_scales=2, thresholds=(0.2,), scorer=config
    )
    unknown = np.isnan(found.score_maps[0])
    assert unknown.shape == (6, 4)
    assert unknown[3:].all()
    assert not unknown[:3].any()
    assert len(found) > 0
