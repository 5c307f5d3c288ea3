"""The order of training, a pure function of (seed, epoch, step), and a prefetching stream of batches."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from model.batch import TokenBatch
from model.data.dataset import TileDataset


@dataclass(frozen=True)
class BatchOrder:
    """Which tiles form the batch of a step: every tile once per epoch, in a seeded order.

    The last batch of an epoch holds what is left.
    """

    num_tiles: int
    batch_tiles: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_tiles // self.batch_tiles)

    def tiles(self, step: int) -> np.ndarray:
        """int64: rows of the manifest of the batch of `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_tiles)
        return order[within * self.batch_tiles : (within + 1) * self.batch_tiles]


class BatchStream:
    """Batches of the steps `start ... stop - 1`, read ahead in one background thread."""

    _AHEAD = 3

    def __init__(self, dataset: TileDataset, order: BatchOrder, start: int, stop: int) -> None:
        self.dataset, self.order, self.start, self.stop = dataset, order, start, stop

    def __len__(self) -> int:
        """All steps up to `stop`, those before `start` included."""
        return self.stop

    def __iter__(self) -> Iterator[TokenBatch]:
        pending: deque[Future[TokenBatch]] = deque()
        steps = iter(range(self.start, self.stop))
        reader = ThreadPoolExecutor(1, thread_name_prefix="aptile-batches")
        try:
            for step in steps:
                pending.append(reader.submit(self._read, step))
                if len(pending) > self._AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> TokenBatch:
        return self.dataset.batch(self.order.tiles(step))
