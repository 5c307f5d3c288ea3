"""The same batches for torch's DataLoader, read by worker processes instead of threads."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from model.batch import TokenBatch
from model.data.buffers import BufferPool
from model.data.schedule import BatchReader, OnError, Position, Ranks, Schedule, checked_on_error
from pipeline.errors import ConfigError

_WORKER_STEPS = "worker_steps"


class TokenBatches(IterableDataset[TokenBatch]):
    """Batches of a plan for `DataLoader(TokenBatches(...), batch_size=None, num_workers=N,
    multiprocessing_context="spawn")`, or torchdata's StatefulDataLoader.

    The settings are those of `BatchStream`, and so are the batches and their order, for any number of
    workers: worker `w` of `W` reads the steps `w`, `w + W` ... Workers that are started anew for every
    epoch need `set_epoch` before it, in the process that owns the loader.

    Iterating raises ConfigError in a worker that was forked: threads of the libraries that read a store
    do not survive that.
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
        on_error: OnError = "raise",
    ) -> None:
        self.dataset = dataset
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
        self._ranks = Ranks.checked(rank, world_size)
        self._on_error = checked_on_error(on_error)
        self._buffers = BufferPool()
        # Where this epoch's iteration begins, and how many steps this worker has given since.
        self._start, self._given = Position(), 0
        self._process = os.getpid()

    def set_epoch(self, epoch: int) -> None:
        """Begin with an epoch; the one that a loaded state is in goes on where it was."""
        if epoch != self._start.epoch:
            self._start, self._given = Position(epoch, 0), 0

    def __len__(self) -> int:
        """Steps of the current epoch, those before a loaded state's included."""
        return self.schedule.num_steps(self._start.epoch)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where this dataset is.

        A DataLoader does not tell its dataset what it has handed out: with one, give the `step` of the
        epoch that comes next. A StatefulDataLoader keeps one state for each worker by itself.
        """
        if step is not None:
            return self.schedule.state(Position(self._start.epoch, step))
        if get_worker_info() is None:
            return self.schedule.state(Position(self._start.epoch, self._start.step + self._given))
        return {**self.schedule.state(self._start), _WORKER_STEPS: self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin at a state, also one of a BatchStream; raises as `BatchStream.load_state_dict`."""
        self._start = self.schedule.position_of(state)
        self._given = int(state.get(_WORKER_STEPS, 0))

    def __iter__(self) -> Iterator[TokenBatch]:
        worker, workers = self._worker()
        read = BatchReader(
            self.dataset,
            self.schedule,
            self._ranks or Ranks.found(),
            self._on_error,
            self._buffers,
        )
        epoch, first = self._start
        steps = self.schedule.num_steps(epoch)
        while (step := first + worker + self._given * workers) < steps:
            batch = read(Position(epoch, step))
            self._given += 1
            yield batch
        self._start, self._given = Position(epoch + 1, 0), 0

    def _worker(self) -> tuple[int, int]:
        if self._process != os.getpid():
            raise ConfigError(
                "batches are read in a forked process, which cannot read a store; give the DataLoader "
                'multiprocessing_context="spawn" or "forkserver"'
            )
        info = get_worker_info()
        return (0, 1) if info is None else (info.id, info.num_workers)

    def __getstate__(self) -> dict[str, Any]:
        """A worker does not know the ranks of the processes that train."""
        return {**self.__dict__, "_ranks": self._ranks or Ranks.found()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process = os.getpid()
