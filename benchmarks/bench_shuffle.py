"""How random an epoch's order is: windows of permuted blocks against other ways to shuffle a store.

A store of tiles whose labels are sorted, as an archive read region by region has them; batches of 64
tiles. `full permutation` is what cannot be better and reads single tiles; `shards and a buffer` passes
over permuted shards of 1024 tiles and draws from a buffer. Per order:

- `tiles per read`: neighbours in the store that a window (or the buffer) holds side by side, on average
- `distance`: how far apart store neighbours come, on average, 1 as in a full permutation
- `same block`: the share of a batch's tiles that meet another one of their 16 nearest in the store
- `order`: rank correlation of places in the store and in the epoch, largest of several epochs
- `epochs`: the same of two epochs, largest of several pairs
- `classes`: how uneven the 10 classes of a batch are, chi-square over its mean by chance, 1 as there
- `worst classes`: the same, of the worst hundredth of the batches
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, report
from model.data.plan import BatchPlan

BATCH, NEIGHBOURS, CLASSES, SHARD = 64, 16, 10, 1024

# The plan's own first.
WINDOWS = [(4, 2048), (1, 2048), (16, 2048), (8, 4096), (16, 8192), (16, 512), (64, 2048)]

Order = Callable[[int], tuple[np.ndarray, float]]


def permuted(num_tiles: int, epoch: int) -> tuple[np.ndarray, float]:
    return np.random.default_rng(epoch).permutation(num_tiles), 1.0


def in_windows(
    num_tiles: int, block: int, window: int, tokens: bool, epoch: int
) -> tuple[np.ndarray, float]:
    """An epoch of the plan and the mean length of the runs of neighbours in its windows."""
    counts = np.clip(np.random.default_rng(0).lognormal(5.5, 0.7, num_tiles), 64, 1024).astype(int)
    batch = {"batch_tokens": int(BATCH * counts.mean())} if tokens else {"batch_tiles": BATCH}
    plan = BatchPlan(counts, **batch, block_tiles=block, window_tiles=window).epoch(epoch)
    order = np.concatenate([plan.tiles(step) for step in range(plan.num_steps)])
    held = np.sort(plan.window_tiles(plan.num_steps // 2))
    return order, held.size / (1 + np.count_nonzero(np.diff(held) > 1))


def through_buffer(num_tiles: int, buffer: int, epoch: int) -> tuple[np.ndarray, float]:
    """Shards in a random order through a buffer from which tiles are drawn: a tile in, a tile out."""
    rng = np.random.default_rng(epoch)
    shards = np.split(np.arange(num_tiles), np.arange(SHARD, num_tiles, SHARD))
    stream = np.concatenate([shards[i] for i in rng.permutation(len(shards))]).tolist()
    held = stream[:buffer]
    order = []
    for tile, place in zip(stream[buffer:], rng.integers(0, buffer, num_tiles), strict=False):
        order.append(held[place])
        held[place] = tile
    rng.shuffle(held)
    return np.array(order + held), float(min(SHARD, buffer, num_tiles))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return abs(float(np.corrcoef(first, second)[0, 1]))


def class_chances(order: np.ndarray) -> np.ndarray:
    """float64 [batch]: chi-square of the classes of a batch over its mean in a full permutation."""
    size = order.size // BATCH * BATCH
    classes = (order[:size] * CLASSES // order.size).reshape(-1, BATCH)
    found = np.stack([(classes == number).sum(1) for number in range(CLASSES)], 1)
    expected = BATCH / CLASSES
    return ((found - expected) ** 2 / expected).sum(1) / (CLASSES - 1)


def same_block(order: np.ndarray) -> float:
    size = order.size // BATCH * BATCH
    blocks = np.sort(order[:size].reshape(-1, BATCH) // NEIGHBOURS, axis=1)
    same = blocks[:, 1:] == blocks[:, :-1]
    meets = np.zeros(blocks.shape, bool)
    meets[:, 1:] |= same
    meets[:, :-1] |= same
    return float(meets.mean())


def quality(name: str, make: Order, num_tiles: int, epochs: int) -> dict[str, object]:
    made = [make(epoch) for epoch in range(epochs)]
    orders = [order for order, _ in made]
    places = [np.argsort(order) for order in orders]
    distance = np.mean([np.abs(np.diff(place)).mean() for place in places]) / (num_tiles / 3)
    chances = np.concatenate([class_chances(order) for order in orders])
    store = np.arange(num_tiles)
    return {
        "order of an epoch": name,
        "tiles per read": made[0][1],
        "distance": float(distance),
        "same block": float(np.mean([same_block(order) for order in orders])),
        "order": max(correlation(store, place) for place in places),
        "epochs": max(correlation(*pair) for pair in combinations(places, 2)),
        "classes": float(chances.mean()),
        "worst classes": float(np.quantile(chances, 0.99)),
    }


def main() -> None:
    args = arguments(__doc__)
    num_tiles, epochs = (6_000, 2) if args.quick else (200_000, 4)
    orders: dict[str, Order] = {"full permutation": partial(permuted, num_tiles)}
    for block, window in WINDOWS:
        name = f"blocks of {block}, windows of {window}"
        orders[name] = partial(in_windows, num_tiles, block, window, False)
    orders["the first of these, batches of tokens"] = partial(
        in_windows, num_tiles, *WINDOWS[0], True
    )
    for buffer in (1024, 8192):
        orders[f"shards and a buffer of {buffer}"] = partial(through_buffer, num_tiles, buffer)
    report([quality(name, make, num_tiles, epochs) for name, make in orders.items()], args.json)


if __name__ == "__main__":
    main()
