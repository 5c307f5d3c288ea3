"""Statistics of per-pixel numbers over the cells of all levels; coarser levels from finer ones.

Planes are float64 [..., y, x] and the results [..., cell_y, cell_x], fine to coarse, NaN for cells
without a valid pixel. `valid` is bool [y, x]; planes must hold finite numbers everywhere, and what
they hold at invalid pixels has no effect.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.grid import BaseGrid


class Moments(NamedTuple):
    """Of the valid pixels of blocks: number [y, x], mean and sum of squared deviations [..., y, x].

    Blocks without a valid pixel have number 0 and finite numbers of no meaning. Blocks of equal pixels
    have exactly their value as mean and exactly 0 deviation.
    """

    num_valid: np.ndarray
    mean: np.ndarray
    squares: np.ndarray


def pixel_moments(planes: np.ndarray, valid: np.ndarray) -> Moments:
    """Every pixel as a block of its own."""
    return Moments(valid.astype(np.int64), planes, np.zeros(planes.shape))


def merge_moments(parts: Moments, side: int) -> Moments:
    """Moments of blocks of `side x side` parts.

    Pairwise update of Chan, Golub and LeVeque (1983), for many parts at once. Means are taken from
    the smallest part's mean on, which keeps them exact where all parts agree.
    """
    count = reduce_blocks(np.add, parts.num_valid, side)
    known = np.where(parts.num_valid > 0, parts.mean, np.inf)
    smallest = reduce_blocks(np.minimum, known, side)
    smallest[..., count == 0] = 0
    away = parts.mean - spread(smallest, side)
    offset = reduce_blocks(np.add, parts.num_valid * away, side) / np.maximum(count, 1)
    away -= spread(offset, side)
    between = reduce_blocks(np.add, parts.num_valid * away**2, side)
    within = reduce_blocks(np.add, parts.squares, side)
    return Moments(count, smallest + offset, within + between)


def pool(planes: np.ndarray, valid: np.ndarray, grid: BaseGrid, statistic: str) -> list[np.ndarray]:
    """`mean`, `max`, `variance` or `std` (both of the population) of the valid pixels of every cell."""
    match statistic:
        case "mean":
            sums = _levels(np.add, np.where(valid, planes, 0.0), grid)
            return [per_pixel(*pair) for pair in zip(sums, cell_counts(valid, grid), strict=True)]
        case "max":
            largest = _levels(np.maximum, np.where(valid, planes, -np.inf), grid)
            return [np.where(np.isneginf(level), np.nan, level) for level in largest]
        case "variance":
            return [per_pixel(m.squares, m.num_valid) for m in cell_moments(planes, valid, grid)]
        case "std":
            return [np.sqrt(level) for level in pool(planes, valid, grid, "variance")]
    raise AssertionError(statistic)


def cell_moments(planes: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> Iterator[Moments]:
    """Moments of the cells of every level."""
    moments = pixel_moments(planes, valid)
    for side in _sides(grid):
        moments = merge_moments(moments, side)
        yield moments


def cell_counts(valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
    """int64 [cell_y, cell_x] per level: valid pixels."""
    return _levels(np.add, valid.astype(np.int64), grid)


def per_pixel(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`sums / count`, NaN where the count is 0."""
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def reduce_blocks(ufunc: np.ufunc, values: np.ndarray, side: int) -> np.ndarray:
    """[..., y / side, x / side]: `ufunc` over blocks of `side x side` numbers."""
    *front, height, width = values.shape
    # Rows first: whole rows are added at once, and little is left for the short inner axis.
    rows = ufunc.reduce(values.reshape(*front, height // side, side, width), axis=-2)
    return ufunc.reduce(rows.reshape(*rows.shape[:-1], width // side, side), axis=-1)


def spread(cells: np.ndarray, side: int) -> np.ndarray:
    """[..., y * side, x * side]: every number repeated over a block; the way back of a reduction."""
    return np.repeat(np.repeat(cells, side, axis=-1), side, axis=-2)


def _levels(ufunc: np.ufunc, values: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
    levels = []
    for side in _sides(grid):
        values = reduce_blocks(ufunc, values, side)
        levels.append(values)
    return levels


def _sides(grid: BaseGrid) -> list[int]:
    """How many finer blocks lie along a side of a block: from pixels to base cells, then doubling."""
    return [grid.base_patch_size] + [2] * (grid.num_scales - 1)
