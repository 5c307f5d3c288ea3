"""Frames of some tiles read from a store, with their dates: what becomes a batch.

Tables are arrays over all tiles, made without a loop; pixels are decoded into the memory a batch keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import DTypeLike

from model.packing import BandSetArrays, FrameArrays, LabelArrays
from pipeline.storage.layout import BandSet, StoreLayout
from pipeline.storage.partitions import partition_path
from pipeline.storage.tiles import FrameTable
from pipeline.store import Store


class Buffers(Protocol):
    """Where the memory of a batch comes from."""

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """A C-contiguous array; its content is arbitrary."""


class NewMemory:
    """Buffers that are not used again."""

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        return np.empty(shape, dtype)


@dataclass(frozen=True)
class PixelFormat:
    """How pixels are given: `dtype` None means the store's own; see `TileDataset`."""

    normalize: bool
    dtype: str | None

    def of(self, stored: str) -> np.dtype[Any]:
        """The type of pixels that are stored as `stored`."""
        return np.dtype(self.dtype or ("float32" if self.normalize else stored))


@dataclass(frozen=True)
class DateTable:
    """Dates of every tile of a manifest: of tile `i` `dates[starts[i] : starts[i + 1]]`, NaT if unknown."""

    starts: np.ndarray
    dates: np.ndarray

    @classmethod
    def of(cls, manifest: pa.Table) -> "DateTable":
        starts, dates = list_column(manifest["datetimes"])
        return cls(starts, dates.astype("datetime64[s]"))

    def timestamps(self, tiles: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        """int32 [n, 3]: day 1 ... 31, month 0 ... 11 and year of tiles' timesteps; -1 where unknown."""
        dates = self.dates[self.starts[tiles] + timesteps]
        months, years = dates.astype("datetime64[M]"), dates.astype("datetime64[Y]")
        day = (dates.astype("datetime64[D]") - months).astype(np.int64) + 1
        month, year = (months - years).astype(np.int64), years.astype(np.int64) + 1970
        parts = np.column_stack([day, month, year])
        return np.where(np.isnat(dates)[:, None], -1, parts).astype(np.int32)


@dataclass(frozen=True)
class ChosenFrames:
    """Frames to read, int64 [F] each: slots, positions of their tiles in the batch, timesteps."""

    slots: np.ndarray
    tile: np.ndarray
    timestep: np.ndarray

    @classmethod
    def of(cls, table: FrameTable, rows: np.ndarray) -> "ChosenFrames":
        """All frames of the tiles in these rows of the manifest, tile after tile, in the order of time."""
        slots, timestep = table.of(rows)
        return cls(slots, np.repeat(np.arange(len(rows)), table.per_tile[rows]), timestep)

    def where(self, kept: np.ndarray) -> "ChosenFrames":
        """Those frames for which `kept`, bool [F], is True."""
        return ChosenFrames(self.slots[kept], self.tile[kept], self.timestep[kept])


@dataclass(frozen=True)
class ModalityReader:
    """Reads some band sets of a modality, cut by a partition."""

    layout: StoreLayout
    band_sets: tuple[BandSet, ...]
    partition: str
    frames: FrameTable
    dates: DateTable | None
    ranges: dict[str, np.ndarray]
    format: PixelFormat

    @property
    def name(self) -> str:
        return self.layout.modality

    @property
    def static(self) -> bool:
        """Whether the frame of a tile belongs to all its dates."""
        return self.dates is None

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that are read."""
        rasters = [f"{kind}{s.suffix}" for s in self.band_sets for kind in ("pixels", "valid")]
        scales = f"{partition_path(self.name, self.partition)}/scales"
        return [scales, *(f"{self.name}/{name}" for name in rasters)]

    def read(
        self, store: Store, rows: np.ndarray, chosen: ChosenFrames, buffers: Buffers
    ) -> FrameArrays:
        """Frames chosen of the tiles in these rows of the manifest, as they are stored."""
        slots, tile, timestep = chosen.slots, chosen.tile, chosen.timestep
        scales, counts = store.read_scales(self.name, slots, self.partition)
        return FrameArrays(
            name=self.name,
            grid=self.layout.grid,
            band_sets=[self._band_set(store, s, slots, buffers) for s in self.band_sets],
            scales=scales,
            counts=counts,
            tile=tile,
            timestep=timestep,
            timestamps=self._timestamps(rows[tile], timestep),
            static=self.static,
        )

    def convert(self, frames: FrameArrays, buffers: Buffers) -> None:
        """Bring the pixels into the format asked for, in place."""
        # Pixels that are not valid may be any number.
        with np.errstate(over="ignore", invalid="ignore"):
            for band_set in frames.band_sets:
                self._convert(band_set, buffers)

    def _convert(self, band_set: BandSetArrays, buffers: Buffers) -> None:
        wanted = self.format.of(band_set.pixels.dtype.name)
        if self.format.normalize:
            normalize(band_set, self.ranges[band_set.name], wanted, buffers)
        elif wanted != band_set.pixels.dtype:
            pixels = buffers.take(band_set.pixels.shape, wanted)
            np.copyto(pixels, band_set.pixels, casting="unsafe")
            band_set.pixels = pixels

    def _band_set(
        self, store: Store, band_set: BandSet, slots: np.ndarray, buffers: Buffers
    ) -> BandSetArrays:
        pixels, valid = read_rasters(store, self.name, band_set, slots, buffers)
        present = np.ones((len(slots), len(band_set.bands)), np.bool_)
        return BandSetArrays(band_set.name, band_set.bands, pixels, valid, present)

    def _timestamps(self, rows: np.ndarray, timestep: np.ndarray) -> np.ndarray:
        if self.dates is None:
            return np.full((len(rows), 3), -1, np.int32)
        return self.dates.timestamps(rows, timestep)


@dataclass(frozen=True)
class LabelReader:
    """Reads the label rasters of tiles."""

    layout: StoreLayout
    frames: FrameTable
    ignore_index: int | None
    static: bool

    @property
    def name(self) -> str:
        return self.layout.modality

    @property
    def arrays(self) -> list[str]:
        return [f"{self.name}/pixels", f"{self.name}/valid"]

    def read(self, store: Store, chosen: ChosenFrames, buffers: Buffers) -> LabelArrays:
        band_set = self.layout.band_sets[0]
        pixels, valid = read_rasters(store, self.name, band_set, chosen.slots, buffers)
        return LabelArrays(
            self.name, pixels, valid, chosen.tile, chosen.timestep, self.ignore_index
        )


def read_rasters(
    store: Store, modality: str, band_set: BandSet, slots: np.ndarray, buffers: Buffers
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [F, C, y, x] and validity [F, y, x] of a band set's frames."""
    size = band_set.tile_size_px
    pixels = buffers.take((len(slots), len(band_set.bands), size, size), band_set.dtype)
    valid = buffers.take((len(slots), size, size), np.bool_)
    store.read_into(f"{modality}/pixels{band_set.suffix}", slots, pixels)
    store.read_into(f"{modality}/valid{band_set.suffix}", slots, valid)
    return pixels, valid


def list_column(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """First entry of every row, int64 [row + 1], and the entries of all rows, of a column of lists."""
    column = column.combine_chunks()
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return starts, column.flatten().to_numpy(zero_copy_only=False)


def sums_of_runs(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 [run]: sums of `values[starts[i] : starts[i + 1]]`; empty runs give 0."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(before[starts])


def band_ranges(
    layout: StoreLayout, value_range: Sequence[Sequence[float]]
) -> dict[str, np.ndarray]:
    """float32 [C, 2] of every band set by name; none where the store has no value ranges."""
    if len(value_range) != len(layout.all_bands):
        return {}
    ranges = np.asarray(value_range, np.float32)
    ends = np.cumsum([len(s.bands) for s in layout.band_sets])
    return {
        s.name: ranges[end - len(s.bands) : end]
        for s, end in zip(layout.band_sets, ends, strict=True)
    }


def normalize(
    band_set: BandSetArrays, ranges: np.ndarray, wanted: np.dtype[Any], buffers: Buffers
) -> None:
    """To [-1, 1] over `ranges` [C, 2] as `model.embed.PixelNormalization` has it, number by number.

    Pixels that are not valid, or of a band that is not present, become 0.
    """
    pixels = buffers.take(band_set.pixels.shape, wanted)
    unit = np.empty(band_set.pixels.shape[2:], np.float32)
    low, half_span = ranges[:, 0], (ranges[:, 1] - ranges[:, 0]) / 2
    for frame, stored in enumerate(band_set.pixels):
        hidden = ~band_set.valid[frame]
        some_hidden = bool(hidden.any())
        # Band by band, so that all passes but the first find their numbers in the cache.
        for band, present in enumerate(band_set.band_present[frame].tolist()):
            if not present:
                pixels[frame, band] = 0
                continue
            np.subtract(stored[band], low[band], out=unit, dtype=np.float32, casting="unsafe")
            unit /= half_span[band]
            unit -= 1
            if some_hidden:
                unit[hidden] = 0
            # torch rounds to float16 several times as fast as NumPy.
            torch.from_numpy(pixels[frame, band]).copy_(torch.from_numpy(unit))
    band_set.pixels = pixels


def order_by_first_frame(tables: Sequence[FrameTable], rows: np.ndarray) -> np.ndarray:
    """int64 [tile]: tiles by the slot of their first frame in the first table that has one."""
    first = np.full(len(rows), -1, np.int64)
    for table in reversed(tables):
        has = table.per_tile[rows] > 0
        first[has] = table.slots[table.starts[rows[has]]]
    return np.argsort(first, kind="stable")
