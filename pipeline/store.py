"""The store on disk: the only implementation of docs/format.md.

A store is a Zarr v3 group. `StoreLayout` derives every array's shape, chunks, codecs and dimension
names from a few numbers; `create_arrays` makes them, `encode_shard` turns one block of one array
into the bytes of one object, and `Store` reads what has been committed.
"""

import json
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ZarrUserWarning

from pipeline import segments
from pipeline.commit import LEDGER, MANIFEST, Ledger, read_commit, read_committed
from pipeline.errors import IntegrityError, StoreError
from pipeline.grid import BaseGrid

FORMAT_NAME = "aptile"
FORMAT_VERSION = "0.1"
DEFAULT_PARTITION = "default"
# Illegal as a scale, so that a row nobody wrote cannot pass for a leaf.
NO_LEAF = 0xFF
_READ_CACHE_BYTES = 32 * 2**20
_CODECS: dict[str, dict[str, Any]] = {
    "lz4": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"},
    "zstd": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle"},
}


@dataclass(frozen=True)
class ArraySpec:
    """One array: its full, shard and inner chunk shape, type, dimension names and fill value."""

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    fill_value: float | int | bool

    def shard_key(self, shard: int) -> str:
        """Object name of a shard; arrays are sharded along their first axis only."""
        return "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])


@dataclass(frozen=True)
class StoreLayout:
    """The numbers that fix every array of one modality."""

    modality: str
    bands: tuple[str, ...]
    dtype: str
    grid: BaseGrid
    num_shards: int
    shard_capacity: int
    codec: str

    @property
    def num_frames(self) -> int:
        """Frame slots, empty ones included."""
        return self.num_shards * self.shard_capacity

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of the modality by its path below the store, in the order they are written."""
        height, width = self.grid.shape_px
        partition = f"{self.modality}/partitions/{DEFAULT_PARTITION}"
        specs = {
            f"{self.modality}/pixels": self._per_frame(
                (len(self.bands), height, width), self.dtype, ("band", "y", "x"), 0
            ),
            f"{self.modality}/valid": self._per_frame((height, width), "bool", ("y", "x"), False),
            f"{self.modality}/num_valid": self._per_frame((), "int32", (), 0),
            f"{self.modality}/num_cells": self._per_frame((), "int32", (), 0),
        }
        for scale, size in enumerate(self.grid.patch_sizes):
            specs[f"{self.modality}/score_{size}"] = self._per_frame(
                self.grid.level_shape(scale),
                "float32",
                (f"cell_y_{size}", f"cell_x_{size}"),
                math.nan,
            )
        specs[f"{partition}/scales"] = self._rows()
        specs[f"{partition}/counts"] = self._per_frame((), "int32", (), 0)
        specs[f"{partition}/tokens"] = self._per_frame(
            (self.grid.num_scales,), "int32", ("scale",), 0
        )
        return specs

    def _per_frame(
        self, inner: tuple[int, ...], dtype: str, dims: tuple[str, ...], fill: float | int | bool
    ) -> ArraySpec:
        """One inner chunk per frame, but one per shard where a frame is only a few numbers."""
        frames_per_chunk = 1 if len(inner) > 1 else self.shard_capacity
        return ArraySpec(
            shape=(self.num_frames, *inner),
            shard=(self.shard_capacity, *inner),
            chunk=(frames_per_chunk, *inner),
            dtype=dtype,
            dims=("frame", *dims),
            fill_value=fill,
        )

    def _rows(self) -> ArraySpec:
        """Slotted rows: every shard owns room for its fullest partition, all base cells."""
        rows = self.shard_capacity * self.grid.num_cells
        frames_per_chunk = math.gcd(self.shard_capacity, 16)
        return ArraySpec(
            shape=(self.num_shards * rows,),
            shard=(rows,),
            chunk=(frames_per_chunk * self.grid.num_cells,),
            dtype="uint8",
            dims=("row",),
            fill_value=NO_LEAF,
        )

    @property
    def rows_per_shard(self) -> int:
        return self.shard_capacity * self.grid.num_cells


def create_arrays(path: Path, layout: StoreLayout, header: dict[str, Any]) -> None:
    """Write the group's metadata: `header` as its attribute `aptile`, and every array, empty."""
    root = zarr.create_group(path, zarr_format=3, attributes={FORMAT_NAME: header})
    group = root.create_group(layout.modality, attributes={"bands": list(layout.bands)})
    group.create_group("partitions").create_group(DEFAULT_PARTITION)
    for name, spec in layout.arrays().items():
        root.create_array(
            name,
            shape=spec.shape,
            shards=spec.shard,
            chunks=spec.chunk,
            dtype=spec.dtype,
            compressors=_compressors(layout.codec, np.dtype(spec.dtype)),
            fill_value=spec.fill_value,
            dimension_names=spec.dims,
        )
    with warnings.catch_warnings():
        # Not part of the Zarr v3 specification, but what xarray looks for first.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(path)


