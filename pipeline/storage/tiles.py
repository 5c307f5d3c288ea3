"""Tiles and frames as they are read from a store."""

from dataclasses import dataclass
from datetime import datetime

import numpy as np

from pipeline import segments
from pipeline.grid import BaseGrid

# Neighbours in store order asked for together: their pixels are worth one request of an object store,
# and a shuffle of such blocks is close to one of single tiles (benchmarks/bench_shuffle.py).
NEIGHBOURS = 4


@dataclass(frozen=True)
class Tile:
    """One modality of one tile with everything decoded; frames are those timesteps that are there.

    `pixels` [frame, band, y, x] of the first band set in the archive's own numbers, `valid` bool
    [frame, y, x], `score_maps` float32 [frame, cell_y, cell_x] fine to coarse (NaN: no valid pixel; no maps
    where nothing was scored), `scales` one uint8 [leaf] per frame (none for label rasters). `timesteps`
    int64 [frame] are positions in `datetimes`, the tile's dates (UTC, None if unknown); a static
    modality's only frame has timestep 0. `further` holds pixels and validity of the other band sets by
    name.
    """

    id: str
    pixels: np.ndarray
    valid: np.ndarray
    score_maps: list[np.ndarray]
    scales: list[np.ndarray]
    grid: BaseGrid
    timesteps: np.ndarray
    datetimes: list[datetime | None]
    further: dict[str, tuple[np.ndarray, np.ndarray]]

    def descriptors(self) -> np.ndarray:
        """Structured array [leaf] of all frames, in storage order; see `pipeline.segments`."""
        parts = [
            segments.descriptors(scales, self.grid, [m[frame] for m in self.score_maps], timestep)
            for frame, (scales, timestep) in enumerate(
                zip(self.scales, self.timesteps.tolist(), strict=True)
            )
        ]
        return np.concatenate([np.empty(0, segments.DESCRIPTOR), *parts])


@dataclass(frozen=True)
class FrameTable:
    """Frames of every tile of a modality, tile by tile in the manifest's order.

    Tile `i` has the slots `slots[starts[i] : starts[i + 1]]` (int64) at `timesteps` (int64), positions
    among the tile's dates. Missing timesteps have no entry.
    """

    starts: np.ndarray
    slots: np.ndarray
    timesteps: np.ndarray

    @property
    def per_tile(self) -> np.ndarray:
        """int64 [tile]: frames of each tile."""
        return np.diff(self.starts)

    def of(self, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots and timesteps of some tiles, tile after tile."""
        entries = expand(self.starts[tiles], self.per_tile[tiles])
        return self.slots[entries], self.timesteps[entries]


def expand(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: the numbers `starts[i] ... starts[i] + lengths[i] - 1`, run after run."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


@dataclass(frozen=True)
class Frames:
    """Pixels, validity and partitions of some frames of one modality, in the order asked for."""

    pixels: np.ndarray
    valid: np.ndarray
    scales: list[np.ndarray]
