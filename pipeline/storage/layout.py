"""The layout of a store: which arrays there are, and their metadata.

A store is a Zarr v3 group. `StoreLayout` derives every array's shape, chunks, codecs and dimension
names from a few numbers; `metadata_objects` describes them to others, `pipeline.storage.sharding` writes
their objects and `pipeline.store` reads what has been committed.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from pipeline.grid import BaseGrid
from pipeline.settings.canonical import plain
from pipeline.storage.partitions import DEFAULT_PARTITION, partition_path

FORMAT_NAME = "aptile"
FORMAT_VERSION = "0.3"
ROOT_METADATA = "zarr.json"
# Per frame: valid pixels, cloud pixels and pixels that hold nodata, of the first band set, and base cells
# that count.
FRAME_COUNTS = ("num_valid", "num_cloud", "num_nodata", "num_cells")
# Illegal as a scale, so that a row nobody wrote cannot pass for a leaf.
NO_LEAF = 0xFF
BLOSC: dict[str, dict[str, Any]] = {
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
class BandSet:
    """Bands of one native resolution: tiles of `tile_size_px` px and one pixel type.

    The first set of a modality has no name; further ones give their arrays a suffix.
    """

    name: str
    bands: tuple[str, ...]
    dtype: str
    tile_size_px: int

    @property
    def suffix(self) -> str:
        """What is added to names of arrays and dimensions."""
        return f"_{self.name}" if self.name else ""


@dataclass(frozen=True)
class StoreLayout:
    """The numbers that fix every array of one modality.

    The base grid lies on the first band set. `scored` says whether there are score maps; without them
    (uniform patches) every present base cell is a token. `tokenized` is False for label rasters, which
    have pixels and validity only.
    """

    modality: str
    band_sets: tuple[BandSet, ...]
    grid: BaseGrid
    num_shards: int
    shard_capacity: int
    codec: str
    scored: bool = True
    tokenized: bool = True

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands of the first set."""
        return self.band_sets[0].bands

    @property
    def all_bands(self) -> tuple[str, ...]:
        """Bands of all sets, set after set."""
        return tuple(band for band_set in self.band_sets for band in band_set.bands)

    @property
    def dtype(self) -> str:
        """Pixel type of the first set."""
        return self.band_sets[0].dtype

    @property
    def num_frames(self) -> int:
        """Frame slots, empty ones included."""
        return self.num_shards * self.shard_capacity

    @property
    def frame_bytes(self) -> int:
        """Pixels of one frame, uncompressed."""
        return sum(
            len(s.bands) * s.tile_size_px**2 * np.dtype(s.dtype).itemsize for s in self.band_sets
        )

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of the modality by its path below the store, in the order they are written."""
        specs = {}
        for band_set in self.band_sets:
            end, size = band_set.suffix, band_set.tile_size_px
            yx = (f"y{end}", f"x{end}")
            specs[f"{self.modality}/pixels{end}"] = self._per_frame(
                (len(band_set.bands), size, size), band_set.dtype, (f"band{end}", *yx), 0
            )
            specs[f"{self.modality}/valid{end}"] = self._per_frame((size, size), "bool", yx, False)
        for name in FRAME_COUNTS:
            specs[f"{self.modality}/{name}"] = self._per_frame((), "int32", (), 0)
        if not self.tokenized:
            return specs
        for scale, size in enumerate(self.grid.patch_sizes if self.scored else ()):
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


def metadata_objects(
    header: dict[str, Any], layouts: Iterable[StoreLayout], partitions: Mapping[str, Iterable[str]]
) -> dict[str, bytes]:
    """Every `zarr.json` of a store by name: `header` as the root's attribute `aptile`, all arrays, empty.

    `partitions` names, by modality, the partitions beside the default one. The root's, which consolidates
    all others, comes last.
    """
    nodes: dict[str, Any] = {}
    root = zarr.create_group(
        MemoryStore(nodes), zarr_format=3, attributes={FORMAT_NAME: plain(header)}
    )
    for layout in layouts:
        names = {f"bands{s.suffix}": list(s.bands) for s in layout.band_sets}
        group = root.create_group(layout.modality, attributes=names)
        if layout.tokenized:
            group.create_group("partitions").create_group(DEFAULT_PARTITION)
        arrays = layout.arrays()
        for name in partitions.get(layout.modality, ()):
            root.create_group(partition_path(layout.modality, name))
            arrays |= layout.partition_arrays(name)
        for name, spec in arrays.items():
            _create(root, name, spec, layout.codec)
    with warnings.catch_warnings():
        # Not part of the Zarr v3 specification, but what xarray looks for first.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(root.store)
    last = sorted(nodes, key=lambda name: (name == ROOT_METADATA, name))
    return {name: nodes[name].to_bytes() for name in last}


@lru_cache(maxsize=256)
def array_metadata(spec: ArraySpec, codec: str) -> dict[str, Any]:
    """The `zarr.json` of one array."""
    nodes: dict[str, Any] = {}
    _create(zarr.create_group(MemoryStore(nodes), zarr_format=3), "array", spec, codec)
    return dict(json.loads(nodes["array/zarr.json"].to_bytes()))


def _create(root: zarr.Group, name: str, spec: ArraySpec, codec: str) -> None:
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


def _compressors(codec: str, dtype: np.dtype[Any]) -> list[Any]:
    return [BloscCodec(**BLOSC[codec], typesize=dtype.itemsize, blocksize=0), Crc32cCodec()]
