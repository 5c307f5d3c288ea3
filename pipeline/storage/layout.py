"""The layout of a store, and how its objects are written: the writing half of docs/format.md.

A store is a Zarr v3 group. `StoreLayout` derives every array's shape, chunks, codecs and dimension
names from a few numbers; `create_arrays` makes them, `encode_shard` turns one block of one array
into the bytes of one object. `pipeline.store` reads what has been committed.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts
import zarr
from pydantic import Field, ValidationError
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ZarrUserWarning

from pipeline.commit import write_object
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.grid import MAX_SCALES, MAX_TILE_PX, BaseGrid
from pipeline.partitions import DEFAULT_PARTITION, partition_path
from pipeline.scorers.config import Frozen, Identifier

FORMAT_NAME = "aptile"
FORMAT_VERSION = "0.1"
# Illegal as a scale, so that a row nobody wrote cannot pass for a leaf.
NO_LEAF = 0xFF
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
        return {**specs, **self.partition_arrays(DEFAULT_PARTITION)}

    def partition_arrays(self, name: str) -> dict[str, ArraySpec]:
        """The arrays of one partition by path, in the order they are written."""
        group = partition_path(self.modality, name)
        return {
            f"{group}/scales": self._rows(),
            f"{group}/counts": self._per_frame((), "int32", (), 0),
            f"{group}/tokens": self._per_frame((self.grid.num_scales,), "int32", ("scale",), 0),
        }

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
    _create(root, layout.arrays(), layout.codec)
    with warnings.catch_warnings():
        # Not part of the Zarr v3 specification, but what xarray looks for first.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(path)


def create_partition(path: Path, layout: StoreLayout, name: str) -> None:
    """Write the metadata of a further partition's group and arrays, empty.

    The consolidated metadata does not list them before `consolidate_partition`.
    """
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    root.create_group(partition_path(layout.modality, name))
    _create(root, layout.partition_arrays(name), layout.codec)


def consolidate_partition(path: Path, layout: StoreLayout, name: str) -> None:
    """Add a committed partition to the consolidated metadata; nothing happens if it is there."""
    root = json.loads((path / "zarr.json").read_bytes())
    group = partition_path(layout.modality, name)
    listed = root["consolidated_metadata"]["metadata"]
    if group in listed:
        return
    for node in (group, *layout.partition_arrays(name)):
        listed[node] = json.loads((path / node / "zarr.json").read_bytes())
    write_object(path / "zarr.json", json.dumps(root, indent=2).encode())


def _create(root: zarr.Group, arrays: dict[str, ArraySpec], codec: str) -> None:
    for name, spec in arrays.items():
        root.create_array(
            name,
            shape=spec.shape,
            shards=spec.shard,
            chunks=spec.chunk,
            dtype=spec.dtype,
            compressors=_compressors(codec, np.dtype(spec.dtype)),
            fill_value=spec.fill_value,
            dimension_names=spec.dims,
        )


def write_shard(
    path: Path, arrays: dict[str, ArraySpec], shard: int, blocks: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Write one shard of some arrays durably: the objects, by path, for the ledger.

    `blocks` holds the values of the whole shard by array name, and is emptied on the way.
    """
    objects = {}
    for name, spec in arrays.items():
        metadata = json.loads((path / name / "zarr.json").read_text())
        content = encode_shard(metadata, blocks.pop(name))
        if content is not None:
            object_name = f"{name}/{spec.shard_key(shard)}"
            objects[object_name] = write_object(path / object_name, content)
    return objects


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


def layout_from_header(name: str, entry: dict[str, Any]) -> StoreLayout:
    """The layout a header describes; IntegrityError if it describes none.

    A header is untrusted: its names become paths, its numbers become sizes.
    """
    try:
        named = _NamedModality.model_validate({**entry, "name": name})
        cells = named.tile_size_px // named.base_patch_size
        grid = BaseGrid(cells, cells, named.base_patch_size, named.num_scales)
        if grid.shape_px[0] != named.tile_size_px:
            raise ConfigError(f"tiles of {named.tile_size_px} px hold no whole number of cells")
    except (ValidationError, ConfigError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(
            f"modality {name!r:.80} in the store's zarr.json cannot be used ({reason:.200}); the store is "
            "damaged, preprocess into a new one"
        ) from None
    return StoreLayout(
        modality=named.name,
        bands=named.bands,
        dtype=named.dtype,
        grid=grid,
        num_shards=named.num_shards,
        shard_capacity=named.shard_capacity,
        codec=named.codec,
    )


class _NamedModality(Frozen):
    """What `modality_header` writes, and the modality's name."""

    name: Identifier
    bands: tuple[Identifier, ...] = Field(min_length=1)
    dtype: Literal[
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float32",
        "float64",
    ]
    value_range: tuple[tuple[float, float], ...]
    ground_sample_distance_m: float | None
    base_patch_size: int = Field(ge=1)
    num_scales: int = Field(ge=1, le=MAX_SCALES)
    tile_size_px: int = Field(ge=1, le=MAX_TILE_PX)
    num_shards: int = Field(ge=1)
    shard_capacity: int = Field(ge=1)
    codec: Literal["lz4", "zstd"]


def _compressors(codec: str, dtype: np.dtype[Any]) -> list[Any]:
    return [BloscCodec(**_CODECS[codec], typesize=dtype.itemsize, blocksize=0), Crc32cCodec()]
