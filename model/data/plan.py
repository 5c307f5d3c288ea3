"""Which tiles form the batch of a step: a pure function of seed, epoch, step and token counts.

Nothing is read here, and only the epoch that is asked for is planned.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from model.data import draws
from model.data.dealing import deal
from model.data.order import (
    Windows,
    block_order,
    windows_in_order,
    windows_of_tiles,
    windows_of_tokens,
)
from model.data.sampling import Sampling
from pipeline.errors import ConfigError
from pipeline.storage.tiles import NEIGHBOURS

# Of the default window: so few tiles that reading stays close together, and so many batches that each
# gets few neighbours.
_WINDOW_TILES, _WINDOW_BATCHES = 2048, 32

Balance = Literal["tokens", "squares"]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Batches of a token budget or of a number of tiles, over all ranks together.

    - `counts` int [tile]: tokens. Every tile with tokens is in one batch per epoch, or as often as
      `sampling` says; a tile without tokens is in none.
    - `batch_tokens`: no batch holds more. `batch_tiles`: every batch holds so many; the last of an epoch
      what is left.
    - `drop_last` leaves out what fills no batch: with `batch_tiles` a short last batch; with
      `batch_tokens` tiles at the end of the epoch's order or, without `shuffle`, the last batch. When
      nothing is left out, shuffled batches of tokens are all equally far from full.
    - `balance`: what the ranks of a step hold equally much of, tokens or their squares (the cost of
      attention); see EpochPlan.tiles_of_rank.
    - `shuffle`: blocks of `block_tiles` neighbours in `store_order` are permuted, and batches drawn from
      windows of about `window_tiles` tiles, but at least 8 batches; by default of 2048 tiles or 32
      batches, whichever is more. Without it batches follow store order. How much the labels of a batch
      vary beyond chance, if neighbours have the same, is about
      `1 + (block_tiles - 1) * (tiles of a batch - 1) / window_tiles`.
    - `store_order` int64 [tile]: the tiles as they lie in the store; ascending if not given.

    Raises ConfigError if the settings contradict each other or a tile has more than `batch_tokens`.
    """

    counts: np.ndarray
    batch_tokens: int | None = field(default=None, kw_only=True)
    batch_tiles: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    shuffle: bool = field(default=True, kw_only=True)
    sampling: Sampling | None = field(default=None, kw_only=True)
    drop_last: bool = field(default=False, kw_only=True)
    balance: Balance = field(default="tokens", kw_only=True)
    block_tiles: int = field(default=NEIGHBOURS, kw_only=True)
    window_tiles: int | None = field(default=None, kw_only=True)
    store_order: np.ndarray | None = field(default=None, kw_only=True)
    _candidates: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts, np.int64)
        assert counts.ndim == 1
        object.__setattr__(self, "counts", counts)
        self._check()
        order = np.arange(counts.size) if self.store_order is None else self.store_order
        assert order.shape == counts.shape
        object.__setattr__(self, "_candidates", order[counts[order] > 0])
        if self._candidates.size == 0:
            raise ConfigError(
                f"none of the {counts.size} tiles has a token; there is nothing to plan"
            )

    def _check(self) -> None:
        given = {"batch_tokens": self.batch_tokens, "batch_tiles": self.batch_tiles}
        if (self.batch_tokens is None) == (self.batch_tiles is None):
            raise ConfigError(
                f"{' and '.join(f'{name} is {value}' for name, value in given.items())}; "
                "give one of the two"
            )
        given |= {"block_tiles": self.block_tiles, "window_tiles": self.window_tiles}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.balance not in ("tokens", "squares"):
            raise ConfigError(f"balance is {self.balance!r}; it is 'tokens' or 'squares'")
        if self.sampling is not None and self.sampling.weights.shape != self.counts.shape:
            raise ConfigError(
                f"sampling has {self.sampling.weights.size} weights for {self.counts.size} tiles; "
                "give one per tile"
            )
        largest = int(self.counts.max(initial=0))
        if self.batch_tokens is not None and largest > self.batch_tokens:
            raise ConfigError(
                f"tile {int(self.counts.argmax())} has {largest} tokens, batch_tokens is "
                f"{self.batch_tokens}; raise it, or set max_tokens_per_tile to at most that"
            )

    def epoch(self, epoch: int) -> "EpochPlan":
        """The plan of one epoch.

        Raises ConfigError if `drop_last` leaves no step.
        """
        tiles = self._candidates
        if self.sampling is not None:
            tiles = self.sampling.draw(tiles, self.seed, epoch)
        if self.shuffle:
            tiles = tiles[block_order(tiles.size, self.block_tiles, self.seed, epoch)]
        elif self.sampling is not None:
            tiles = self._in_store_order(tiles)
        windows = self._windows(tiles)
        if windows.num_steps == 0:
            raise ConfigError(
                f"{tiles.size} tiles of {int(self.counts[tiles].sum())} tokens fill no batch of "
                f"{self._batch}; make batches smaller or leave drop_last off"
            )
        return EpochPlan(self, epoch, tiles[: windows.edges[-1]], windows)

    def _in_store_order(self, tiles: np.ndarray) -> np.ndarray:
        place = np.empty(self.counts.size, np.int64)
        place[self._candidates] = np.arange(self._candidates.size)
        return self._candidates[np.sort(place[tiles])]

    def _windows(self, tiles: np.ndarray) -> Windows:
        if self.batch_tiles is not None:
            window = self._window(self.batch_tiles) if self.shuffle else 0
            return windows_of_tiles(tiles.size, self.batch_tiles, window, self.drop_last)
        assert self.batch_tokens is not None
        tokens = self.counts[tiles]
        if not self.shuffle:
            return windows_in_order(tokens, self.batch_tokens, self.drop_last)
        window = self._window(round(self.batch_tokens / tokens.mean()))
        return windows_of_tokens(tokens, self.batch_tokens, window, self.drop_last)

    def _window(self, batch_tiles: int) -> int:
        if self.window_tiles is not None:
            return self.window_tiles
        return max(_WINDOW_TILES, _WINDOW_BATCHES * batch_tiles)

    @property
    def _batch(self) -> str:
        if self.batch_tiles is not None:
            return f"{self.batch_tiles} tiles"
        return f"{self.batch_tokens} tokens"


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps of one epoch. A window of tiles is dealt to its batches when one of them is asked for.

    Safe to use from several threads at once.
    """

    plan: BatchPlan
    epoch: int
    _tiles: np.ndarray
    _windows: Windows
    # The windows dealt last: those of the step that is trained and of the one that is read.
    _dealt: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return self._windows.num_steps

    @property
    def num_tiles(self) -> int:
        """Tiles of the epoch, counted once per copy."""
        return self._tiles.size

    @property
    def fewest_tiles(self) -> int:
        """Tiles of the smallest step."""
        return self._windows.fewest

    def check_ranks(self, world_size: int) -> None:
        """Raise ConfigError if some step of the epoch has fewer tiles than there are ranks.

        Nothing to fear with `batch_tokens` of at least twice `world_size` times the largest tile, in an
        epoch of many steps.
        """
        if self.fewest_tiles < world_size:
            raise ConfigError(
                f"epoch {self.epoch} has a step of {self.fewest_tiles} tiles for {world_size} ranks; "
                f"set drop_last, or make batches larger than {self.plan._batch}"
            )

    def tiles(self, step: int) -> np.ndarray:
        """int64: rows of the dataset of a step's batch, those that are close in the store together."""
        window = self._windows.of_step(self._checked(step))
        places, first = self._batches(window)
        within = step - int(self._windows.steps[window])
        begin = int(self._windows.edges[window])
        return self._tiles[begin + places[first[within] : first[within + 1]]]

    def tiles_of_rank(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """int64: the part of `tiles(step)` that one rank trains on, in the same order.

        Every tile goes to one rank, and every rank has one at least. Tokens of two ranks, or with
        balance="squares" sums of squared tokens of a tile, differ by at most the largest tile's, and
        usually by far less. With `batch_tiles` the ranks also have equally many tiles, or one less.

        Raises ConfigError as `check_ranks`.
        """
        assert 0 <= rank < world_size
        self.check_ranks(world_size)
        tiles = self.tiles(step)
        weights = self.plan.counts[tiles]
        if self.plan.balance == "squares":
            weights = weights**2
        falling = np.argsort(-weights, kind="stable")
        even = self.plan.batch_tiles is not None
        dealt = np.empty(tiles.size, np.int64)
        dealt[falling] = deal(weights[falling][None], world_size, even=even)[0]
        ranks = (step, np.arange(world_size))
        numbers = draws.bits(self.plan.seed, self.epoch, ranks, "ranks").argsort(kind="stable")
        return tiles[dealt == numbers[rank]]

    def window_tiles(self, step: int) -> np.ndarray:
        """int64: the tiles of all steps that are drawn from the same window, in store order by blocks."""
        window = self._windows.of_step(self._checked(step))
        return self._tiles[self._windows.edges[window] : self._windows.edges[window + 1]]

    def _checked(self, step: int) -> int:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step}; the epoch has steps 0 ... {self.num_steps - 1}")
        return step

    def _batches(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Places inside a window, batch after batch, and where each batch begins."""
        for number, places, first in self._dealt:
            if number == window:
                return places, first
        batch = self._batch_of_place(window)
        places = np.argsort(batch, kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(batch))])
        # One assignment, so that other threads see the old list or the new one.
        self._dealt[:] = [(window, places, first), *self._dealt[:1]]
        return places, first

    def _batch_of_place(self, window: int) -> np.ndarray:
        """int64 [place]: which of a window's batches, in the order of their steps, owns a place."""
        begin, end = self._windows.edges[window : window + 2].tolist()
        first, last = self._windows.steps[window : window + 2].tolist()
        place = np.arange(begin, end)
        if not self.plan.shuffle:
            return np.zeros(place.size, np.int64)
        chance = draws.bits(self.plan.seed, self.epoch, place, "places")
        batch = np.empty(place.size, np.int64)
        if self.plan.batch_tiles is not None:
            batch[chance.argsort(kind="stable")] = np.arange(place.size) // self.plan.batch_tiles
            return batch
        tokens = self.plan.counts[self._tiles[begin:end]]
        falling = np.lexsort((chance, -tokens))
        dealt = deal(tokens[falling][None], last - first, self.plan.batch_tokens)[0]
        steps = draws.bits(self.plan.seed, self.epoch, np.arange(first, last), "steps")
        batch[falling] = steps.argsort(kind="stable")[dealt]
        return batch
