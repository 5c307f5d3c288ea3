"""Which tiles a rank reads at which step, and positions as states that can be kept and checked."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from torch import distributed

from model.batch import TokenBatch
from model.data.buffers import BufferPool
from model.data.plan import BatchPlan, EpochPlan
from model.data.sampling import Sampling
from pipeline.errors import ConfigError, StoreError

STATE_VERSION = 1

OnError = Literal["raise", "skip-tile"]


class Position(NamedTuple):
    """How far training is: `step` of `epoch` comes next; both count from 0."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Ranks:
    """Which part of every step is this process's."""

    rank: int
    world_size: int

    @classmethod
    def checked(cls, rank: int | None, world_size: int | None) -> "Ranks | None":
        """As given, None if neither is; ConfigError if one is missing or they do not fit."""
        if rank is None and world_size is None:
            return None
        if rank is None or world_size is None or not 0 <= rank < world_size:
            raise ConfigError(
                f"rank is {rank} and world_size is {world_size}; give both, with 0 <= rank < world_size, "
                "or neither: then torch.distributed is asked"
            )
        return cls(rank, world_size)

    @classmethod
    def found(cls) -> "Ranks":
        """As torch.distributed says, if it is initialised; else one rank."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls(0, 1)


class _Planned:
    """The plan of one epoch, made by whoever needs it first; others wait."""

    def __init__(self, plan: BatchPlan, epoch: int) -> None:
        self._plan, self._epoch, self._lock = plan, epoch, threading.Lock()
        self.made: EpochPlan | None = None

    def get(self) -> EpochPlan:
        with self._lock:
            if self.made is None:
                self.made = self._plan.epoch(self._epoch)
            return self.made


class Schedule:
    """The steps of all epochs over one dataset. May be asked by several threads at once.

    `settings` are arguments of `BatchPlan`; a mixed dataset's sampling holds unless one is given.
    """

    def __init__(self, dataset: Any, **settings: Any) -> None:
        self.fingerprint, self.commits = dataset.fingerprint, commits_of(dataset)
        sampling = settings.pop("sampling", None) or getattr(dataset, "sampling", None)
        self.settings = {**settings, "sampling": sampling and _digest(sampling)}
        self.plan = BatchPlan(
            dataset.token_counts, store_order=dataset.store_order, sampling=sampling, **settings
        )
        self._planned: dict[int, _Planned] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Another process plans for itself."""
        return {**self.__dict__, "_planned": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def num_steps(self, epoch: int) -> int:
        return self._epoch(epoch).get().num_steps

    def is_planned(self, epoch: int) -> bool:
        """Whether `num_steps` and `tiles` of that epoch need no planning."""
        planned = self._planned.get(epoch)
        return planned is not None and planned.made is not None

    def tiles(self, at: Position, ranks: Ranks) -> np.ndarray:
        """int64: the tiles this rank reads at a position."""
        epoch = self._epoch(at.epoch).get()
        if ranks.world_size == 1:
            return epoch.tiles(at.step)
        return epoch.tiles_of_rank(at.step, ranks.rank, ranks.world_size)

    def coming(self, at: Position, ranks: Ranks) -> np.ndarray:
        """int64: the tiles to be read soon around a position, in an order that is good to fetch them in.

        One rank reads a whole window together. Of several, each looks only at its own tiles of a step.
        """
        if ranks.world_size == 1:
            return self._epoch(at.epoch).get().window_tiles(at.step)
        return self.tiles(at, ranks)

    def _epoch(self, epoch: int) -> _Planned:
        with self._lock:
            if epoch not in self._planned:
                # While an epoch ends the next one's plan is needed beside it; never more.
                for old in [e for e in self._planned if not epoch - 1 <= e <= epoch]:
                    del self._planned[old]
                self._planned[epoch] = _Planned(self.plan, epoch)
            return self._planned[epoch]

    def after(self, at: Position) -> Position:
        """The position one step later."""
        if at.step + 1 < self.num_steps(at.epoch):
            return Position(at.epoch, at.step + 1)
        return Position(at.epoch + 1, 0)

    def state(self, at: Position) -> dict[str, Any]:
        """Everything that fixes the steps from a position on, as plain numbers and strings."""
        return {
            "version": STATE_VERSION,
            **at._asdict(),
            "fingerprint": self.fingerprint,
            "commits": list(self.commits),
            **self.settings,
        }

    def position_of(self, state: Mapping[str, Any]) -> Position:
        """The position a state stands for.

        Raises StoreError if it was made over other data, ConfigError if with other settings.
        """
        if state.get("version") != STATE_VERSION:
            raise ConfigError(
                f"a stream's state of version {state.get('version')!r:.40}; this aptile reads version "
                f"{STATE_VERSION}: start anew without it"
            )
        if state.get("fingerprint") != self.fingerprint:
            raise StoreError(self._other_data(state))
        for name, own in self.settings.items():
            if state.get(name) != own:
                raise ConfigError(
                    f"the state was made with {name}={state.get(name)!r}, this stream has {name}={own!r}; "
                    f"give {name}={state.get(name)!r}, or start anew without the state"
                )
        return self._checked(state.get("epoch"), state.get("step"))

    def _checked(self, epoch: Any, step: Any) -> Position:
        whole = isinstance(epoch, int) and isinstance(step, int) and epoch >= 0 and step >= 0
        # Planning is left to whoever reads, unless it is needed to know.
        if whole and (step == 0 or step < self.num_steps(epoch)):
            return Position(epoch, step)
        raise ConfigError(
            f"the state is at epoch {epoch!r:.40}, step {step!r:.40}, which these data do not have; start "
            "anew without it"
        )

    def _other_data(self, state: Mapping[str, Any]) -> str:
        then, now = list(state.get("commits", ())), list(self.commits)
        if then == now:
            remedy = "open the same stores with the same partition, modalities, split and limits"
        else:
            pins = ", ".join(f"commit={number}" for number in then)
            remedy = f"open the data as they were with TileDataset(store, {pins})"
        return (
            f"the state was made over other data (commit {then}, fingerprint "
            f"{state.get('fingerprint')!s:.12}) than this stream's ({now}, {self.fingerprint:.12}); "
            f"{remedy}, or start anew without the state"
        )


@dataclass(frozen=True)
class BatchReader:
    """Reads the batch of a position. It knows nothing of who asks, who so can be forgotten meanwhile."""

    dataset: Any
    schedule: Schedule
    ranks: Ranks
    on_error: OnError
    buffers: BufferPool
    pin_memory: bool = False

    def __call__(self, at: Position) -> TokenBatch:
        batch: TokenBatch = self.dataset.batch(
            self.schedule.tiles(at, self.ranks),
            draw=(self.schedule.settings["seed"], at.epoch),
            on_error=self.on_error,
            buffers=self.buffers,
        )
        return batch.pin_memory() if self.pin_memory else batch


def checked_on_error(on_error: OnError) -> OnError:
    """What to do about tiles that cannot be read; ConfigError if it is none of the choices."""
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error is {on_error!r:.40}; give 'raise' or 'skip-tile'")
    return on_error


def _digest(sampling: Sampling) -> str:
    """What tells one sampling from another, short enough for a state."""
    content = hashlib.sha256(sampling.weights.tobytes())
    content.update(repr(sampling.tiles_per_epoch).encode())
    return content.hexdigest()


def commits_of(dataset: Any) -> tuple[int, ...]:
    """Numbers of the commits a dataset reads, store after store."""
    parts = getattr(dataset, "datasets", (dataset,))
    return tuple(part.store.commit.number for part in parts)
