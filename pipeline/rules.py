"""Partition rules: which thresholds a frame is split by, and which of them make sense.

Thresholds are listed fine to coarse: `thresholds[0]` decides whether a patch of `2 p` px is kept or
split into four of `p` px. A patch is kept while its score is below its threshold.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import ConfigError
from pipeline.grid import MAX_SCALES
from pipeline.scorers.config import Frozen

DEFAULT_QUANTILE = 0.5
WAYS = ("thresholds", "quantile", "tokens_per_tile", "uniform_px", "mean_tokens")
# Tiles of a scene whose scores set its thresholds under a quantile rule.
QUANTILE_SAMPLE_TILES = 16
# Stored as text because JSON has no infinity.
Threshold = Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, str) else v)]
# The smallest normal float32: a patch whose score is exactly 0 stays whole under any quantile.
_KEEP_CONSTANT = float(np.finfo(np.float32).tiny)


class PartitionRule(Frozen):
    """What decides whether a patch is split. At most one of its ways is given."""

    thresholds: tuple[Threshold, ...] | None = Field(
        None,
        description="Scores from which on a patch is split, fine to coarse, one fewer than scales; "
        "taken per scene from the quantile below when no rule is given.",
    )
    quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The share of the patches of each size that stays whole when a scene's own scores "
        "set the thresholds; 0.5 when no rule is given.",
    )
    tokens_per_tile: int | None = Field(
        None,
        ge=1,
        description="A budget: exactly so many tokens per tile, or as near below as a quadtree allows; "
        "the highest scores are split first.",
    )
    uniform_px: int | None = Field(
        None, ge=1, description="Patches of this one size in px, whatever their scores."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = list(self.ways())
        if len(given) > 1:
            raise ValueError(f"{given[1]} has no effect beside {given[0]}; give one of them")
        return self

    def ways(self) -> dict[str, object]:
        """The ways that are given, by name; none means the default quantile."""
        ways = {name: getattr(self, name) for name in WAYS if hasattr(self, name)}
        return {name: value for name, value in ways.items() if value is not None}


class PartitionConfig(PartitionRule):
    """How a frame is cut into patches."""

    base_patch_size: int = Field(4, ge=1, le=64, description="Smallest patch in px.")
    num_scales: int = Field(
        3, ge=1, le=MAX_SCALES, description="Patch sizes; each is twice the one before."
    )

    @property
    def root_size_px(self) -> int:
        """Largest patch in px."""
        return self.base_patch_size * int(2 ** (self.num_scales - 1))


class FurtherRule(PartitionRule):
    """The rule of a partition made from a store's score maps."""

    mean_tokens: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Thresholds that give this mean number of tokens per tile over the whole store.",
    )
    shared: Literal["max", "mean"] | None = Field(
        None,
        description="One partition for all timesteps of a tile, from the largest or the mean of their "
        "scores.",
    )


def rule_entry(rule: PartitionRule) -> dict[str, object]:
    """The rule as it is stored: what is given, or the default quantile."""
    given = rule.ways() or {"quantile": DEFAULT_QUANTILE}
    shared = getattr(rule, "shared", None)
    return {**given, **({"shared": shared} if shared else {})}


def rule_in_words(entry: Mapping[str, object]) -> str:
    """A stored rule in one line, as a configuration would say it."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in entry.items())


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def check_uniform(patch_size_px: int, base_patch_size: int, num_scales: int) -> None:
    """Raise ConfigError unless the quadtree has patches of that size."""
    sizes = [base_patch_size * 2**s for s in range(num_scales)]
    if patch_size_px not in sizes:
        raise ConfigError(
            f"uniform_px is {patch_size_px}; this quadtree has patches of "
            f"{', '.join(map(str, sizes))} px"
        )


def uniform_thresholds(patch_size_px: int, base_patch_size: int, num_scales: int) -> list[float]:
    """Thresholds, fine to coarse, under which every patch has that size."""
    sizes = [base_patch_size * 2**s for s in range(1, num_scales)]
    return [-math.inf if size > patch_size_px else math.inf for size in sizes]


def sampled_tiles(rows: int, cols: int, num_tiles: int) -> np.ndarray:
    """int64: up to `num_tiles` of a scene's `rows x cols` tiles, row-major numbers in order.

    The sample depends on the scene's size in tiles alone, so that it is the same from pixels and from
    stored maps, and for every shard that holds a part of the scene.
    """
    rng = np.random.default_rng([rows, cols])
    return np.sort(rng.choice(rows * cols, min(num_tiles, rows * cols), replace=False))


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
