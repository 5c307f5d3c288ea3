"""Where the committed frames of a store lie: which tile, in which shard, of which scene."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.rules import sampled_tiles
from pipeline.storage.tiles import expand
from pipeline.store import Store


@dataclass(frozen=True)
class FrameRun:
    """Frames of some tiles, tile by tile: `frames` int64 [frame], and int64 [tile] where each tile's
    frames begin among them."""

    frames: np.ndarray
    tile_starts: np.ndarray

    @property
    def frames_per_tile(self) -> np.ndarray:
        """int64 [tile]."""
        return np.diff(self.tile_starts, append=len(self.frames))


@dataclass(frozen=True)
class Places:
    """Tiles with at least one committed frame of one modality, in the order of their frames.

    `slots` int64 [frame] are the frames, tile by tile; `starts` int64 [tile + 1] where each tile's begin
    and `scene` int64 [frame] whose they are, scenes being numbered by name. `place`, `row`, `col` int64
    [tile] say where a tile is, `place_shape` int64 [tile, 2] how many rows and columns its place has.
    """

    shard_capacity: int
    slots: np.ndarray
    starts: np.ndarray
    scene: np.ndarray
    place: np.ndarray
    row: np.ndarray
    col: np.ndarray
    place_shape: np.ndarray

    @property
    def num_tiles(self) -> int:
        return len(self.starts) - 1

    @property
    def num_frames(self) -> np.ndarray:
        """int64 [tile]."""
        return np.diff(self.starts)

    def shard_tiles(self, shard: int) -> np.ndarray:
        """int64: the tiles whose first frame lies in a shard; every tile is of one."""
        ends = np.array([shard, shard + 1]) * self.shard_capacity
        first, last = np.searchsorted(self.slots[self.starts[:-1]], ends).tolist()
        return np.arange(first, last)

    def tiles_in(self, shard: int) -> np.ndarray:
        """int64: tiles with any frame in a shard; one that dates were appended to has several."""
        return np.unique(self._tile_of_entry[self._by_shard.of(shard)])

    def run(self, tiles: np.ndarray) -> FrameRun:
        """All frames of these tiles."""
        numbers = self.num_frames[tiles]
        return FrameRun(self.slots[self.entries(tiles)], np.cumsum(numbers) - numbers)

    def entries(self, tiles: np.ndarray) -> np.ndarray:
        """int64: positions in `slots` and `scene` of all frames of these tiles."""
        return expand(self.starts[tiles], self.num_frames[tiles])

    def sampled_of_scene(self, scene: int, num_tiles: int) -> FrameRun:
        """A scene's frames in the tiles that `aptile preprocess` samples too (see `sampled_tiles`)."""
        entries = self._by_scene.of(scene)
        kept = entries[self._sampled(self._tile_of_entry[entries], num_tiles)]
        return FrameRun(self.slots[kept], np.arange(len(kept)))

    def sampled_of_place(self, place: int, num_tiles: int) -> FrameRun:
        """All frames of the sampled tiles of a place."""
        tiles = self._by_place.of(place)
        return self.run(tiles[self._sampled(tiles, num_tiles)])

    def _sampled(self, tiles: np.ndarray, num_tiles: int) -> np.ndarray:
        rows, cols = self.place_shape[tiles[0]].tolist()
        numbers = self.row[tiles] * cols + self.col[tiles]
        return np.isin(numbers, sampled_tiles(rows, cols, num_tiles))

    @cached_property
    def _tile_of_entry(self) -> np.ndarray:
        return np.repeat(np.arange(self.num_tiles), self.num_frames)

    @cached_property
    def _by_shard(self) -> "_Groups":
        return _Groups(self.slots // self.shard_capacity)

    @cached_property
    def _by_scene(self) -> "_Groups":
        return _Groups(self.scene)

    @cached_property
    def _by_place(self) -> "_Groups":
        return _Groups(self.place)


class _Groups:
    """Positions of equal numbers."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]

    def of(self, number: int) -> np.ndarray:
        first, last = np.searchsorted(self._sorted, [number, number + 1]).tolist()
        return self._order[first:last]


def places_of(store: Store, modality: str) -> Places:
    """The committed frames of a store's modality, from its manifest."""
    table = store.frame_table(modality)
    tiles = np.flatnonzero(table.per_tile)
    tiles = tiles[np.argsort(table.slots[table.starts[tiles]], kind="stable")]
    numbers = table.per_tile[tiles]
    entries = expand(table.starts[tiles], numbers)
    manifest = store.manifest
    scenes = manifest[modality].combine_chunks().field("scene_ids").flatten().drop_null()
    rows, cols = (manifest[name].to_numpy().astype(np.int64) for name in ("row", "col"))
    shape = np.stack([manifest[f"place_{axis}"].to_numpy() for axis in ("rows", "cols")], axis=1)
    return Places(
        shard_capacity=store.layouts[modality].shard_capacity,
        slots=table.slots[entries],
        starts=np.concatenate([[0], np.cumsum(numbers)]),
        scene=_numbered(scenes)[entries],
        place=_numbered(manifest["place"].combine_chunks())[tiles],
        row=rows[tiles],
        col=cols[tiles],
        place_shape=shape.astype(np.int64)[tiles],
    )


def _numbered(names: pa.Array) -> np.ndarray:
    """int64: equal numbers for equal names."""
    return names.dictionary_encode().indices.to_numpy().astype(np.int64)
