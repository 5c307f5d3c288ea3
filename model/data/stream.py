"""Batches of a plan, read ahead by threads, in an order that can be left and taken up again.

Every thread reads whole batches into memory that is used again; what is handed out is in the plan's
order, whatever thread was first.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.batch import TokenBatch
from model.data.buffers import BufferPool
from model.data.schedule import BatchReader, OnError, Position, Ranks, Schedule, checked_on_error
from pipeline.errors import ConfigError

THREAD_NAME = "aptile-batches"
# More threads than this wait for each other's turn in the interpreter.
_MOST_THREADS = 4
# One batch that is read and one that waits: a read that takes three times as long is not noticed.
_AHEAD_PER_THREAD = 2
# Steps before the end of an epoch at which the next one's plan is begun: a plan of ten million tiles
# takes a few hundred steps' time.
_PLANNED_EARLY = 256
# Steps before its first one at which a window is announced to the dataset, to be fetched from the disk.
_ANNOUNCED = 32


class BatchStream:
    """Packed batches for a training loop of one's own, or for Lightning.

    Iterating gives the rest of the current epoch; the position is then the next epoch's first step. The
    order is a pure function of the seed and the data: it depends neither on `threads` nor on `ahead`, and
    a step has the same tiles over all ranks for any number of ranks.

    - `batch_tokens` or `batch_tiles` (one of them): the size of a step over all ranks. `shuffle`,
      `sampling`, `balance` and `drop_last` are those of `BatchPlan`.
    - `rank`, `world_size`: this process's part of every step; if not given, torch.distributed is asked
      when iteration begins. Every rank has the same number of steps.
    - `threads` read, each a whole batch (default: the processor's cores, at most 4); up to `ahead` batches
      (default: two for each thread) are being read or wait.
    - `on_error="skip-tile"` leaves out tiles that cannot be read; `skipped` counts them.
    - `pin_memory` reads into page-locked memory, for `batch.to(device)` that does not wait (CUDA only).

    Leaving a loop early ends its threads, as does `close`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_tokens: int | None = None,
        batch_tiles: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        sampling: Any = None,
        balance: str = "tokens",
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        threads: int | None = None,
        ahead: int | None = None,
        on_error: OnError = "raise",
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.skipped = dataset, 0
        self.schedule = Schedule(
            dataset,
            batch_tokens=batch_tokens,
            batch_tiles=batch_tiles,
            seed=seed,
            shuffle=shuffle,
            sampling=sampling,
            balance=balance,
            drop_last=drop_last,
        )
        self._given_ranks = Ranks.checked(rank, world_size)
        self._threads, self._ahead = _checked_threads(threads, ahead)
        if pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory is set and there is no CUDA device; leave it out")
        self._on_error, self._pin = checked_on_error(on_error), pin_memory
        self._buffers = BufferPool(pinned=pin_memory)
        self._position = Position()
        self._reader: _Reader | None = None
        self._newest: object = None

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._position.epoch

    @property
    def step(self) -> int:
        """The step of the next batch, in its epoch: how many were handed out."""
        return self._position.step

    def __len__(self) -> int:
        """Steps of the current epoch, those handed out already included."""
        return self.schedule.num_steps(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where this stream is: what was handed out counts, what was read ahead does not."""
        return self.schedule.state(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream was; the number of ranks and of threads may be another.

        Raises StoreError if that was over other data, ConfigError if with other settings.
        """
        position = self.schedule.position_of(state)
        self.close()
        self._position = position

    def close(self) -> None:
        """End the threads; iterating again starts them anew, at the same position."""
        self._newest = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __iter__(self) -> Iterator[TokenBatch]:
        self._newest = turn = object()
        return self._rest_of_epoch(turn)

    def _rest_of_epoch(self, turn: object) -> Iterator[TokenBatch]:
        epoch = self.epoch
        try:
            while self.epoch == epoch:
                yield self._take()
                if turn is not self._newest:
                    raise RuntimeError("this stream was iterated anew, or closed, in the meantime")
        finally:
            # At the end of an epoch the first batches of the next one are being read already.
            if turn is self._newest and self.epoch == epoch:
                self.close()

    def _take(self) -> TokenBatch:
        reader = self._reader_here()
        batch = reader.take()
        self._position = reader.position
        self.skipped += len(batch.skipped)
        return batch

    def _reader_here(self) -> "_Reader":
        """The reader that stands where this stream does."""
        ranks = self._given_ranks or Ranks.found()
        if self._reader is not None and (self._reader.position, self._reader.ranks) != (
            self._position,
            ranks,
        ):
            self._reader.close()
            self._reader = None
        if self._reader is None:
            read = BatchReader(
                self.dataset, self.schedule, ranks, self._on_error, self._buffers, self._pin
            )
            self._reader = _Reader(read, self._position, self._threads, self._ahead)
        return self._reader


@dataclass
class _Announce:
    """Tells a dataset which tiles will be read, each window once."""

    dataset: Any
    schedule: Schedule
    ranks: Ranks
    last: np.ndarray | None = None

    def __call__(self, positions: list[Position]) -> None:
        for at in positions:
            tiles = self.schedule.coming(at, self.ranks)
            if self.last is None or not np.array_equal(tiles, self.last):
                self.dataset.will_read(tiles)
                self.last = tiles


class _Reader:
    """Batches from a position on, epoch after epoch, read by threads ahead of who takes them."""

    def __init__(self, read: BatchReader, start: Position, threads: int, ahead: int) -> None:
        self.ranks, self.position = read.ranks, start
        self._read, self._schedule, self._ahead = read, read.schedule, ahead
        self._pending: deque[tuple[Position, Future[TokenBatch]]] = deque()
        self._next = start
        # The batch handed out last, and those before: freed by the readers. The loop's own thread would
        # wait for its turn in the interpreter once for every tensor.
        self._last: TokenBatch | None = None
        self._done: list[TokenBatch | None] = []
        self._threads = ThreadPoolExecutor(threads, THREAD_NAME)
        # Its own thread: a plan of many tiles would keep a reading one from its batches.
        self._scout = ThreadPoolExecutor(1, THREAD_NAME)
        self._announce = _Announce(read.dataset, read.schedule, read.ranks)
        self._planning, self._announced = start.epoch, start

    def take(self) -> TokenBatch:
        """The batch of `position`, which moves on; raises what reading it raised."""
        self._fill()
        after, future = self._pending.popleft()
        batch = future.result()
        self.position = after
        self._done.append(self._last)
        self._last = batch
        self._fill()
        return batch

    def close(self) -> None:
        # The garbage collector ends a forgotten stream in any thread, even in one of these.
        own = threading.current_thread().name.startswith(THREAD_NAME)
        for threads in (self._threads, self._scout):
            threads.shutdown(wait=not own, cancel_futures=True)

    __del__ = close

    def _fill(self) -> None:
        # Rather fewer batches ahead than to wait for the next epoch's plan.
        while len(self._pending) < self._ahead and (
            not self._pending or self._schedule.is_planned(self._next.epoch)
        ):
            future = self._threads.submit(_read_next, self._read, self._next, self._done)
            self._look_ahead()
            self._next = self._schedule.after(self._next)
            self._pending.append((self._next, future))

    def _look_ahead(self) -> None:
        """Have the dataset told what comes, and the next epoch planned before it begins."""
        epoch, step = self._next
        steps = self._schedule.num_steps(epoch)
        first = self._announced.step if self._announced.epoch == epoch else 0
        if first < steps and first <= step + _ANNOUNCED // 2:
            self._announced = Position(epoch, min(step + _ANNOUNCED, steps))
            coming = [Position(epoch, number) for number in range(first, self._announced.step)]
            self._scout.submit(self._announce, coming)
        if self._planning == epoch and step + _PLANNED_EARLY >= steps:
            self._planning = epoch + 1
            self._scout.submit(self._schedule.num_steps, epoch + 1)


def _read_next(read: BatchReader, at: Position, done: list[TokenBatch | None]) -> TokenBatch:
    done.clear()
    return read(at)


def _checked_threads(threads: int | None, ahead: int | None) -> tuple[int, int]:
    """How many threads read, and how many batches ahead; ConfigError if a thread would have none."""
    chosen = min(_cores(), _MOST_THREADS, ahead or _MOST_THREADS) if threads is None else threads
    batches = chosen * _AHEAD_PER_THREAD if ahead is None else ahead
    if not 1 <= chosen <= batches:
        raise ConfigError(
            f"threads is {threads} and ahead is {ahead}; every thread reads one of the batches ahead: give "
            "1 <= threads <= ahead"
        )
    return chosen, batches


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
