"""Where the committed tiles of a store lie: which frames, in which shard, of which scene."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.rules import sampled_tiles
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
    """Committed tiles of one modality in the order of their frames.

    `frame_start`, `num_frames`, `scene`, `row` and `col` are int64 [tile]; scenes are numbered in the
    order in which they first occur.
    """

    shard_capacity: int
    frame_start: np.ndarray
    num_frames: np.ndarray
    scene: np.ndarray
    row: np.ndarray
    col: np.ndarray

    @property
    def num_tiles(self) -> int:
        return len(self.frame_start)

    def shard_tiles(self, shard: int) -> np.ndarray:
        """int64: the tiles of a shard, in slot order."""
        ends = np.array([shard, shard + 1]) * self.shard_capacity
        first, last = np.searchsorted(self.frame_start, ends).tolist()
        return np.arange(first, last)

    def run(self, tiles: np.ndarray) -> FrameRun:
        """The frames of these tiles."""
        numbers = self.num_frames[tiles]
        starts = np.cumsum(numbers) - numbers
        within = np.arange(int(numbers.sum())) - np.repeat(starts, numbers)
        return FrameRun(np.repeat(self.frame_start[tiles], numbers) + within, starts)

    def sampled(self, scene: int, num_tiles: int) -> np.ndarray:
        """int64: the tiles of a scene that `aptile preprocess` samples too (see `sampled_tiles`)."""
        first, last = np.searchsorted(self._by_scene[0], [scene, scene + 1]).tolist()
        tiles = self._by_scene[1][first:last]
        rows, cols = int(self.row[tiles].max()) + 1, int(self.col[tiles].max()) + 1
        numbers = self.row[tiles] * cols + self.col[tiles]
        return tiles[np.isin(numbers, sampled_tiles(rows, cols, num_tiles))]

    @cached_property
    def _by_scene(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.scene, kind="stable")
        return self.scene[order], order


def places_of(store: Store, modality: str) -> Places:
    """The committed tiles of a store, from its manifest."""
    column = store.manifest[modality].combine_chunks()
    starts = column.field("frame_start").to_numpy().astype(np.int64)
    order = np.argsort(starts, kind="stable")
    scenes: dict[tuple[str, ...], int] = {}
    ids = [tuple(names) for names in store.manifest["scene_ids"].to_pylist()]
    scene = [scenes.setdefault(ids[tile], len(scenes)) for tile in order.tolist()]
    return Places(
        shard_capacity=store.layouts[modality].shard_capacity,
        frame_start=starts[order],
        num_frames=column.field("num_frames").to_numpy().astype(np.int64)[order],
        scene=np.array(scene, np.int64),
        row=store.manifest["row"].to_numpy().astype(np.int64)[order],
        col=store.manifest["col"].to_numpy().astype(np.int64)[order],
    )
