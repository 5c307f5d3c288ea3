"""Shards in object stores: neighbouring chunks come in one request, and stay, compressed, for those that
are asked for next. Nothing is asked for twice while it is on its way.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np

from pipeline.errors import StoreError
from pipeline.storage.buckets import READ_TRIES, BucketObjects
from pipeline.storage.chunks import Packed, Shard
from pipeline.storage.objects import Objects
from pipeline.storage.tiles import NEIGHBOURS

# Room for the blocks of a window of tiles that is shuffled in memory.
_CACHE_BYTES = 2**29


class Blocks:
    """Ranges of a bucket's objects: the last ones asked for, up to so many bytes. Safe from threads."""

    def __init__(self, objects: BucketObjects, limit: int = _CACHE_BYTES) -> None:
        self.objects, self._limit, self._bytes = objects, limit, 0
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int, int], Future[Packed]] = OrderedDict()

    def get(self, name: str, start: int, end: int) -> "Future[Packed]":
        """The bytes of a range, under way or there; fewer where the object ends before."""
        key = (name, start, end)
        with self._lock:
            held = self._held.pop(key, None)
            if held is None:
                held = self.objects.pool.submit(self._fetch, key)
                self._bytes += end - start
            self._held[key] = held
            while self._bytes > self._limit and len(self._held) > 1:
                (_, *old), _ = self._held.popitem(last=False)
                self._bytes -= old[1] - old[0]
        return held

    def forget(self, name: str, start: int, end: int) -> None:
        """Ask again for a range that came spoilt."""
        with self._lock:
            if self._held.pop((name, start, end), None) is not None:
                self._bytes -= end - start

    def _fetch(self, key: tuple[str, int, int]) -> Packed:
        return np.frombuffer(self.objects.range(*key), np.uint8)


class BucketFile:
    """An object of a bucket, read by blocks once it is known where its chunks lie."""

    # Parts of arrays carry their checksum; one that arrives spoilt is asked for again.
    tries = READ_TRIES

    def __init__(self, blocks: Blocks, name: str, size: int) -> None:
        self._blocks, self._name, self.size = blocks, name, size
        self._starts = self._ends = np.empty(0, np.int64)

    def arrange(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        order = np.argsort(offsets, kind="stable")
        first = np.arange(0, len(order), NEIGHBOURS)
        if len(first):
            self._ends = np.maximum.reduceat((offsets + lengths)[order], first)
            self._starts = offsets[order][first]

    def ask(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        for number in np.unique(np.searchsorted(self._starts, offsets, side="right") - 1).tolist():
            self._blocks.get(self._name, int(self._starts[number]), int(self._ends[number]))

    def read(self, offset: int, length: int) -> Packed:
        if not len(self._starts):
            return np.frombuffer(
                self._blocks.objects.range(self._name, offset, offset + length), np.uint8
            )
        block = self._block(offset)
        try:
            held = self._blocks.get(self._name, *block).result()
        except StoreError:
            self._blocks.forget(self._name, *block)
            raise
        return held[offset - block[0] : offset - block[0] + length]

    def forget(self, offset: int) -> None:
        if len(self._starts):
            self._blocks.forget(self._name, *self._block(offset))

    def _block(self, offset: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, offset, side="right")) - 1
        return int(self._starts[number]), int(self._ends[number])


class Bucket:
    """Where the objects of a bucket are opened."""

    far = True

    def __init__(self, objects: Objects) -> None:
        assert isinstance(objects, BucketObjects)
        self._objects, self._blocks = objects, Blocks(objects)

    def open(self, path: str) -> BucketFile | None:
        size = self._objects.head(path)
        return None if size is None else BucketFile(self._blocks, path, size)

    def map(self, call: Callable[[Any], Shard], which: list[Any]) -> Iterable[Shard]:
        return self._objects.pool.map(call, which)