def read_array_metadata(path: Path, layout: StoreLayout) -> dict[str, dict[str, Any]]:
    """The zarr.json of every array, by name, as `encode_shard` needs them."""
    return {name: json.loads((path / name / "zarr.json").read_text()) for name in layout.arrays()}


def encode_shard(metadata: dict[str, Any], block: np.ndarray) -> bytes | None:
    """The object that holds `block`, the values of one whole shard; None if all are fill value.

    The same values give the same bytes, whoever encodes them and whenever.
    """
    one_shard = {**metadata, "shape": list(block.shape)}
    array = ts.open(
        {"driver": "zarr3", "kvstore": "memory://", "metadata": one_shard},
        create=True,
        context=ts.Context({"data_copy_concurrency": {"limit": 1}}),
    ).result()
    array[...].write(block).result()
    key = "/".join(["c", *["0"] * block.ndim])
    assert array.kvstore is not None
    stored = array.kvstore.read(key).result()
    return bytes(stored.value) if stored.state == "value" else None


@dataclass(frozen=True)
class Tile:
    """One tile with everything decoded; frames are its timesteps.

    `pixels` [frame, band, y, x] in the archive's own numbers, `valid` bool [frame, y, x],
    `score_maps` float32 [frame, cell_y, cell_x] fine to coarse (NaN: no valid pixel), `scales` one
    uint8 [leaf] per frame.
    """

    id: str
    pixels: np.ndarray
    valid: np.ndarray
    score_maps: list[np.ndarray]
    scales: list[np.ndarray]
    grid: BaseGrid

    def descriptors(self) -> np.ndarray:
        """Structured array [leaf] of all frames, in storage order; see `pipeline.segments`."""
        return np.concatenate(
            [
                segments.descriptors(scales, self.grid, [m[t] for m in self.score_maps], t)
                for t, scales in enumerate(self.scales)
            ]
        )


@dataclass(frozen=True)
class Frames:
    """Pixels, validity and partitions of some frames of one modality, in the order asked for."""

    pixels: np.ndarray
    valid: np.ndarray
    scales: list[np.ndarray]


def open_store(path: str | Path) -> "Store":
    """Open a committed store for reading.

    Raises StoreError if there is none at `path` or its job is unfinished, IntegrityError if its
    manifest or ledger is not the committed one.
    """
    path = Path(path)
    header = read_header(path)
    if header is None:
        raise StoreError(f"{path}: no aptile store here; make one with `aptile preprocess`")
    commit = read_commit(path)
    if commit is None:
        raise StoreError(
            f"{path}: the job that writes this store has not finished; run its `aptile preprocess` "
            "command again to complete it"
        )
    return Store(path, header, commit)


def read_header(path: Path) -> dict[str, Any] | None:
    """The store's own attributes; None if `path` is no aptile store of a version we can read."""
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        header = dict(attributes[FORMAT_NAME])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: written in format version {version!r}; this aptile reads {FORMAT_VERSION!r}. "
            "Install the aptile that wrote it, or preprocess the archive again"
        )
    return header


