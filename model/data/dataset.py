"""Tiles of a store as torch data: a map-style dataset that reads and packs batches.

Nothing is scored here. What a batch holds is a pure function of the commit, the settings and the draw.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from model.batch import TokenBatch
from model.data import choices
from model.data.augment import Augmentation, Draw, augmenter_of
from model.data.choices import LabelChoice, ModalityChoice
from model.data.frames import (
    Buffers,
    ChosenFrames,
    LabelReader,
    ModalityReader,
    NewMemory,
    list_column,
    order_by_first_frame,
    sums_of_runs,
)
from model.data.limit import drop_leaves, limited
from model.data.locations import centres
from model.packing import TileArrays, pack
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.storage.objects import Location
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.storage.tiles import Tile
from pipeline.store import Store

OnError = Literal["raise", "skip-tile"]


class TileDataset(Dataset[Tile | dict[str, Tile]]):
    """The committed tiles of a store: map-style to look at, `batch` to train from.

    - `store`: a path, a URL or an open store; `commit` pins one by number, the newest otherwise.
    - `partition`: which one cuts the frames into tokens; every modality needs it.
    - `modalities`: names, or band sets by name (`{"s2": ["", "20m"], "s1": None}`; "" is the first set,
      None means all). Without it, all modalities that have tokens, with all their band sets.
    - `split`: only tiles of these splits.
    - `normalize="value_range"` brings pixels to [-1, 1] over each band's value range, and to 0 where they
      are not valid; `dtype` is "float16" or "float32" instead of the store's own (normalised: float32).
    - `augment`: an `Augmentation`, drawn by (seed, epoch, tile): see `batch`.
    - `max_tokens_per_tile`: a tile with more keeps a random subset of its leaves, drawn likewise; every
      modality keeps the same share, rounded down.
    - `labels`: names of label rasters of the store, or by name arrays with an entry per tile of the dataset
      (None for a raster).
    - `transform`: called with every `TokenBatch`; what it returns is the batch.

    A tile without any frame of a modality has no tokens of it. Raises StoreError or ConfigError for what
    the store does not have. Can be pickled: the other process opens the same commit.
    """

    def __init__(
        self,
        store: Store | Location,
        partition: str = DEFAULT_PARTITION,
        modalities: ModalityChoice = None,
        split: str | Sequence[str] | None = None,
        commit: int | None = None,
        normalize: Literal["value_range"] | None = None,
        dtype: Literal["float16", "float32"] | None = None,
        augment: Augmentation | None = None,
        max_tokens_per_tile: int | None = None,
        labels: LabelChoice = None,
        transform: Callable[[TokenBatch], TokenBatch] | None = None,
    ) -> None:
        self.store = choices.opened(store, commit)
        self._settings = {
            "store": self.store.location,
            "partition": partition,
            "modalities": modalities,
            "split": split,
            "commit": self.store.commit.number,
            "normalize": normalize,
            "dtype": dtype,
            "augment": augment,
            "max_tokens_per_tile": max_tokens_per_tile,
            "labels": labels,
            "transform": transform,
        }
        sets = choices.band_sets_of(self.store, modalities)
        self.partition, self.augment, self.transform = partition, augment, transform
        self.max_tokens_per_tile = choices.checked_limit(max_tokens_per_tile)
        self.format = choices.pixel_format(normalize, dtype)
        self._readers = choices.readers_of(self.store, sets, partition, self.format)
        self._rows = choices.rows_of_split(self.store, split)
        self.split = split
        self._label_readers, self._label_arrays = choices.labels_of(
            self.store, labels, len(self._rows)
        )
        self._augmenter = None
        if augment is not None:
            self._augmenter = augmenter_of(
                augment, self._rows, self._readers, self._label_readers, self._label_arrays
            )

    @property
    def modalities(self) -> dict[str, tuple[str, ...]]:
        """Names of the band sets that are read, by modality, in the order of a batch."""
        return {r.name: tuple(s.name for s in r.band_sets) for r in self._readers}

    @cached_property
    def manifest(self) -> pa.Table:
        """The store's manifest, of the dataset's tiles only, in its order."""
        whole = len(self._rows) == len(self.store.manifest)
        return self.store.manifest if whole else self.store.manifest.take(self._rows)

    @cached_property
    def tile_ids(self) -> np.ndarray:
        """Id of every tile, in the dataset's order."""
        return np.asarray(self.manifest["id"].to_numpy(zero_copy_only=False))

    @cached_property
    def token_counts(self) -> np.ndarray:
        """int64 [tile]: tokens of every tile, all modalities and band sets, under the limit.

        Those of whole tiles with all dates: crops and dates left out by augmentation make a batch smaller.
        """
        leaves = np.array([self._leaves(reader) for reader in self._readers])
        costs = np.array([len(reader.band_sets) for reader in self._readers])
        limit = self.max_tokens_per_tile
        if limit is None:
            return costs @ leaves
        if self.augment is not None:
            # The shares of what is left of a tile may be rounded to a little more.
            return np.minimum(costs @ leaves, limit)
        return costs @ limited(leaves, costs, limit)

    @cached_property
    def _locations(self) -> np.ndarray:
        """float64 [tile, 2]: see `TokenBatch.location`."""
        return centres(self.manifest["geometry"])

    @cached_property
    def store_order(self) -> np.ndarray:
        """int64 [tile]: the tiles in the order in which their frames lie in the store's shards."""
        return order_by_first_frame([reader.frames for reader in self._readers], self._rows)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides which tiles there are and what they hold.

        The commit's manifest and ledgers, the partition's, and this dataset's settings, but not the labels
        given per tile nor the transform.
        """
        return choices.fingerprint(
            self.store,
            partition=self.partition,
            modalities=self.modalities,
            split=self.split,
            limit=self.max_tokens_per_tile,
            pixels=self.format,
            augment=self.augment,
            label_rasters=list(self._label_readers),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tile | dict[str, Tile]:
        """A tile with everything decoded, as it is stored; by modality where there are several."""
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index}; the dataset has tiles 0 ... {len(self) - 1}")
        row = int(self._rows[index])
        tiles = {r.name: self.store.tile_at(row, r.name, self.partition) for r in self._readers}
        return tiles if len(tiles) > 1 else next(iter(tiles.values()))

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        draw: Draw | None = None,
        on_error: OnError = "raise",
        buffers: Buffers | None = None,
    ) -> TokenBatch:
        """These tiles, packed in the order given; a tile is the same for the same `draw` in any batch.

        `draw` is (seed, epoch). Without it no augmentation is drawn: nothing turns, every date and band is
        there, and of a crop it is the window in the middle. With `on_error="skip-tile"` the batch lacks the
        tiles whose objects are damaged, and says so in `skipped`. Raises IntegrityError, which names the
        object, for a damaged store, and StoreError if no tile is left.
        """
        tiles = self._checked(indices)
        buffers = buffers or NewMemory()
        if on_error not in ("raise", "skip-tile"):
            raise ConfigError(f"on_error is {on_error!r}; it must be 'raise' or 'skip-tile'")
        try:
            read = self._read(tiles, draw, buffers)
        except IntegrityError:
            if on_error == "raise":
                raise
            tiles, skipped = self._readable(tiles, draw)
            read = self._read(tiles, draw, buffers)
            read.skipped = skipped
        batch = pack(read)
        return batch if self.transform is None else self._transformed(batch)

    def will_read(self, indices: Sequence[int] | np.ndarray) -> None:
        """A hint that these tiles are read soon; returns at once."""
        rows = self._rows[self._checked(indices)]
        for reader in self._all_readers:
            slots, _ = reader.frames.of(rows)
            for name in reader.arrays:
                self.store.will_read(name, slots)

    @property
    def _all_readers(self) -> list[ModalityReader | LabelReader]:
        return [*self._readers, *self._label_readers.values()]

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        tiles = np.asarray(indices, np.int64)
        if tiles.ndim != 1 or tiles.size == 0 or tiles.min() < 0 or tiles.max() >= len(self):
            raise IndexError(
                f"batch of tiles {tiles.tolist()!s:.80}; give at least one index in 0 ... {len(self) - 1}"
            )
        return tiles

    def _read(self, tiles: np.ndarray, draw: Draw | None, buffers: Buffers) -> TileArrays:
        rows = self._rows[tiles]
        chosen = self._chosen(rows, draw)
        read = TileArrays(
            tile_indices=tiles,
            modalities=[r.read(self.store, rows, chosen[r.name], buffers) for r in self._readers],
            labels={
                name: r.read(self.store, chosen[name], buffers)
                for name, r in self._label_readers.items()
            },
            normalized=self.format.normalize,
            location=self._locations[tiles],
        )
        read.labels |= {name: labels[tiles] for name, labels in self._label_arrays.items()}
        if self._augmenter is not None:
            self._augmenter.apply(draw, rows, read, buffers)
        if self.max_tokens_per_tile is not None:
            drop_leaves(read.modalities, rows, self.max_tokens_per_tile, draw or (0, 0))
        for reader, frames in zip(self._readers, read.modalities, strict=True):
            reader.convert(frames, buffers)
        return read

    def _chosen(self, rows: np.ndarray, draw: Draw | None) -> dict[str, ChosenFrames]:
        """The frames to read, by modality."""
        chosen = {r.name: ChosenFrames.of(r.frames, rows) for r in self._all_readers}
        if self._augmenter is not None:
            self._augmenter.leave_out_dates(draw, rows, chosen)
        return chosen

    def _readable(self, tiles: np.ndarray, draw: Draw | None) -> tuple[np.ndarray, tuple[str, ...]]:
        """The tiles that can be read, and a line for each that cannot."""
        readable, skipped = [], []
        for tile in tiles.tolist():
            try:
                self._read(np.array([tile]), draw, NewMemory())
                readable.append(tile)
            except IntegrityError as error:
                skipped.append(f"{self.store.manifest['id'][int(self._rows[tile])]}: {error}")
        if not readable:
            raise StoreError(f"none of the batch's {len(tiles)} tiles can be read: {skipped[0]}")
        return np.array(readable), tuple(skipped)

    def _transformed(self, batch: TokenBatch) -> TokenBatch:
        assert self.transform is not None
        changed = self.transform(batch)
        if not isinstance(changed, TokenBatch):
            raise ConfigError(
                f"transform gave {type(changed).__name__}; it must give a TokenBatch, for example by "
                "dataclasses.replace(batch, ...)"
            )
        return changed

    def _leaves(self, reader: ModalityReader) -> np.ndarray:
        """int64 [tile]: leaves that are not missing, of one modality."""
        if self.partition == DEFAULT_PARTITION:
            field = pc.struct_field(self.store.manifest[reader.name], "tokens")
            starts, per_scale = list_column(field)
            return sums_of_runs(per_scale, starts)[self._rows]
        per_frame = self.store.partition(self.partition, reader.name).tokens.sum(1)
        table = reader.frames
        return sums_of_runs(per_frame[table.slots], table.starts)[self._rows]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (type(self), self._settings, self.store.digest)


def _reopened(cls: type[TileDataset], settings: dict[str, Any], digest: str) -> TileDataset:
    """The same dataset in another process."""
    dataset = cls(**settings)
    if dataset.store.digest != digest:
        raise StoreError(
            f"{dataset.store.location}: commit {dataset.store.commit.number} is another than the one this "
            "dataset was made from; make the dataset again"
        )
    return dataset
