"""Scores of a cell as a whole: what shrinking loses, how spectra differ, what the user supplies.

No other cell's pixels have an effect. Cells without a valid pixel score NaN.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.grid import BaseGrid
from pipeline.scorers.config import ExternalConfig, SpectralAngleConfig, UpsampleErrorConfig
from pipeline.scorers.planes import ValueRanges, combined, in_widths, planes_in_ranges
from pipeline.scorers.pooling import (
    Moments,
    cell_counts,
    merge_moments,
    per_pixel,
    pixel_moments,
    pool,
    reduce_blocks,
    spread,
)

_FLOAT32_MAX = float(np.finfo(np.float32).max)
# A mean spectrum so much shorter than the spectra it is the mean of is what rounding left of zero.
_CANCELLED = 1e-12


@dataclass(frozen=True)
class UpsampleErrorScorer:
    """Mean squared difference between a cell and itself shrunk to base size and enlarged again.

    A cell of `p * 2**s` px becomes `p x p` means of the valid pixels of its blocks of `2**s` px, a
    block without any taking the mean of the cell's valid pixels. In value ranges squared over the
    valid pixels, at most 1 for pixels in their range; 0 at level 0 and for constant cells.
    `bilinear` holds means at the centres of their blocks, and beyond the outermost centres keeps
    their value. `value_ranges` are (low, high) per band, in the pixels' numbers.
    """

    config: UpsampleErrorConfig
    value_ranges: ValueRanges

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x], fine to coarse, of `image` [band, y, x].

        `valid` is bool [y, x]; both have exactly the grid's size.
        """
        planes = planes_in_ranges(image, valid, self.value_ranges, self.config)
        blocks, levels = pixel_moments(planes, valid), []
        for scale in range(grid.num_scales):
            blocks = merge_moments(blocks, 2) if scale else blocks
            cells = merge_moments(blocks, grid.base_patch_size)
            if self.config.interpolation == "nearest":
                squares = reduce_blocks(np.add, blocks.squares, grid.base_patch_size)
            else:
                enlarged = _enlarged(blocks, cells, grid.base_patch_size, 2**scale)
                squared = np.where(valid, (planes - enlarged) ** 2, 0.0)
                squares = reduce_blocks(np.add, squared, grid.patch_sizes[scale])
            levels.append(per_pixel(squares, cells.num_valid))
        return combined(levels, self.config)


@dataclass(frozen=True)
class SpectralAngleScorer:
    """Mean over the cell's valid pixels of the angle between their spectrum and the mean spectrum.

    In radians, [0, pi]. Spectra are the archive's own numbers over the width of their band's value
    range; `low` is not subtracted, for it would move the origin the angle is seen from. A zero
    spectrum has angle 0 with any. `value_ranges` are (low, high) per band, in the pixels' numbers.
    """

    config: SpectralAngleConfig
    value_ranges: ValueRanges

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x], fine to coarse, of `image` [band, y, x].

        `valid` is bool [y, x]; both have exactly the grid's size.
        """
        low, high = np.array(self.value_ranges).T[:, :, None, None]
        spectra = in_widths(np.where(valid, image, 0).astype(np.float64), high - low)
        lengths, directions = _polar(spectra)
        sums = zip(
            pool(spectra, valid, grid, "mean"), pool(lengths, valid, grid, "mean"), strict=True
        )
        maps = []
        for size, count, (mean, length) in zip(
            grid.patch_sizes, cell_counts(valid, grid), sums, strict=True
        ):
            angles = _angles(directions, spread(_mean_directions(mean, length), size))
            summed = reduce_blocks(np.add, np.where(valid, angles, 0.0), size)
            maps.append(per_pixel(summed, count).astype(np.float32))
        return maps


@dataclass(frozen=True)
class ExternalScorer:
    """Mean or maximum of scores the user supplies per pixel, in the user's own unit and range.

    Pixels whose score is NaN or infinite are unknown and count as invalid. Scores beyond what
    float32 holds take its largest number. `value_ranges` have no effect.
    """

    config: ExternalConfig
    value_ranges: ValueRanges

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x], fine to coarse, of the score plane [1, y, x].

        `valid` is bool [y, x]; both have exactly the grid's size. Raises ConfigError for more planes.
        """
        known = valid & np.isfinite(image[0])
        scores = np.where(known, image[0], 0).astype(np.float64)
        np.clip(scores, -_FLOAT32_MAX, _FLOAT32_MAX, out=scores)
        return [m.astype(np.float32) for m in pool(scores, known, grid, self.config.statistic)]


def _enlarged(blocks: Moments, cells: Moments, side: int, factor: int) -> np.ndarray:
    """float64 [..., y, x] in px: means of blocks of `factor` px, interpolated cell by cell.

    `side` blocks lie along a cell.
    """
    means = np.where(blocks.num_valid > 0, blocks.mean, spread(cells.mean, side))
    below, above, part = _neighbouring_blocks(means.shape[-1], side, factor)
    # In this form equal blocks give exactly their value.
    rows = means[..., below] + part * (means[..., above] - means[..., below])
    below, above, part = _neighbouring_blocks(means.shape[-2], side, factor)
    return rows[..., below, :] + part[:, None] * (rows[..., above, :] - rows[..., below, :])


def _neighbouring_blocks(
    num_blocks: int, side: int, factor: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every px along an axis: the blocks before and after it in its cell, and the way between.

    Pixel and block centres are at halves, as in `align_corners=False`; at a cell's border both blocks
    are the outermost one.
    """
    pixel = np.arange(num_blocks * factor)
    first = pixel // (side * factor) * side
    position = ((pixel % (side * factor)) + 0.5) / factor - 0.5
    position = np.clip(position, 0, side - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, side - 1)
    return first + below, first + above, position - below


def _polar(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [y, x] and directions [band, y, x] (of length 1, or 0) of vectors [band, y, x]."""
    # Divided by their largest component, squares of very small numbers do not vanish.
    largest = np.abs(vectors).max(axis=0)
    scaled = vectors / np.where(largest > 0, largest, 1.0)
    norm = np.sqrt((scaled**2).sum(axis=0))
    return largest * norm, scaled / np.where(norm > 0, norm, 1.0)


def _mean_directions(mean: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Directions [band, y, x] of mean spectra; `length` [y, x] is the mean length of the spectra."""
    found, directions = _polar(np.where(np.isnan(mean), 0.0, mean))
    return np.where(found > _CANCELLED * length, directions, 0.0)


def _angles(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Radians [y, x] between directions [band, y, x]; 0 where one is zero.

    `2 atan2(|a - b|, |a + b|)` of Kahan (2006) equals the arc cosine of the product, which for nearly
    equal directions loses half of the digits.
    """
    apart = np.sqrt(((ours - others) ** 2).sum(axis=0))
    together = np.sqrt(((ours + others) ** 2).sum(axis=0))
    known = (ours != 0).any(axis=0) & (others != 0).any(axis=0)
    return np.where(known, 2 * np.arctan2(apart, together), 0.0)
