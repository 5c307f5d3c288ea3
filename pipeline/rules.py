"""Partition rules: which thresholds a frame is split by, and which of them make sense.

Thresholds are listed fine to coarse: `thresholds[0]` decides whether a patch of `2 p` px is kept or
split into four of `p` px. A patch is kept while its score is below its threshold.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.errors import ConfigError

DEFAULT_QUANTILE = 0.5
# The smallest normal float32: a patch whose score is exactly 0 stays whole under any quantile.
_KEEP_CONSTANT = float(np.finfo(np.float32).tiny)


def check_thresholds(
    thresholds: Sequence[float],
    base_patch_size: int,
    attainable: Callable[[int], float | None],
    *,
    num_scales: int,
) -> None:
    """Raise ConfigError for a wrong number of thresholds, NaN, or a finite one no patch can reach.

    `attainable` gives the largest score of a patch of so many px, or None where there is no bound.

    Minus infinity (all base cells) and plus infinity (all roots) are allowed.
    """
    if len(thresholds) != num_scales - 1:
        raise ConfigError(
            f"thresholds has {len(thresholds)} values {list(thresholds)}; {num_scales} scales need "
            f"{num_scales - 1}, fine to coarse"
        )
    for level, threshold in enumerate(thresholds, start=1):
        size = base_patch_size * 2**level
        if math.isnan(threshold):
            raise ConfigError(f"thresholds[{level - 1}] is nan; give a number, .inf or -.inf")
        limit = attainable(size)
        if limit is not None and limit < threshold < math.inf:
            raise ConfigError(
                f"thresholds[{level - 1}] is {threshold}; a patch of {size} px scores at most "
                f"{limit:.4g} with this scorer, so it would never be split; give a lower number, or "
                ".inf to keep every such patch on purpose"
            )


def quantile_thresholds(score_maps: Sequence[Sequence[np.ndarray]], quantile: float) -> list[float]:
    """Thresholds, fine to coarse, that keep about a share `quantile` of the patches of each size.

    `score_maps` holds the maps (fine to coarse) of every frame of the sample; NaN cells do not
    count. A threshold is never below the smallest positive one, so constant patches stay whole.
    Without a valid patch the threshold is plus infinity: nothing is known that asks for a split.
    """
    num_scales = len(score_maps[0])
    thresholds = []
    for level in range(1, num_scales):
        scores = np.concatenate([maps[level].ravel() for maps in score_maps])
        scores = scores[~np.isnan(scores)]
        if scores.size == 0:
            thresholds.append(math.inf)
            continue
        # An actual score, not an average of two: the comparison is exact in float32.
        value = float(np.quantile(scores, quantile, method="higher"))
        thresholds.append(max(value, _KEEP_CONSTANT))
    return thresholds
