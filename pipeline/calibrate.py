"""Tokens as a function of the thresholds, exact from score maps, and thresholds for a wanted mean.

The thresholds of all levels are taken at one quantile of each level's own scores. A node is split if
its score reaches its level's threshold, that is up to a certain quantile, and if all its ancestors
are: so up to the smallest such quantile among itself and them, its *critical* quantile. Sorted by it,
the nodes give the number of tokens at every quantile. With two scales this is the curve of tokens
against the one threshold.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.nodes import Shared, level_offsets, node_scores, shared_nodes
from pipeline.storage.places import FrameRun, places_of
from pipeline.store import Store


@dataclass(frozen=True)
class TokenCurve:
    """Tokens of some tiles against the quantile, in [0, 1], that all thresholds are taken at.

    `scores` holds each level's scores in ascending order (float32, without NaN), from the second finest
    on; `critical` float64 [node] the critical quantiles in ascending order, and `tokens_from` int64
    [node + 1] the tokens when the nodes from that place on are split.
    """

    scores: tuple[np.ndarray, ...]
    critical: np.ndarray
    tokens_from: np.ndarray
    num_tiles: int

    def thresholds(self, quantile: float) -> list[float]:
        """Fine to coarse; each one of the level's own scores, or plus infinity at quantile 1."""
        return [_at_quantile(scores, quantile) for scores in self.scores]

    def mean_tokens(self, quantile: float) -> float:
        """Mean tokens per tile; never rises with the quantile."""
        split_from = np.searchsorted(self.critical, quantile, side="left")
        return float(self.tokens_from[split_from]) / self.num_tiles

    def quantile_for(self, mean_tokens: float) -> float:
        """The quantile whose mean is nearest to the wanted one, not above it.

        Tied scores make steps: the mean can lie as far below as the step is high. Raises ConfigError
        where the wanted mean lies outside the curve.
        """
        fewest, most = self.mean_tokens(1.0), self.mean_tokens(0.0)
        if not fewest <= mean_tokens <= most:
            raise ConfigError(
                f"mean_tokens is {mean_tokens:g}; these tiles have between {fewest:g} (all roots) and "
                f"{most:g} tokens (all base cells) on average, give a number in between"
            )
        steps = np.append(np.unique(self.critical), 1.0)
        tokens = self.tokens_from[np.searchsorted(self.critical, steps, side="left")]
        # The quotient is that of `mean_tokens`: a mean of the curve finds its own step.
        return float(steps[np.argmax(tokens / self.num_tiles <= mean_tokens)])


def token_curve(
    blocks: Iterable[tuple[np.ndarray, FrameRun]], grid: BaseGrid, shared: Shared | None = None
) -> TokenCurve:
    """The curve of the tiles whose nodes (`pipeline.nodes`) float32 [frame, node] come in blocks."""
    scores: list[np.ndarray] = []
    present: list[np.ndarray] = []
    num_tiles = 0
    offsets = level_offsets(grid)
    for nodes, run in blocks:
        num_tiles += len(run.tile_starts)
        known = (~np.isnan(nodes)).astype(np.int32)
        if shared is not None:
            known = np.add.reduceat(known, run.tile_starts, axis=0)
            nodes = shared_nodes(nodes, run.tile_starts, shared)
        scores.append(nodes[:, offsets[1] :])
        present.append(known)
    return _curve(np.concatenate(scores), np.concatenate(present), grid, num_tiles)


def store_curve(store: Store, modality: str, shared: Shared | None = None) -> TokenCurve:
    """The curve of all committed tiles of a store, from its score maps, one shard after another.

    Holds about 16 bytes per base cell of the store. Raises IntegrityError if a map is lost.
    """
    layout, places = store.layouts[modality], places_of(store, modality)
    store.check_shards(places.slots // layout.shard_capacity)
    runs = (places.run(places.shard_tiles(shard)) for shard in range(layout.num_shards))
    blocks = (
        (node_scores(store.read_score_maps(modality, run.frames), layout.grid), run)
        for run in runs
        if len(run.frames)
    )
    return token_curve(blocks, layout.grid, shared)


def _curve(scores: np.ndarray, present: np.ndarray, grid: BaseGrid, num_tiles: int) -> TokenCurve:
    """From scores [tile, node] of all levels but the finest, and tokens `present` [tile, node]."""
    offsets = level_offsets(grid)
    by_level: list[np.ndarray] = []
    critical, gains = [np.empty(0)], [np.empty(0, np.int64)]
    above = np.full((len(scores), 0), np.inf)
    for level in range(grid.num_scales - 1, 0, -1):
        at = offsets[level : level + 2] - offsets[1]
        ordered, own = _critical(scores[:, at[0] : at[1]])
        above = np.minimum(own, np.repeat(above, 4, axis=1)) if above.shape[1] else own
        fine = present[:, offsets[level - 1] : offsets[level]]
        children = fine.reshape(len(fine), -1, 4).sum(axis=2)
        gain = children - present[:, offsets[level] : offsets[level + 1]]
        split = above >= 0
        by_level.insert(0, ordered)
        critical.append(above[split])
        gains.append(gain[split])
    roots = int(present[:, offsets[-2] :].sum())
    joined, gained = np.concatenate(critical), np.concatenate(gains)
    order = np.argsort(joined)
    tokens_from = roots + np.append(np.cumsum(gained[order][::-1])[::-1], 0)
    return TokenCurve(tuple(by_level), joined[order], tokens_from.astype(np.int64), num_tiles)


def _critical(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A level's scores in order, and for each node up to which quantile it is split; -1 for NaN."""
    known = ~np.isnan(scores)
    ordered = np.sort(scores[known])
    critical = np.full(scores.shape, -1.0)
    # The place of the last equal score: a threshold taken there is still reached.
    last = np.searchsorted(ordered, scores[known], side="right") - 1
    critical[known] = last / max(1, len(ordered))
    return ordered, critical


def _at_quantile(ordered: np.ndarray, quantile: float) -> float:
    """The first score at or after that share of the scores; the inverse of `_critical`."""
    number = len(ordered)
    place = min(number, int(np.ceil(quantile * number)))
    # Rounding may be off by one place; both directions compare the same quotient.
    while place > 0 and (place - 1) / number >= quantile:
        place -= 1
    while place < number and place / number < quantile:
        place += 1
    return float(ordered[place]) if place < number else float("inf")
