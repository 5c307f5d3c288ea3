"""Scores of what each pixel shows beside its neighbours: Laplacian, gradient, edges; and variance.

A filter gives every pixel a response, and a cell's score is a statistic of the responses of its valid
pixels. Only `variance` keeps to the cell: the other filters look at pixels of neighbouring cells of the
same frame, never beyond the frame and never at invalid pixels. Pixels are measured in value ranges,
`(value - low) / (high - low)`, not clipped. Cells without a valid pixel score NaN.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.feature import canny

from pipeline.grid import BaseGrid
from pipeline.scorers.config import (
    CannyConfig,
    CombiningConfig,
    GradientConfig,
    LaplacianConfig,
    SaliencyConfig,
    VarianceConfig,
)
from pipeline.scorers.planes import ValueRanges, combined, planes_in_ranges
from pipeline.scorers.pooling import pool

# Of differences "neighbour - pixel", [y, x] around the pixel.
_LAPLACIAN_4 = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float64)
_LAPLACIAN_8 = np.ones((3, 3))
_SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
# One of each pair of opposite neighbours, as (y, x) steps.
_HALF_OF_THE_NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))
# The Sobel kernels inside `canny` are not divided: a ramp of 1 per px has magnitude 8.
_SKIMAGE_SOBEL_GAIN = 8.0


@dataclass(frozen=True)
class _FilterScorer:
    """Pools responses; `value_ranges` are (low, high) per band, in the pixels' numbers."""

    config: CombiningConfig
    value_ranges: ValueRanges

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x], fine to coarse, of `image` [band, y, x].

        `valid` is bool [y, x]; both have exactly the grid's size. Scores are finite and at least 0,
        NaN without a valid pixel.
        """
        planes = planes_in_ranges(image, valid, self.value_ranges, self.config)
        responses = self.responses(planes, valid)
        return combined(pool(responses, valid, grid, self.statistic), self.config)

    @property
    def statistic(self) -> str:
        """Of the responses in a cell."""
        return "mean"

    def responses(self, planes: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """float64 [plane, y, x], from planes in value ranges that are 0 where invalid."""
        raise NotImplementedError


@dataclass(frozen=True)
class LaplacianScorer(_FilterScorer):
    """Mean, maximum or standard deviation of `|sum over the neighbours of (neighbour - pixel)|`.

    In value ranges per px squared; [0, 4] or [0, 8] for as many neighbours and pixels in their range.
    A neighbour that is invalid or beyond the frame counts as equal to the pixel.
    """

    config: LaplacianConfig

    @property
    def statistic(self) -> str:
        return self.config.statistic

    def responses(self, planes: np.ndarray, valid: np.ndarray) -> np.ndarray:
        kernel = _LAPLACIAN_4 if self.config.neighbours == 4 else _LAPLACIAN_8
        return np.abs(sum_of_differences(planes, valid, kernel))


@dataclass(frozen=True)
class VarianceScorer(_FilterScorer):
    """Population variance of the cell's valid pixels, or its square root.

    In value ranges squared, or value ranges; at most 1/4, or 1/2, for pixels in their range. Exactly
    0 for a constant cell. No other cell's pixels have an effect.
    """

    config: VarianceConfig

    @property
    def statistic(self) -> str:
        return self.config.statistic

    def responses(self, planes: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return planes


@dataclass(frozen=True)
class GradientScorer(_FilterScorer):
    """Mean, maximum or standard deviation of the Sobel magnitude `sqrt(gx**2 + gy**2)`.

    In value ranges per px: kernels are divided by 8, so a ramp of 1 per px scores 1; at most
    sqrt(9/32) for pixels in their range. A neighbour that is invalid or beyond the frame counts as
    equal to the pixel, which halves a ramp's slope there.
    """

    config: GradientConfig

    @property
    def statistic(self) -> str:
        return self.config.statistic

    def responses(self, planes: np.ndarray, valid: np.ndarray) -> np.ndarray:
        along_x = sum_of_differences(planes, valid, _SOBEL_X)
        along_y = sum_of_differences(planes, valid, _SOBEL_X.T)
        return np.sqrt(along_x**2 + along_y**2)


@dataclass(frozen=True)
class CannyScorer(_FilterScorer):
    """Share of the cell's valid pixels, [0, 1], that `skimage.feature.canny` marks as edges.

    The image is smoothed over valid pixels only; a pixel may be an edge if its gradient is at least
    `low`, and is one if a chain of such pixels leads to one of at least `high`, both in value ranges
    per px. The chain may cross the whole frame. Pixels at the frame's border or beside an invalid
    pixel are never edges. Turning the image turns the score map, except where two neighbouring
    gradients are equal but for rounding: then the thinner or the thicker edge may be found.
    """

    config: CannyConfig

    def responses(self, planes: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return np.stack([self.edges(plane, valid) for plane in planes]).astype(np.float64)

    def edges(self, plane: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Bool [y, x]: pixels on an edge; never an invalid one."""
        # Smoothing rounds, and what it leaves of a constant must be no edge: start from 0.
        lowest = plane.min(where=valid, initial=np.inf)
        return canny(
            np.where(valid, plane - lowest, 0.0),
            self.config.sigma_px,
            self.config.low * _SKIMAGE_SOBEL_GAIN,
            self.config.high * _SKIMAGE_SOBEL_GAIN,
            mask=valid,
            use_quantiles=False,
        )


@dataclass(frozen=True)
class SaliencyScorer(CannyScorer):
    """Mean over the cell's valid pixels of the density of Canny edges around them, [0, 1].

    The density is the share of edges among the valid pixels nearby, weighted by a Gaussian of
    `blur_px`; what is invalid or beyond the frame has no weight. Edges are those of `CannyScorer`.
    """

    config: SaliencyConfig

    def responses(self, planes: np.ndarray, valid: np.ndarray) -> np.ndarray:
        edges = super().responses(planes, valid)
        sigmas_px = (0, self.config.blur_px, self.config.blur_px)
        near = gaussian_filter(edges, sigmas_px, mode="constant")
        weight = gaussian_filter(valid.astype(np.float64), sigmas_px[1:], mode="constant")
        return np.where(valid, near / np.where(valid, weight, 1.0), 0.0)


def sum_of_differences(planes: np.ndarray, valid: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """float64 [..., y, x]: sum over the 8 neighbours of `kernel [3, 3] * (neighbour - pixel)`.

    A difference counts only if both pixels are inside the frame and valid. Each is taken once and
    serves both its pixels, to one of which it is the opposite neighbour with the opposite sign.
    """
    total = np.zeros(planes.shape)
    for step_y, step_x in _HALF_OF_THE_NEIGHBOURS:
        weight, opposite = kernel[1 + step_y, 1 + step_x], kernel[1 - step_y, 1 - step_x]
        if weight == opposite == 0:
            continue
        here, there = _pairs(planes.shape[-2:], step_y, step_x)
        difference = planes[there] - planes[here]
        difference *= valid[there[1:]] & valid[here[1:]]
        total[here] += weight * difference
        total[there] -= opposite * difference
    return total


def _pairs(
    shape: tuple[int, ...], step_y: int, step_x: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Windows of a [..., y, x] array: pixels that have a neighbour at that step, and the neighbours."""
    height, width = shape
    left = max(0, -step_x)
    right = max(left, width - max(0, step_x))
    bottom = max(0, height - step_y)
    here = (..., slice(0, bottom), slice(left, right))
    there = (..., slice(step_y, step_y + bottom), slice(left + step_x, right + step_x))
    return here, there