class Store:
    """A committed store. Arrays are opened at first use; nothing is read before it is asked for."""

    def __init__(self, path: Path, header: dict[str, Any], commit: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.commit = commit
        self._arrays: dict[str, ts.TensorStore] = {}
        self._checked_shards: set[int] = set()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _READ_CACHE_BYTES}})

    @property
    def digest(self) -> str:
        """sha256 of the committed manifest: the identity of the data."""
        return str(self.commit["objects"][MANIFEST]["sha256"])

    @cached_property
    def layouts(self) -> dict[str, StoreLayout]:
        return {
            name: _layout_from(name, entry) for name, entry in self.header["modalities"].items()
        }

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities."""
        return list(self.layouts)

    @cached_property
    def manifest(self) -> pa.Table:
        """One row per committed tile."""
        return pq.read_table(pa.BufferReader(read_committed(self.path, MANIFEST, self.commit)))

    def tile_index(self, tile_id: str) -> int:
        """Row of a tile in the manifest; StoreError if there is no tile of that id."""
        ids = self.manifest["id"].to_pylist()
        if tile_id not in ids:
            raise StoreError(
                f"{self.path}: no tile {tile_id!r}; there are {len(ids)}, from {ids[0]!r} to {ids[-1]!r}"
                if ids
                else f"{self.path}: no tile {tile_id!r}; the store has no tiles"
            )
        return ids.index(tile_id)

    def frame_range(self, index: int, modality: str) -> range:
        """The frames of a tile (a row of the manifest) in a modality's arrays."""
        place = self.manifest[modality][index].as_py()
        return range(place["frame_start"], place["frame_start"] + place["num_frames"])

    def tile(self, tile_id: str, modality: str | None = None) -> Tile:
        """A tile with everything decoded, of the first modality unless one is named."""
        modality = modality or self.modalities[0]
        frames = np.array(self.frame_range(self.tile_index(tile_id), modality), np.int64)
        read = self.read_frames(modality, frames)
        grid = self.layouts[modality].grid
        maps = [self._read(f"{modality}/score_{size}", frames) for size in grid.patch_sizes]
        return Tile(tile_id, read.pixels, read.valid, maps, read.scales, grid)

    def read_frames(self, modality: str, frames: np.ndarray) -> Frames:
        """Pixels, validity and scales of `frames` (int64 [n], any order), read concurrently."""
        layout = self.layouts[modality]
        for shard in np.unique(frames // layout.shard_capacity).tolist():
            self._check_shard(modality, shard)
        pixels = self._pending(f"{modality}/pixels", frames)
        valid = self._pending(f"{modality}/valid", frames)
        scales_array = self._array(f"{modality}/partitions/{DEFAULT_PARTITION}/scales")
        begins = self._row_starts(modality)[frames]
        ends = begins + self._counts(modality)[frames]
        rows = [scales_array[b:e].read() for b, e in zip(begins, ends, strict=True)]
        scales = [np.asarray(row.result()) for row in rows]
        for frame, leaf_scales in zip(frames.tolist(), scales, strict=True):
            segments.check(leaf_scales, layout.grid, f"{self.path}/{modality} frame {frame}")
        return Frames(_result(pixels), _result(valid), scales)

    def per_frame(self, modality: str, name: str) -> np.ndarray:
        """The whole of a small array that has a few numbers per frame slot, such as `num_valid`."""
        return self._whole(f"{modality}/{name}")

    @cached_property
    def _ledger(self) -> Ledger:
        read_committed(self.path, LEDGER, self.commit)
        return Ledger.read(self.path)

    def quarantined(self) -> dict[str, str]:
        """Reason by scene id of every input that is not in the store."""
        return self._ledger.quarantined()

    def _check_shard(self, modality: str, shard: int) -> None:
        """A lost object would read as fill value; so every shard is looked at once before use."""
        if shard in self._checked_shards:
            return
        for name, written in self._ledger.shards[shard]["objects"].items():
            path = self.path / name
            size = path.stat().st_size if path.exists() else None
            if size != written["bytes"]:
                raise IntegrityError(
                    f"{path} is {'missing' if size is None else f'{size} bytes long'}; the ledger "
                    f"says {written['bytes']} bytes. The store is damaged: preprocess into a new one"
                )
        self._checked_shards.add(shard)

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            self._arrays[name] = ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": str(self.path.absolute() / name) + "/"},
                    "recheck_cached_metadata": False,
                    "recheck_cached_data": False,
                },
                read=True,
                context=self._context,
            ).result()
        return self._arrays[name]

    def _pending(self, name: str, frames: np.ndarray) -> "ts.Future[Any]":
        """A read under way; a run of neighbouring frames is one slice, anything else an index."""
        array = self._array(name)
        if len(frames) and np.array_equal(frames, np.arange(frames[0], frames[0] + len(frames))):
            return array[int(frames[0]) : int(frames[0]) + len(frames)].read()
        return array[frames].read()

    def _read(self, name: str, frames: np.ndarray) -> np.ndarray:
        return _result(self._pending(name, frames))

    def _whole(self, name: str) -> np.ndarray:
        return _result(self._array(name).read())

    def _counts(self, modality: str) -> np.ndarray:
        return self._rows_of(modality)[0]

    def _row_starts(self, modality: str) -> np.ndarray:
        return self._rows_of(modality)[1]

    def _rows_of(self, modality: str) -> tuple[np.ndarray, np.ndarray]:
        """Leaf count and first row, int64 [frame], of every frame slot."""
        if modality not in self._row_tables:
            layout = self.layouts[modality]
            counts = self._whole(f"{modality}/partitions/{DEFAULT_PARTITION}/counts").astype(
                np.int64
            )
            per_shard = counts.reshape(layout.num_shards, layout.shard_capacity)
            within = np.cumsum(per_shard, axis=1) - per_shard
            first = np.arange(layout.num_shards)[:, None] * layout.rows_per_shard
            self._row_tables[modality] = counts, (first + within).ravel()
        return self._row_tables[modality]

    @cached_property
    def _row_tables(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}


