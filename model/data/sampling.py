"""Epochs that show some tiles more often than others: weights, and exact numbers of copies from them."""

from dataclasses import dataclass

import numpy as np

from model.data import draws
from pipeline.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Sampling:
    """How often a tile is in an epoch, on average, is proportional to its weight.

    `weights` [tile]: finite, at least 0, not all 0. `tiles_per_epoch` counts copies; by default as many
    as there are tiles with tokens.
    """

    weights: np.ndarray
    tiles_per_epoch: int | None = None

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, np.float64)
        bad = ~(np.isfinite(weights) & (weights >= 0))
        if bad.any():
            tile = int(np.flatnonzero(bad)[0])
            raise ConfigError(
                f"sampling: the weight of tile {tile} is {weights[tile]}; weights are numbers from 0 up"
            )
        if self.tiles_per_epoch is not None and self.tiles_per_epoch < 1:
            raise ConfigError(
                f"sampling: tiles_per_epoch is {self.tiles_per_epoch}; it must be at least 1"
            )
        object.__setattr__(self, "weights", weights)

    def draw(self, tiles: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int64: the tiles of an epoch, drawn from `tiles` int64 [n]; a tile is there once per copy.

        First the first copies in the order of `tiles`, then the second ones ..., so that copies are far
        apart. Systematic resampling: every tile has the floor or the ceiling of its expected number of
        copies, and all together are exactly `tiles_per_epoch`.
        """
        copies = self._copies(tiles, seed, epoch)
        rounds = (tiles[copies > number] for number in range(int(copies.max(initial=0))))
        return np.concatenate([tiles[:0], *rounds])

    def _copies(self, tiles: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        weights = self.weights[tiles]
        largest = float(weights.max())
        if largest == 0:
            raise ConfigError(
                f"sampling: the weights of all {tiles.size} tiles with tokens are 0; give some tile more"
            )
        number = tiles.size if self.tiles_per_epoch is None else self.tiles_per_epoch
        # Neither the sum nor the quotients of very large or small weights leave the range of numbers.
        weights = weights / largest
        expected = weights / weights.sum() * number
        copies = np.floor(expected).astype(np.int64)
        part = expected - copies
        order = draws.permutation(seed, epoch, tiles.size, "order of resampling")
        order = order[part[order] > 0]
        if order.size:
            ends = np.cumsum(part[order])
            # Exact where rounding is not: the fractions of all tiles add up to whole copies.
            ends = np.minimum(ends, number - int(copies.sum()))
            ends[-1] = number - int(copies.sum())
            start = float(draws.uniform(seed, epoch, np.zeros(1, np.int64), "resampling")[0])
            hits = np.floor(ends + start).astype(np.int64)
            copies[order] += np.diff(hits, prepend=0)
        return copies


def class_weights(classes: np.ndarray, exponent: float = 1.0) -> np.ndarray:
    """float64 [class]: frequency ** -exponent, such that the mean weight of a tile is 1; 0 if unused.

    `classes` int [tile], from 0 up. With an exponent of 1 every class that occurs is drawn equally often,
    with 0 every tile, with 0.5 something between.
    """
    classes = np.asarray(classes)
    if classes.dtype.kind not in "iu" or classes.ndim != 1 or classes.size == 0:
        raise ConfigError(
            f"sampling: classes are {classes.dtype} of shape {classes.shape}; give one integer per tile"
        )
    if classes.min() < 0:
        tile = int(classes.argmin())
        raise ConfigError(
            f"sampling: tile {tile} has class {classes[tile]}; classes count from 0. Tiles without a class "
            "get weight 0 in Sampling(weights)"
        )
    found = np.bincount(classes)
    occurs = found > 0
    weights = np.zeros(found.size)
    weights[occurs] = (found[occurs] / classes.size) ** -exponent
    return weights / (weights[occurs] * found[occurs]).sum() * classes.size


def class_balanced(
    classes: np.ndarray, exponent: float = 1.0, tiles_per_epoch: int | None = None
) -> Sampling:
    """Sampling that balances classes, int [tile] from 0 up; `exponent` as in `class_weights`."""
    return Sampling(class_weights(classes, exponent)[classes], tiles_per_epoch)
