"""Scorers of every kind, frames to score, and maps made cell by cell to compare theirs with."""

import numpy as np
import pytest
from hypothesis import strategies as st

from pipeline.grid import BaseGrid
from pipeline.scorers.config import (
    CannyConfig,
    ExternalConfig,
    GradientConfig,
    LaplacianConfig,
    SaliencyConfig,
    SpectralAngleConfig,
    UpsampleErrorConfig,
    VarianceConfig,
)
from pipeline.scores import make_scorer

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float32", "float64"]
EDGES = [
    CannyConfig(low=0.05, high=0.18, sigma_px=0.6),
    CannyConfig(low=0.05, high=0.05, combine="max"),
    SaliencyConfig(low=0.05, high=0.18, sigma_px=0.6, blur_px=1.3),
]
LOCAL = [
    VarianceConfig(),
    VarianceConfig(statistic="std", combine="max"),
    UpsampleErrorConfig(),
    UpsampleErrorConfig(interpolation="nearest"),
    SpectralAngleConfig(),
    ExternalConfig(),
    ExternalConfig(statistic="max"),
]
STENCILS = [
    LaplacianConfig(),
    LaplacianConfig(neighbours=4, statistic="max"),
    LaplacianConfig(statistic="std"),
    GradientConfig(),
    GradientConfig(statistic="max", combine="max"),
    GradientConfig(statistic="std"),
]
CONFIGS = LOCAL + STENCILS + EDGES
# How scores of several bands become one.
MERGE = {"mean": np.mean, "max": np.max}


def name(config):
    return "-".join([config.scorer, *map(str, config.model_dump(exclude_defaults=True).values())])


def for_each(configs):
    return pytest.mark.parametrize("config", configs, ids=name)


@st.composite
def layouts(draw, smallest=1):
    """Base patch size, scales, shape (y, x) in px; whole roots only."""
    p, num_scales = draw(st.integers(smallest, 4)), draw(st.integers(smallest, 3))
    root = p * 2 ** (num_scales - 1)
    return p, num_scales, (root * draw(st.integers(1, 2)), root * draw(st.integers(1, 2)))


@st.composite
def frames(draw):
    """image [band, y, x], valid, base patch size, scales, ranges: small numbers of any type.

    Arrays come from a seed: drawn number by number, most would be constant and hardly valid.
    """
    p, num_scales, shape = draw(layouts())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    largest = draw(st.sampled_from([40, 3, 0]))
    numbers = rng.integers(-largest, largest + 1, (draw(st.integers(2, 3)), *shape))
    image = (numbers / 16 if dtype.kind == "f" else np.abs(numbers)).astype(dtype)
    valid = rng.random(shape) < draw(st.sampled_from([0.9, 0.3, 1.0, 0.02]))
    low = draw(st.integers(-20, 10))
    ranges = tuple((float(low), float(low + draw(st.integers(1, 30)))) for _ in image)
    return image, valid, p, num_scales, ranges


@st.composite
def textures(draw):
    """A frame of real random numbers, in which no two gradients are equal."""
    p, num_scales, shape = draw(layouts(smallest=2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image, valid = (
        rng.random((2, *shape)),
        rng.random(shape) < draw(st.sampled_from([0.98, 0.85, 1])),
    )
    return image, valid, p, num_scales, ((0.0, 1.0), (0.0, 1.0))


def maps_of(config, image, valid, p, num_scales, ranges):
    grid = BaseGrid(valid.shape[0] // p, valid.shape[1] // p, p, num_scales)
    if isinstance(config, ExternalConfig):
        image, ranges = image[:1], ranges[:1]
    return make_scorer(config, ranges).maps(image, valid, grid)


def expected_maps(score_of_cell, valid, p, num_scales):
    """Maps from `score_of_cell(cut)`, called for every cell with a valid pixel."""
    maps = []
    for size in (p * 2**s for s in range(num_scales)):
        rows, cols = valid.shape[0] // size, valid.shape[1] // size
        scores = np.full((rows, cols), np.nan)
        for y in range(rows):
            for x in range(cols):
                cut = np.s_[y * size : (y + 1) * size, x * size : (x + 1) * size]
                if valid[cut].any():
                    scores[y, x] = score_of_cell(cut)
        maps.append(scores)
    return maps


def assert_equal_to(found, expected, rtol=2e-6, atol=2e-6):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)
