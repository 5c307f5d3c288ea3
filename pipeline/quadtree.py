"""Quadtree partitions from score maps, and the one-call interface for a single image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import segments
from pipeline.cut import leaves, splits_by_budget, splits_by_thresholds
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.nodes import node_scores
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
    thresholds: Sequence[float] | None = None,
    num_tokens: int | None = None,
    bands: Sequence[int] | None = None,
    num_bins: int | None = None,
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None,
    valid: np.ndarray | None = None,
    scorer: str | ScorerConfig = "entropy",
) -> Partition:
    """Score an image [band, y, x] of any size and partition it; see `pipeline.score_maps`.

    Give either `thresholds`, in the score's unit, fine to coarse, one fewer than scales, or
    `num_tokens`, a budget (see `splits_by_budget`). Raises ConfigError for neither or both, for
    thresholds that cannot be reached, and for an integer image without value_range.
    """
    if (thresholds is None) == (num_tokens is None):
        raise ConfigError("give either thresholds or num_tokens, they are two rules")
    config = scorer_config(scorer, num_bins)
    num_bands = len(image if bands is None else bands)
    if thresholds is not None:
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
    if thresholds is not None:
        return Partition(partition_scales(maps, thresholds, grid), maps, grid)
    assert num_tokens is not None
    return Partition(budget_scales(maps, num_tokens, grid), maps, grid)


def partition_scales(
    maps: Sequence[np.ndarray], thresholds: Sequence[float], grid: BaseGrid
) -> np.ndarray:
    """uint8 [leaf]: the scales of one frame's leaves in storage order.

    Top-down: a node is kept if `score < threshold` of its size, both float32; base cells are always
    kept. A node whose score is NaN holds no valid pixel and becomes one missing leaf.
    """
    nodes = node_scores([m[None] for m in maps], grid)
    return leaves(splits_by_thresholds(nodes, thresholds, grid), nodes, grid).scales


def budget_scales(maps: Sequence[np.ndarray], num_tokens: int, grid: BaseGrid) -> np.ndarray:
    """uint8 [leaf]: the scales of one frame's leaves under a budget; see `splits_by_budget`."""
    nodes = node_scores([m[None] for m in maps], grid)
    return leaves(splits_by_budget(nodes, num_tokens, grid), nodes, grid).scales
