"""Quadtree partitions from score maps, and the one-call interface for a single image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from pipeline import segments
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.rules import check_thresholds
from pipeline.scorers.config import ScorerConfig
from pipeline.scores import score_maps, scorer_config


@dataclass(frozen=True)
class Partition:
    """One frame cut into large and small patches.

    `scales` is uint8 [leaf] in storage order (see `pipeline.segments`); `score_maps` are float32
    [cell_y, cell_x], fine to coarse. `len()` counts tokens: leaves that hold a valid pixel.
    """

    scales: np.ndarray
    score_maps: list[np.ndarray]
    grid: BaseGrid

    def __len__(self) -> int:
        return int(np.count_nonzero(~segments.is_missing(self.scales)))

    @property
    def descriptors(self) -> np.ndarray:
        """Structured array [leaf]: y, x (base cells), scale, size (px), score, timestep, missing."""
        return segments.descriptors(self.scales, self.grid, self.score_maps)

    @property
    def counts_per_scale(self) -> np.ndarray:
        """int64 [scale]: tokens of every patch size, fine to coarse."""
        return segments.counts_per_scale(self.scales, self.grid.num_scales)


def partition_image(
    image: np.ndarray,
    *,
    base_patch_size: int,
    num_scales: int,
    thresholds: tuple[float, ...],
    bands: Sequence[int] | None = None,
    num_bins: int | None = None,
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None,
    valid: np.ndarray | None = None,
    scorer: str | ScorerConfig = "entropy",
) -> Partition:
    """Score an image [band, y, x] of any size and partition it; see `pipeline.score_maps`.

    `thresholds` are in the score's unit, fine to coarse, one fewer than scales. Raises
    ConfigError for thresholds that cannot be reached and for an integer image without value_range.
    """
    config = scorer_config(scorer, num_bins)
    num_bands = len(image if bands is None else bands)
    check_thresholds(
        thresholds,
        base_patch_size,
        lambda size: config.attainable(size, num_bands),
        num_scales=num_scales,
    )
    maps = score_maps(
        image,
        base_patch_size=base_patch_size,
        num_scales=num_scales,
        bands=bands,
        value_range=value_range,
        valid=valid,
        scorer=config,
    )
    rows, cols = maps[0].shape
    grid = BaseGrid(rows, cols, base_patch_size, num_scales)
    return Partition(partition_scales(maps, thresholds, grid), maps, grid)


def partition_scales(
    maps: list[np.ndarray], thresholds: tuple[float, ...] | list[float], grid: BaseGrid
) -> np.ndarray:
    """uint8 [leaf]: the scales of a frame's leaves in storage order.

    Top-down: a node is kept if `score < threshold` of its size, both float32; base cells are always
    kept. A node whose score is NaN holds no valid pixel and becomes one missing leaf.
    """
    shapes = [grid.level_shape(s) for s in range(grid.num_scales)]
    if [m.shape for m in maps] != shapes:
        raise ConfigError(
            f"score maps have shapes {[m.shape for m in maps]}; the grid has {shapes}"
        )
    scores = np.concatenate([np.ravel(m) for m in maps]).astype(np.float32, copy=False)
    offsets = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
    # Base cells are always kept: their threshold is infinite.
    limits = np.array([np.inf, *thresholds], np.float32)
    scales = np.empty(grid.num_cells, np.uint8)
    count = _partition(scores, offsets, grid.cell_yx, grid.cols, limits, scales)
    return scales[:count].copy()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _partition(
    scores: np.ndarray,
    offsets: np.ndarray,
    cell_yx: np.ndarray,
    cols: int,
    limits: np.ndarray,
    scales: np.ndarray,
) -> int:
    """Walk the cells in storage order; at each, the largest node that starts here and is not split.

    A larger node that merely contains the cell began earlier, so it was split already.
    """
    num_cells = cell_yx.shape[0]
    coarsest = limits.size - 1
    count = 0
    cell = 0
    while cell < num_cells:
        s = coarsest
        while cell & ((1 << (2 * s)) - 1):
            s -= 1
        while True:
            y, x = cell_yx[cell, 0] >> s, cell_yx[cell, 1] >> s
            score = scores[offsets[s] + y * (cols >> s) + x]
            if np.isnan(score):
                scales[count] = s | 0x80
                break
            if s == 0 or score < limits[s]:
                scales[count] = s
                break
            s -= 1
        count += 1
        cell += 1 << (2 * s)
    return count
