"""The order of an epoch's tiles, and the windows it is cut into: what is read close together.

Blocks of neighbours in the store are permuted; consecutive blocks form windows, and the batches of a
window are formed inside it. So reading stays contiguous and every epoch meets other neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from model.data import draws
from model.data.dealing import fit

# Shares of the budget that batches are planned to fill, tried from above.
_FILLS = (
    1,
    0.998,
    0.995,
    0.9925,
    0.99,
    0.985,
    0.98,
    0.97,
    0.96,
    0.95,
    0.93,
    0.9,
    0.86,
    0.82,
    0.77,
    0.7,
    0.6,
    0.5,
)
# A share is given up if of the windows it is tried on more than this need one batch more.
_FAILING = 1 / 3
_TRIED_WINDOWS = 24
# With fewer batches in a window, its cut at a whole tile would show in their fill.
_LEAST_BATCHES = 8
# Tiles compared at once: they stay in the processor's cache.
_TILES_AT_ONCE = 1 << 19


def block_order(num_tiles: int, block_tiles: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_tiles]: places in store order, block after block in a random order.

    The blocks begin at a random place too, so tiles that share a block in one epoch need not in another.
    """
    zero = np.zeros(1, np.int64)
    begin = int(draws.integers(seed, epoch, zero, "begin of blocks", block_tiles)[0]) - block_tiles
    starts = np.arange(begin, num_tiles, block_tiles)
    starts = starts[draws.permutation(seed, epoch, starts.size, "blocks")]
    order = (starts[:, None] + np.arange(block_tiles)).ravel()
    # Only the blocks at the two ends of the store can be incomplete.
    ends = np.flatnonzero((starts < 0) | (starts + block_tiles > num_tiles))
    places = (ends[:, None] * block_tiles + np.arange(block_tiles)).ravel()
    holes = np.sort(places[(order[places] < 0) | (order[places] >= num_tiles)])
    first, *rest = np.split(order, holes)
    return np.concatenate([first, *(piece[1:] for piece in rest)])


@dataclass(frozen=True)
class Windows:
    """Window `w` owns the places `edges[w]` ... and the steps `steps[w]` ... up to the next one's.

    `fewest` is the number of tiles in the smallest batch.
    """

    edges: np.ndarray
    steps: np.ndarray
    fewest: int

    @property
    def num_steps(self) -> int:
        return int(self.steps[-1])

    def of_step(self, step: int) -> int:
        return int(np.searchsorted(self.steps, step, "right")) - 1


