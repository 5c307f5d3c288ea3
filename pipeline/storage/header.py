"""The store's header: what a reader must know before it reads an array, and its validation."""

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.grid import MAX_SCALES, MAX_TILE_PX, BaseGrid
from pipeline.scorers.config import Frozen, Identifier
from pipeline.storage.layout import (
    FORMAT_NAME,
    FORMAT_VERSION,
    ROOT_METADATA,
    BandSet,
    StoreLayout,
)
from pipeline.storage.objects import Objects


def read_header(objects: Objects) -> dict[str, Any] | None:
    """The store's own attributes; None if there is no aptile store of a version we can read."""
    try:
        attributes = json.loads(objects.read(ROOT_METADATA))["attributes"]
        header = dict(attributes[FORMAT_NAME])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    check_version(objects.location, header)
    return header


def check_version(location: str, header: dict[str, Any]) -> None:
    """Raise StoreError for a store of another version of the format."""
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{location}: written in format version {version!r}; this aptile reads {FORMAT_VERSION!r}. "
            "Install the aptile that wrote it, or preprocess the archive again"
        )


def grown(header: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """The header of a store that has more shards."""
    modalities = {
        name: {**facts, "num_shards": num_shards} for name, facts in header["modalities"].items()
    }
    return {**header, "modalities": modalities}


def layouts_of(header: dict[str, Any]) -> dict[str, StoreLayout]:
    """The layout of every modality, the leading one first; IntegrityError if the header describes none."""
    return {name: layout_from_header(name, entry) for name, entry in header["modalities"].items()}


def modality_header(layout: StoreLayout, facts: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to know of a modality, as stored under `modalities` in the header.

    `facts` are `value_range` (pairs in the order of all sets' bands), `statistics`,
    `ground_sample_distance_m`, `scale`, `offset`, `wavelengths_nm`, `kind`, `static`, `ignore_index`.
    """
    return {
        "band_sets": [
            {
                "name": s.name,
                "bands": list(s.bands),
                "dtype": s.dtype,
                "tile_size_px": s.tile_size_px,
            }
            for s in layout.band_sets
        ],
        **facts,
        "scored": layout.scored,
        "base_patch_size": layout.grid.base_patch_size,
        "num_scales": layout.grid.num_scales,
        "num_shards": layout.num_shards,
        "shard_capacity": layout.shard_capacity,
        "codec": layout.codec,
    }


def layout_from_header(name: str, entry: dict[str, Any]) -> StoreLayout:
    """The layout a header describes; IntegrityError if it describes none.

    A header is untrusted: its names become paths, its numbers become sizes.
    """
    try:
        named = StoredModality.model_validate({**entry, "name": name})
        tile_px = named.band_sets[0].tile_size_px
        cells = tile_px // named.base_patch_size
        grid = BaseGrid(cells, cells, named.base_patch_size, named.num_scales)
        if grid.shape_px[0] != tile_px:
            raise ConfigError(f"tiles of {tile_px} px hold no whole number of cells")
        if len({s.name for s in named.band_sets}) < len(named.band_sets) or named.band_sets[0].name:
            raise ConfigError("band sets need different names, the first none")
    except (ValidationError, ConfigError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(
            f"modality {name!r:.80} of the store's header cannot be used ({reason:.200}); the store is "
            "damaged; `aptile verify` says what else is"
        ) from None
    return StoreLayout(
        modality=named.name,
        band_sets=tuple(BandSet(s.name, s.bands, s.dtype, s.tile_size_px) for s in named.band_sets),
        grid=grid,
        num_shards=named.num_shards,
        shard_capacity=named.shard_capacity,
        codec=named.codec,
        scored=named.scored,
        tokenized=named.kind == "image",
    )


class StoredBandSet(Frozen):
    """A band set as the header describes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9]*$", max_length=16)
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
    tile_size_px: int = Field(ge=1, le=MAX_TILE_PX)


class StoredModality(Frozen):
    """What `modality_header` writes, and the modality's name."""

    name: Identifier
    kind: Literal["image", "label"]
    static: bool
    ignore_index: int | None
    band_sets: tuple[StoredBandSet, ...] = Field(min_length=1)
    value_range: tuple[tuple[float, float], ...]
    statistics: dict[str, dict[str, float | int | None]] | None
    scale: float | None
    offset: float | None
    wavelengths_nm: tuple[float, ...] | None
    ground_sample_distance_m: float | None
    scored: bool
    base_patch_size: int = Field(ge=1)
    num_scales: int = Field(ge=1, le=MAX_SCALES)
    num_shards: int = Field(ge=1)
    shard_capacity: int = Field(ge=1)
    codec: Literal["lz4", "zstd"]
