"""Several stores as one dataset: their tiles in one plan, each store with its share of every epoch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from model.batch import TokenBatch
from model.data import draws
from model.data.joining import Structure, join, structure_of
from model.data.sampling import Sampling
from pipeline.errors import AptileError, ConfigError

Draw = tuple[int, int]


def mix(parts: Sequence[tuple[Any, float]], epoch_tiles: int | None = None) -> "MixedDataset":
    """One dataset of several, for `BatchStream` and `TokenBatches`.

    `parts` are (dataset, weight): a store's share of the tiles of every epoch is its weight over the sum of
    all. An epoch has `epoch_tiles` tiles, copies counted (default: as many as there are tiles with
    tokens); inside a store each tile has the floor or the ceiling of its expected number of copies.

    A modality that several stores have must have one grid, and the same band sets, bands and types; one
    that only some have has no tokens in the tiles of the others. One tile of every store is read to know.
    Raises ConfigError, naming both stores, where they do not fit.
    """
    if not parts:
        raise ConfigError("mix was given no dataset; give (dataset, weight) pairs")
    for dataset, weight in parts:
        if not (np.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"{name_of(dataset)}: its weight is {weight}; a weight is a number above 0"
            )
        if not (dataset.token_counts > 0).any():
            raise ConfigError(f"{name_of(dataset)}: none of its tiles has a token; leave it out")
    if epoch_tiles is not None and epoch_tiles < len(parts):
        raise ConfigError(
            f"epoch_tiles is {epoch_tiles}; it must be at least 1 for each of the {len(parts)} datasets"
        )
    datasets, weights = zip(*parts, strict=True)
    mixed = MixedDataset(datasets, tuple(map(float, weights)), epoch_tiles)
    _ = mixed.structure
    return mixed


@dataclass(eq=False)
class MixedDataset:
    """Tiles of several datasets, numbered one dataset after another; made by `mix`."""

    datasets: tuple[Any, ...]
    weights: tuple[float, ...]
    epoch_tiles: int | None = None

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, index: int) -> Any:
        """A tile with everything decoded, as its own dataset gives it."""
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index}; the dataset has tiles 0 ... {len(self) - 1}")
        part = int(np.searchsorted(self._edges, index, "right")) - 1
        return self.datasets[part][index - int(self._edges[part])]

    @cached_property
    def token_counts(self) -> np.ndarray:
        """int64 [tile]"""
        return np.concatenate([dataset.token_counts for dataset in self.datasets])

    @cached_property
    def tile_ids(self) -> np.ndarray:
        """Ids as in the stores; two stores may have the same ones."""
        return np.concatenate([dataset.tile_ids for dataset in self.datasets])

    @cached_property
    def store_order(self) -> np.ndarray:
        """int64 [tile]: store after store, each in its own order."""
        starts = self._edges[:-1].tolist()
        return np.concatenate(
            [d.store_order + start for d, start in zip(self.datasets, starts, strict=True)]
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the datasets' own, and how they are mixed."""
        said = [d.fingerprint for d in self.datasets], self.weights, self.epoch_tiles
        return hashlib.sha256(repr(said).encode()).hexdigest()

    @cached_property
    def sampling(self) -> "StoreShares":
        """How often a tile is in an epoch."""
        number = self.epoch_tiles or int((self.token_counts > 0).sum())
        return StoreShares(
            weights=np.ones(len(self)),
            tiles_per_epoch=number,
            edges=tuple(self._edges.tolist()),
            numbers=_shares(np.array(self.weights), number),
        )

    @cached_property
    def structure(self) -> Structure:
        """What every batch has, whichever stores its tiles come from."""
        found = [
            structure_of(d.batch([int(np.argmax(d.token_counts > 0))]), name_of(d))
            for d in self.datasets
        ]
        return Structure.common(found)

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        draw: Draw | None = None,
        on_error: str = "raise",
        buffers: Any = None,
    ) -> TokenBatch:
        """These tiles, packed: store after store, those of a store in the order given."""
        batches, starts, failure = [], [], None
        skipped: tuple[str, ...] = ()
        for part, own in self._by_store(indices):
            dataset, start = self.datasets[part], int(self._edges[part])
            try:
                batches.append(dataset.batch(own, draw, on_error, buffers))
                starts.append(start)
            except AptileError as error:
                if on_error == "raise":
                    raise
                # None of this store's tiles in the batch could be read; those of others can.
                failure = error
                skipped += tuple(f"{dataset.tile_ids[tile]}: {error}" for tile in own.tolist())
        if not batches:
            assert failure is not None
            raise failure
        return join(batches, starts, self.structure, skipped)

    def will_read(self, indices: Sequence[int] | np.ndarray) -> None:
        """A hint that these tiles are read soon; returns at once."""
        for part, own in self._by_store(indices):
            self.datasets[part].will_read(own)

    def _by_store(self, indices: Sequence[int] | np.ndarray) -> list[tuple[int, np.ndarray]]:
        tiles = np.asarray(indices, np.int64)
        if tiles.size == 0 or tiles.min() < 0 or tiles.max() >= len(self):
            raise IndexError(
                f"batch of tiles {tiles.tolist()!s:.80}; give at least one index in 0 ... {len(self) - 1}"
            )
        part = np.searchsorted(self._edges, tiles, "right") - 1
        return [(int(p), tiles[part == p] - self._edges[p]) for p in np.unique(part)]

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedDataset, (self.datasets, self.weights, self.epoch_tiles)

    @cached_property
    def _edges(self) -> np.ndarray:
        """int64 [dataset + 1]: where each dataset's tiles begin, and the end."""
        return np.concatenate([[0], np.cumsum([len(dataset) for dataset in self.datasets])])


@dataclass(frozen=True, eq=False)
class StoreShares(Sampling):
    """Sampling that gives every store a fixed number of tiles: `numbers` [store].

    Store `k` has the tiles `edges[k] ... edges[k + 1] - 1`; all its tiles with tokens weigh the same.
    """

    edges: tuple[int, ...] = (0,)
    numbers: tuple[int, ...] = ()

    def draw(self, tiles: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        drawn = []
        seeds = draws.integers(seed, 0, np.arange(len(self.numbers)), "stores", 2**31).tolist()
        for begin, end, number, own in zip(
            self.edges[:-1], self.edges[1:], self.numbers, seeds, strict=True
        ):
            of_store = tiles[(tiles >= begin) & (tiles < end)]
            drawn.append(Sampling(self.weights, number).draw(of_store, own, epoch))
        return np.concatenate(drawn)


def _shares(weights: np.ndarray, number: int) -> tuple[int, ...]:
    """Whole numbers in proportion to weights that add up to `number`, each at least 1."""
    expected = weights / weights.sum() * number
    shares = np.floor(expected).astype(np.int64)
    by_rest = np.argsort(shares - expected, kind="stable")
    shares[by_rest[: number - int(shares.sum())]] += 1
    while (shares == 0).any():
        shares[shares.argmin()] += 1
        shares[shares.argmax()] -= 1
    return tuple(shares.tolist())


def name_of(dataset: Any) -> str:
    """The store of a dataset, for messages."""
    return str(dataset.store.location)
