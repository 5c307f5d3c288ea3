"""Dealing tiles to batches, or to ranks, so that all hold about the same: largest tiles first.

Works on many windows at once, and gives a window the same result alone as among others: the number of
steps of an epoch is found for all windows together, their batches one by one when they are reached.
"""

from dataclasses import dataclass

import numpy as np

# Rounds of swaps that may mend a window where groups came out above the limit.
_PASSES = 8
# Tiles looked at on either side of a swap, evenly chosen by weight.
_CANDIDATES = 32
# Windows mended at once: what is compared for them stays in the processor's cache.
_AT_ONCE = 16
_WORD_BITS = 63


def deal(
    weights: np.ndarray, num_groups: int, limit: int | None = None, even: bool = False
) -> np.ndarray:
    """int64 [window, tile]: the group, 0 ... `num_groups` - 1, of every tile; -1 where there is none.

    `weights` int64 [window, tile] falls along a row and ends in zeros where a window has fewer tiles.
    The weights of two groups of a window differ by at most its largest tile's; with `even`, their
    numbers of tiles by at most one. A group is empty only if there are fewer tiles than groups.

    Tiles are then swapped between the fullest and the emptiest group, until no group holds more than
    `limit`, or without a limit until that helps no more; `limit` is not always reached.
    """
    rounds = _Rounds.of(weights, num_groups, even)
    groups = np.full(rounds.gains.shape, -1)
    rounds.deal(groups)
    groups = np.where(weights > 0, groups[:, : weights.shape[1]], -1)
    goal = -(-weights.sum(1) // num_groups) if limit is None else np.full(len(weights), limit)
    _mend(weights, groups, rounds.loads(), goal, moves=not even)
    return groups


def fit(weights: np.ndarray, num_groups: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether `deal` keeps all groups within `limit`, bool [window], and the fewest tiles of a group."""
    rounds = _Rounds.of(weights, num_groups, even=False)
    rounds.deal(None)
    fits, fewest = rounds.loads().max(1) <= limit, rounds.sizes().min(1)
    failed = np.flatnonzero(~fits)
    for begin in range(0, failed.size, _AT_ONCE):
        some = failed[begin : begin + _AT_ONCE]
        groups = deal(weights[some], num_groups, limit)
        rows = np.arange(some.size)[:, None] * num_groups
        present = groups >= 0
        place = (rows + groups)[present]
        cells = some.size * num_groups
        loads = np.bincount(place, weights[some][present], cells).reshape(-1, num_groups)
        sizes = np.bincount(place, minlength=cells).reshape(-1, num_groups)
        fits[some], fewest[some] = loads.max(1) <= limit, sizes.min(1)
    return fits, fewest


@dataclass
class _Rounds:
    """Dealing in rounds: the next largest tiles go to the emptiest groups, the largest to the emptiest.

    A group that holds more than the emptiest will hold after the round waits, unless `even`. What a group
    holds, its number of tiles and its own number are one word of `state` [window, group], so one sort of
    whole words orders the groups, ties and all. `gains` [window, tile] is what each tile adds to a word.
    """

    state: np.ndarray
    gains: np.ndarray
    size_shift: int
    load_shift: int
    even: bool

    @classmethod
    def of(cls, weights: np.ndarray, num_groups: int, even: bool) -> "_Rounds":
        windows, tiles = weights.shape
        size_shift = (num_groups - 1).bit_length()
        load_shift = size_shift + tiles.bit_length()
        heaviest = int(weights.sum(1).max(initial=0))
        assert heaviest.bit_length() + load_shift <= _WORD_BITS, "weights too large to be dealt"
        gains = np.zeros((windows, tiles + num_groups), np.int64)
        gains[:, :tiles] = (weights << load_shift) + ((weights > 0).astype(np.int64) << size_shift)
        state = np.tile(np.arange(num_groups), (windows, 1))
        return cls(state, gains, size_shift, load_shift, even)

    def deal(self, groups: np.ndarray | None) -> None:
        """Deal all tiles; tile by tile the group is written into `groups`, shaped as `gains`."""
        num_groups = self.state.shape[1]
        place, all_took = 0, True
        while all_took:
            given = self.gains[:, place : place + num_groups]
            if not given.any():
                return
            self.state.sort(axis=1)
            all_took = self.even or bool((self._loads() <= self._reach(given)).all())
            if all_took:
                if groups is not None:
                    groups[:, place : place + num_groups] = self._numbers()
                self.state += given
                place += num_groups
        self._deal_one_by_one(place, groups)

    def _deal_one_by_one(self, begin: int, groups: np.ndarray | None) -> None:
        """As before from tile `begin` on, but every window has come to a tile of its own."""
        num_groups, last = self.state.shape[1], self.gains.shape[1] - 1
        places = np.full((len(self.state), 1), begin) + np.arange(num_groups)
        while True:
            index = np.minimum(places, last)
            given = np.take_along_axis(self.gains, index, 1)
            if not given.any():
                return
            self.state.sort(axis=1)
            takes = self._loads() <= self._reach(given)
            if groups is not None:
                rows, columns = np.nonzero(takes)
                groups[rows, index[rows, columns]] = self._numbers()[rows, columns]
            self.state += given * takes
            places += takes.sum(1, keepdims=True)

    def _reach(self, given: np.ndarray) -> np.ndarray:
        return (self.state[:, :1] >> self.load_shift) + (given[:, :1] >> self.load_shift)

    def _loads(self) -> np.ndarray:
        return self.state >> self.load_shift

    def _numbers(self) -> np.ndarray:
        return self.state & ((1 << self.size_shift) - 1)

    def loads(self) -> np.ndarray:
        """int64 [window, group]: the weight each group holds."""
        loads = np.empty_like(self.state)
        np.put_along_axis(loads, self._numbers(), self._loads(), 1)
        return loads

    def sizes(self) -> np.ndarray:
        """int64 [window, group], in no particular order: the tiles each group holds."""
        return self.state >> self.size_shift & ((1 << self.load_shift - self.size_shift) - 1)


def _mend(
    weights: np.ndarray, groups: np.ndarray, loads: np.ndarray, goal: np.ndarray, moves: bool
) -> None:
    """Swap tiles between groups above `goal` and the emptiest ones, in place.

    The fullest group is paired with the emptiest, the second fullest with the second emptiest ...; each
    pair swaps the two tiles that leave them closest to each other. With `moves` a tile can also go
    without one in return.
    """
    num_groups = loads.shape[1]
    left = np.flatnonzero(loads.max(1) > goal)
    for _ in range(_PASSES):
        if left.size == 0 or num_groups == 1:
            return
        by_load = np.argsort(loads[left], axis=1, kind="stable")
        full, empty = by_load[:, ::-1][:, : num_groups // 2], by_load[:, : num_groups // 2]
        row, pair = np.nonzero(np.take_along_axis(loads[left], full, 1) > goal[left, None])
        window, full, empty = left[row], full[row, pair], empty[row, pair]
        members = _Members.of(groups[left], num_groups)
        given, back = members.some(row, full), members.some(row, empty)
        if moves:
            back = np.column_stack([back, np.full(len(back), -1)])
        helps, given, back, amount = _best_swap(
            weights[window[:, None], given],
            np.where(back < 0, 0, weights[window[:, None], back]),
            loads[window, full] - loads[window, empty],
            given,
            back,
        )
        window, full, empty = window[helps], full[helps], empty[helps]
        groups[window, given] = empty
        swapped = back >= 0
        groups[window[swapped], back[swapped]] = full[swapped]
        loads[window, full] -= amount
        loads[window, empty] += amount
        left = np.unique(window)
        left = left[loads[left].max(1) > goal[left]]


def _best_swap(
    given_weight: np.ndarray,
    back_weight: np.ndarray,
    gap: np.ndarray,
    given: np.ndarray,
    back: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whether some swap narrows a pair's `gap`; of pairs where it does the two tiles and the gain."""
    gain = given_weight[:, :, None] - back_weight[:, None, :]
    after = np.abs(gap[:, None, None] - 2 * gain).reshape(len(gap), -1)
    best = after.argmin(1)
    pair = np.arange(len(gap))
    helps = after[pair, best] < gap
    pair, (i, j) = pair[helps], np.divmod(best[helps], back.shape[1])
    return helps, given[pair, i], back[pair, j], gain[pair, i, j]


@dataclass
class _Members:
    """The tiles of every group of some windows, group after group."""

    tiles: np.ndarray
    first: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, groups: np.ndarray, num_groups: int) -> "_Members":
        windows, tiles = groups.shape
        cell = np.arange(windows)[:, None] * num_groups + groups
        cell = np.where(groups < 0, windows * num_groups, cell)
        sizes = np.bincount(cell.ravel(), minlength=windows * num_groups + 1)
        first = (np.cumsum(sizes) - sizes)[:-1].reshape(windows, num_groups)
        # Sorting whole words that end in the tile is several times as fast as a stable argsort.
        words = (cell * tiles + np.arange(tiles)).ravel()
        words.sort()
        return cls(words % tiles, first, sizes[:-1].reshape(windows, num_groups))

    def some(self, window: np.ndarray, group: np.ndarray) -> np.ndarray:
        """int64 [pair, candidate]: tiles of a group, evenly chosen; a small one's last repeats, or -1."""
        sizes = self.sizes[window, group][:, None]
        chosen = np.arange(min(_CANDIDATES, int(self.sizes.max())))
        within = np.where(
            sizes > _CANDIDATES, chosen * sizes // _CANDIDATES, np.minimum(chosen, sizes - 1)
        )
        return np.where(sizes == 0, -1, self.tiles[self.first[window, group][:, None] + within])
