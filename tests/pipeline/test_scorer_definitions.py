"""Every scorer against its definition, computed pixel by pixel."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scorers.config import (
    ExternalConfig,
    SaliencyConfig,
    SpectralAngleConfig,
    UpsampleErrorConfig,
)
from scorer_frames import (
    CONFIGS,
    EDGES,
    MERGE,
    assert_equal_to,
    expected_maps,
    for_each,
    frames,
    maps_of,
    textures,
)


def in_ranges(image, ranges):
    return [
        (band.astype(np.float64) - a) / (b - a) for band, (a, b) in zip(image, ranges, strict=True)
    ]


def stencil(plane, valid, kernel):
    """Per pixel: sum of kernel[dy, dx] * (neighbour or, without one, the pixel itself - pixel)."""
    rows, cols = plane.shape
    out = np.zeros(plane.shape)
    for y, x in np.argwhere(valid):
        for (dy, dx), weight in kernel.items():
            a, b = y + dy, x + dx
            if 0 <= a < rows and 0 <= b < cols and valid[a, b]:
                out[y, x] += weight * (plane[a, b] - plane[y, x])
    return out


NEXT = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
STATISTICS = {"mean": np.mean, "max": np.max, "std": np.std, "variance": np.var}


def laplacian(plane, valid, config):
    steps = NEXT if config.neighbours == 8 else [s for s in NEXT if 0 in s]
    return np.abs(stencil(plane, valid, dict.fromkeys(steps, 1)))


def gradient(plane, valid, config):
    weight = {0: 2 / 8, 1: 1 / 8}
    gx = stencil(plane, valid, {(dy, dx): dx * weight[abs(dy)] for dy, dx in NEXT})
    gy = stencil(plane, valid, {(dy, dx): dy * weight[abs(dx)] for dy, dx in NEXT})
    return np.hypot(gx, gy)


RESPONSES = {
    "laplacian": laplacian,
    "gradient": gradient,
    "variance": lambda plane, valid, config: plane,
}


@for_each([c for c in CONFIGS if c.scorer in RESPONSES])
@given(frame=frames())
@settings(max_examples=60)
def test_filters_equal_their_definition(config, frame):
    image, valid, p, num_scales, ranges = frame
    planes = in_ranges(image, ranges)
    responses = [RESPONSES[config.scorer](plane, valid, config) for plane in planes]
    statistic, merge = STATISTICS[config.statistic], MERGE[config.combine]
    expected = expected_maps(
        lambda cut: merge([statistic(r[cut][valid[cut]]) for r in responses]), valid, p, num_scales
    )
    assert_equal_to(maps_of(config, *frame), expected)


def canny_edges(plane, valid, config):
    """Canny's steps one by one: smooth, Sobel, thin along the gradient, follow from strong pixels."""
    rows, cols = plane.shape
    smoothed = blurred(np.where(valid, plane, 0), config.sigma_px)
    weight = blurred(valid.astype(float), config.sigma_px)
    smoothed = np.pad(smoothed / np.where(weight > 0, weight, 1), 1, mode="symmetric")
    parts = [smoothed[1 + dy :, 1 + dx :][:rows, :cols] for dy, dx in NEXT]
    gy, gx = (
        sum(part * step[k] * (2 - abs(step[1 - k])) for part, step in zip(parts, NEXT, strict=True))
        / 8
        for k in (0, 1)
    )
    strength = np.hypot(gy, gx)
    thin = np.zeros(plane.shape)
    for y, x in np.argwhere(valid):
        around = valid[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        if around.sum() < 9 or strength[y, x] < config.low:
            continue
        step = np.array([gy[y, x], gx[y, x]]) / max(abs(gy[y, x]), abs(gx[y, x]))
        diagonal = np.sign(step).astype(int)
        straight = np.trunc(step).astype(int)
        part = np.abs(step).min()
        ahead, behind = (
            part * strength[tuple((y, x) + way * diagonal)]
            + (1 - part) * strength[tuple((y, x) + way * straight)]
            for way in (1, -1)
        )
        if strength[y, x] >= max(ahead, behind):
            thin[y, x] = strength[y, x]
    edges = thin >= config.high
    stack = list(np.argwhere(edges))
    while stack:
        y, x = stack.pop()
        for dy, dx in NEXT:
            a, b = y + dy, x + dx
            if 0 <= a < rows and 0 <= b < cols and thin[a, b] > 0 and not edges[a, b]:
                edges[a, b] = True
                stack.append((a, b))
    return edges


def blurred(plane, sigma):
    """Gaussian of radius 4 sigma, 0 beyond the frame, as products with dense matrices."""

    def matrix(n):
        apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        weight = np.exp(-(apart**2) / (2 * sigma**2))
        return np.where(apart <= int(4 * sigma + 0.5), weight, 0)

    return matrix(plane.shape[0]) @ plane @ matrix(plane.shape[1])


@for_each(EDGES)
@given(frame=textures())
@settings(max_examples=60)
def test_edges_equal_their_definition(config, frame):
    image, valid, p, num_scales, _ = frame
    responses = [canny_edges(plane, valid, config).astype(float) for plane in image]
    if isinstance(config, SaliencyConfig):
        weight = np.where(valid, blurred(valid.astype(float), config.blur_px), 1)
        responses = [blurred(edges, config.blur_px) / weight for edges in responses]
    merge = MERGE[config.combine]
    expected = expected_maps(
        lambda cut: merge([r[cut][valid[cut]].mean() for r in responses]), valid, p, num_scales
    )
    assert_equal_to(maps_of(config, *frame), expected)


def upsample_error(plane, valid, p, bilinear):
    """Of one cell, by interpolation between block centres."""
    factor = plane.shape[0] // p
    small = np.full((p, p), plane[valid].mean())
    for y in range(p):
        for x in range(p):
            cut = np.s_[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            if valid[cut].any():
                small[y, x] = plane[cut][valid[cut]].mean()
    if bilinear:
        pixels = np.arange(p * factor) + 0.5
        centres = (np.arange(p) + 0.5) * factor
        rows = np.array([np.interp(pixels, centres, row) for row in small])
        large = np.array([np.interp(pixels, centres, column) for column in rows.T]).T
    else:
        large = np.kron(small, np.ones((factor, factor)))
    return np.mean((plane - large)[valid] ** 2)


@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@given(frame=frames())
@settings(max_examples=60)
def test_upsample_error_equals_its_definition(interpolation, combine, frame):
    image, valid, p, num_scales, ranges = frame
    config = UpsampleErrorConfig(interpolation=interpolation, combine=combine)
    planes = in_ranges(image, ranges)
    bilinear = interpolation == "bilinear"
    expected = expected_maps(
        lambda cut: MERGE[combine](
            [upsample_error(plane[cut], valid[cut], p, bilinear) for plane in planes]
        ),
        valid,
        p,
        num_scales,
    )
    found = maps_of(config, *frame)
    assert_equal_to(found, expected)
    assert not np.nan_to_num(found[0]).any()


@given(frames())
@settings(max_examples=60)
def test_spectral_angle_equals_its_definition(frame):
    image, valid, p, num_scales, ranges = frame
    widths = np.array([high - low for low, high in ranges])

    def angle(v, m):
        lengths = np.linalg.norm(v) * np.linalg.norm(m)
        return math.acos(np.clip(v @ m / lengths, -1, 1)) if lengths > 1e-12 else 0.0

    def score(cut):
        spectra = image[:, *cut][:, valid[cut]].T.astype(np.float64) / widths
        return np.mean([angle(v, spectra.mean(axis=0)) for v in spectra])

    expected = expected_maps(score, valid, p, num_scales)
    assert_equal_to(maps_of(SpectralAngleConfig(), *frame), expected)


@pytest.mark.parametrize("statistic", ["mean", "max"])
@given(frame=frames(), data=st.data())
@settings(max_examples=60)
def test_external_scores_are_pooled_without_unknown_pixels(statistic, frame, data):
    image, valid, p, num_scales, ranges = frame
    plane = image[:1].astype(np.float64)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    unknown = rng.random(valid.shape) < 0.3
    plane[0][unknown] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    known = valid & ~unknown
    expected = expected_maps(
        lambda cut: MERGE[statistic](plane[0][cut][known[cut]]), known, p, num_scales
    )
    config = ExternalConfig(statistic=statistic)
    assert_equal_to(maps_of(config, plane, valid, p, num_scales, ranges), expected)
