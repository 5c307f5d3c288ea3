"""A dataset without a store, for what only concerns the order, the threads and the state of a stream."""

import threading
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace

import numpy as np

from model.data.stream import THREAD_NAME


@dataclass(frozen=True)
class Numbers:
    """Stands for a batch: which tiles were read, and with which draw."""

    tiles: list[int]
    draw: tuple[int, int]
    skipped: tuple[str, ...] = ()

    def pin_memory(self):
        return self


@dataclass
class NumberedTiles:
    """Tiles that are only numbers. `fails` are tiles whose reading raises; `read` remembers every batch."""

    counts: np.ndarray
    fingerprint: str = "f" * 64
    fails: set[int] = field(default_factory=set)
    read: list[list[int]] = field(default_factory=list)
    hinted: list[list[int]] = field(default_factory=list)

    commit: int = 1

    def __len__(self):
        return len(self.counts)

    @property
    def store(self):
        return SimpleNamespace(commit=SimpleNamespace(number=self.commit))

    @property
    def token_counts(self):
        return self.counts

    @property
    def store_order(self):
        return np.arange(len(self.counts))

    @property
    def tile_ids(self):
        return [f"t{number}" for number in range(len(self.counts))]

    def will_read(self, indices):
        self.hinted.append(np.asarray(indices).tolist())

    def batch(self, indices, draw=None, on_error="raise", buffers=None):
        tiles = np.asarray(indices).tolist()
        self.read.append(tiles)
        bad = sorted(self.fails.intersection(tiles))
        if bad and on_error == "raise":
            raise OSError(f"tile {bad[0]}: the disk is gone")
        kept = [tile for tile in tiles if tile not in bad]
        return Numbers(kept, draw, tuple(f"t{tile}" for tile in bad))


def numbered(num_tiles=100, seed=0, **facts):
    counts = np.random.default_rng(seed).integers(20, 200, num_tiles)
    return NumberedTiles(counts, **facts)


def reading_threads():
    """Threads of any stream that are alive."""
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def taken(stream, epochs=1):
    """Tiles of every batch of the rest of this epoch, and of whole ones after it."""
    return [batch.tiles for _ in range(epochs) for batch in stream]


def steps_of(stream, number):
    """The next `number` batches, over as many epochs as it takes."""
    batches = []
    while len(batches) < number:
        batches += islice(stream, number - len(batches))
    return batches