def modality_header(
    layout: StoreLayout, value_ranges: Any, sample_distance_m: Any
) -> dict[str, Any]:
    """What a reader needs to know of a modality, as stored under `modalities` in the header."""
    return {
        "bands": list(layout.bands),
        "dtype": layout.dtype,
        "value_range": [list(pair) for pair in value_ranges],
        "ground_sample_distance_m": sample_distance_m,
        "base_patch_size": layout.grid.base_patch_size,
        "num_scales": layout.grid.num_scales,
        "tile_size_px": layout.grid.shape_px[0],
        "num_shards": layout.num_shards,
        "shard_capacity": layout.shard_capacity,
        "codec": layout.codec,
    }


def _layout_from(name: str, entry: dict[str, Any]) -> StoreLayout:
    cells = entry["tile_size_px"] // entry["base_patch_size"]
    return StoreLayout(
        modality=name,
        bands=tuple(entry["bands"]),
        dtype=entry["dtype"],
        grid=BaseGrid(cells, cells, entry["base_patch_size"], entry["num_scales"]),
        num_shards=entry["num_shards"],
        shard_capacity=entry["shard_capacity"],
        codec=entry["codec"],
    )


def _compressors(codec: str, dtype: np.dtype[Any]) -> list[Any]:
    return [BloscCodec(**_CODECS[codec], typesize=dtype.itemsize, blocksize=0), Crc32cCodec()]


def _result(pending: "ts.Future[Any]") -> np.ndarray:
    """The values of a read; a checksum mismatch becomes an IntegrityError."""
    try:
        return np.asarray(pending.result())
    except ValueError as error:
        raise IntegrityError(
            f"the store is damaged, preprocess into a new one: {' '.join(str(error).split())}"
        ) from None
