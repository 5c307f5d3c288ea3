"""Tiles of a store as torch data: a map-style dataset that reads and packs batches.

Nothing is scored here.
"""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from model.packing import TokenBatch, pack
from pipeline.errors import ConfigError
from pipeline.storage.objects import Location
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.storage.tiles import Tile
from pipeline.store import Store, open_store


class TileDataset(Dataset[Tile]):
    """The committed tiles of one modality of a store, cut by one of its partitions.

    Pixels are those of its first band set; a tile without any frame of the modality has no tokens.

    `dataset[i]` is a tile with everything decoded; `dataset.batch([...])` reads several tiles
    concurrently and packs them. Reading needs neither rasterio nor dask nor numba.
    """

    def __init__(
        self,
        store: Store | Location,
        modality: str | None = None,
        partition: str = DEFAULT_PARTITION,
    ) -> None:
        self.store = store if isinstance(store, Store) else open_store(store)
        self.modality = modality if modality is not None else self.store.modalities[0]
        if self.modality not in self.store.tokenized:
            raise ConfigError(
                f"{self.store.location} has no modality {self.modality!r} with tokens; "
                f"it has {', '.join(self.store.tokenized)}"
            )
        self.store.check_partition(self.modality, partition)
        self.partition = partition
        self._frames = self.store.frame_table(self.modality)

    def __len__(self) -> int:
        return len(self._frames.per_tile)

    def __getitem__(self, index: int) -> Tile:
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index}; the dataset has tiles 0 ... {len(self) - 1}")
        return self.store.tile_at(index, self.modality, self.partition)

    def batch(self, indices: Sequence[int] | np.ndarray) -> TokenBatch:
        """The tiles of these rows of the manifest, packed in the order given."""
        tiles = np.asarray(indices, np.int64)
        if tiles.size == 0 or tiles.min() < 0 or tiles.max() >= len(self):
            raise IndexError(
                f"batch of tiles {tiles.tolist()!s:.80}; give at least one index in 0 ... {len(self) - 1}"
            )
        slots, timesteps = self._frames.of(tiles)
        read = self.store.read_frames(self.modality, slots, self.partition)
        grid = self.store.layouts[self.modality].grid
        return pack(read, self._frames.per_tile[tiles], timesteps, tiles, grid)