def windows_of_tiles(
    num_tiles: int, batch_tiles: int, window_tiles: int, drop_last: bool
) -> Windows:
    """Batches of exactly `batch_tiles`; the last holds what is left, or is left out.

    A window holds the batches that `window_tiles` make up, or a few more; with 0 a single one.
    """
    if drop_last:
        num_tiles -= num_tiles % batch_tiles
    batches = -(-num_tiles // batch_tiles)
    together = max(_LEAST_BATCHES, window_tiles // batch_tiles) if window_tiles else 1
    steps = np.append(np.arange(0, batches, together), batches)
    short = num_tiles % batch_tiles
    return Windows(np.minimum(steps * batch_tiles, num_tiles), steps, short or batch_tiles)


def windows_in_order(tokens: np.ndarray, budget: int, drop_last: bool) -> Windows:
    """One batch per window, filled in the given order until the next tile would exceed the budget."""
    ends = np.cumsum(tokens)
    edges = [0]
    before = 0
    while edges[-1] < tokens.size:
        edges.append(int(ends.searchsorted(before + budget, "right")))
        before = int(ends[edges[-1] - 1])
    if drop_last:
        edges.pop()
    places = np.array(edges)
    return Windows(places, np.arange(places.size), int(np.diff(places).min(initial=tokens.size)))


def windows_of_tokens(
    tokens: np.ndarray, budget: int, window_tiles: int, drop_last: bool
) -> Windows:
    """Windows whose tiles can be dealt to batches of at most `budget` tokens, as full as possible.

    `tokens` int64 [place], none above the budget. What an epoch lacks to whole batches is shared by all
    of them, so none is short; with `drop_last` the tiles at the end that fill no batch are left out.
    """
    ends = np.cumsum(tokens)
    if drop_last and ends[-1] < budget:
        return Windows(np.zeros(1, np.int64), np.zeros(1, np.int64), 0)
    best, best_fill = None, 0.0
    for share in _FILLS:
        trial = _cut(ends, budget * share, window_tiles, drop_last)
        if trial.edges[-1] == 0:
            continue
        windows = trial.steps.size - 1
        tried = np.unique(np.linspace(0, windows - 1, _TRIED_WINDOWS).astype(int))
        planned = np.diff(trial.steps)[tried]
        more = float((_batches(tokens, trial, tried, budget)[0] - planned).mean())
        kept = float(ends[trial.edges[-1] - 1])
        fill = kept / budget / (trial.num_steps + windows * more)
        if (more <= _FAILING or share == _FILLS[-1]) and fill > best_fill:
            best, best_fill = trial, fill
        if more <= 0:
            break
    assert best is not None
    batches, fewest = _batches(tokens, best, np.arange(best.steps.size - 1), budget)
    return Windows(best.edges, np.append(0, np.cumsum(batches)), int(fewest.min()))


def _cut(ends: np.ndarray, fill: float, window_tiles: int, drop_last: bool) -> Windows:
    """Windows of whole tiles that hold `fill` tokens, or a little less, for each of their batches."""
    tokens = int(ends[-1])
    batches = int(tokens // fill) if drop_last else int(-(-tokens // fill))
    if drop_last:
        tokens = int(batches * fill)
        ends = ends[: ends.searchsorted(tokens, "right")]
    together = max(_LEAST_BATCHES, round(window_tiles * batches / max(1, ends.size)))
    windows = max(1, batches // together)
    steps = np.arange(windows + 1) * batches // windows
    goals = (steps[1:-1] * (tokens / max(1, batches))).astype(np.int64)
    cut = ends.searchsorted(goals)
    nearer = ends[cut] - goals <= goals - np.where(cut > 0, ends[cut - 1], 0)
    return Windows(np.concatenate([[0], cut + nearer, [ends.size]]), steps, 0)


def _batches(
    tokens: np.ndarray, windows: Windows, chosen: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [chosen]: how many batches each window needs, and how many tiles the smallest of them has.

    They are at least as many as `windows` gives it, unless it has fewer tiles.
    """
    # With as many batches as tiles every window fits, and with more a batch would be empty.
    most = np.diff(windows.edges)[chosen]
    batches = np.minimum(np.diff(windows.steps)[chosen], most)
    fewest = np.full_like(batches, tokens.size)
    left = np.flatnonzero(most)
    while left.size:
        failed = []
        for number in np.unique(batches[left]):
            same = left[batches[left] == number]
            for some, sorted_tokens in _rows(tokens, windows.edges, chosen, same):
                fits, fewest[some] = fit(sorted_tokens, int(number), budget)
                failed.append(some[~fits])
        left = np.concatenate(failed)
        batches[left] += 1
    return batches, fewest


def _rows(
    tokens: np.ndarray, edges: np.ndarray, chosen: np.ndarray, some: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some of `some` and their windows' tokens [window, tile], largest first, zeros at the end."""
    longest = int(np.diff(edges).max())
    at_once = max(1, _TILES_AT_ONCE // longest)
    for first in range(0, some.size, at_once):
        part = some[first : first + at_once]
        begin, end = edges[chosen[part]][:, None], edges[chosen[part] + 1][:, None]
        place = begin + np.arange(int((end - begin).max()))
        rows = np.where(place < end, tokens[np.minimum(place, tokens.size - 1)], 0)
        np.negative(rows, out=rows)
        rows.sort(axis=1)
        yield part, np.negative(rows, out=rows)
