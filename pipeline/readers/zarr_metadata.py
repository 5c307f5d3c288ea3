"""Metadata documents of Zarr arrays, versions 2 and 3: what they describe and whether it is safe to decode.

Pure: from parsed JSON to facts. Documents are untrusted: whatever is not understood is refused.
Specifications: https://zarr-specs.readthedocs.io, "Zarr storage specification version 2" and "Zarr core
specification version 3" with its sharding codec.
"""

import base64
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import SceneError
from pipeline.readers.array_base import ArrayHeader, refuse_large_block
from pipeline.readers.chunks import FILTERS, Codec, Decoding, refuse_unsafe

Document = Mapping[str, Any]
_MOST_DIMS = 16
_V2_DTYPE = re.compile(r"[<>|]?(?:[iufc][1248]|c16|b1|O|[SU]\d{1,5}|[mM]8\[\w{1,4}\])")
_V3_NUMBER = re.compile(r"bool|u?int(?:8|16|32|64)|float(?:16|32|64)|complex(?:64|128)")
_UNKNOWN = np.dtype("V1")
_ABSENT = 2**64 - 1


@dataclass(frozen=True)
class ShardIndex:
    """Where the index of a shard lies, and whether a CRC-32C follows it."""

    at_end: bool
    checksum: bool


@dataclass(frozen=True)
class ZarrLayout:
    """How the objects of an array are named and decoded.

    An object holds `object_shape` numbers: one chunk, or with `shards` as many as fit, each of
    `decoding.block_shape`.
    """

    object_shape: tuple[int, ...]
    decoding: Decoding
    shards: ShardIndex | None
    key_start: tuple[str, ...]
    separator: str
    fill: Any

    def object_key(self, index: tuple[int, ...]) -> str:
        """Name of an object below the array; `index` counts objects."""
        parts = [*self.key_start, *map(str, index)]
        return self.separator.join(parts) or "0"

    @property
    def blocks_per_object(self) -> tuple[int, ...]:
        pairs = zip(self.object_shape, self.decoding.block_shape, strict=True)
        return tuple(outer // inner for outer, inner in pairs)

    @property
    def index_bytes(self) -> int:
        """Size of a shard's index with its checksum."""
        assert self.shards is not None
        return 16 * math.prod(self.blocks_per_object) + 4 * self.shards.checksum


def zarr_header(path: str, document: Document, attrs: Document) -> ArrayHeader:
    """Header of an array; `attrs` are its attributes (in version 3 those of the document)."""
    try:
        shape = _lengths(document["shape"], 0)
        if document.get("zarr_format") == 2:
            stored, names = _v2_dtype(document["dtype"]), attrs.get("_ARRAY_DIMENSIONS")
        else:
            stored, names = _v3_dtype(document["data_type"]), document.get("dimension_names")
        names = (
            names if isinstance(names, list) and len(names) == len(shape) else [None] * len(shape)
        )
        dims = tuple(str(name or f"dim_{axis}") for axis, name in enumerate(names))
        header = ArrayHeader(path, dims, shape, stored, _block_shape(document, len(shape)), attrs)
        return ArrayHeader(
            path, dims, shape, stored, header.block_shape, _plain_attrs(header, document)
        )
    except SceneError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError, struct.error) as error:
        raise _not_understood(path, error) from None


def zarr_layout(header: ArrayHeader, document: Document, max_block_bytes: int) -> ZarrLayout:
    """How to read an array; SceneError unless every codec is known to be safe and chunks are small."""
    path = header.path
    if header.stored.kind not in "iufbMSUO":
        kind = "of an unknown type" if header.stored == _UNKNOWN else header.stored.name
        raise SceneError(f"its array {path} is {kind}; expected real numbers")
    refuse_large_block(path, header.block_shape, header.stored.itemsize, max_block_bytes)
    try:
        parse = _v2_layout if document.get("zarr_format") == 2 else _v3_layout
        layout = parse(header, document)
    except SceneError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError, AttributeError) as error:
        raise _not_understood(path, error) from None
    if layout.shards is not None and layout.index_bytes > max_block_bytes:
        raise SceneError(
            f"the shards of its array {path} have an index of {layout.index_bytes} bytes, more than "
            f"run.max_block_bytes {max_block_bytes}; raise that, or rewrite it in smaller shards"
        )
    return layout


def shard_entries(layout: ZarrLayout, index: bytes) -> np.ndarray:
    """uint64 [block ..., (offset, length)] of a shard's index without its checksum; 2^64 - 1 is absent."""
    return np.frombuffer(index, "<u8").reshape(*layout.blocks_per_object, 2)


def is_absent(entry: np.ndarray) -> bool:
    """Whether an entry of a shard's index says that nobody wrote the block."""
    return bool((entry == np.uint64(_ABSENT)).all())


def _v2_layout(header: ArrayHeader, document: Document) -> ZarrLayout:
    filters = [_v2_codec(given) for given in document.get("filters") or ()]
    packers = [_v2_codec(given) for given in [document.get("compressor")] if given is not None]
    if header.stored.kind == "O":
        # Objects are texts or something that would have to be unpickled.
        if [codec.name for codec in filters] != ["vlen-utf8"]:
            names = [codec.name for codec in filters] or "no codec"
            raise SceneError(f"its array {header.path} holds objects ({names}); expected numbers")
        filters = []
    # What stands behind the last filter that changes types works on bytes.
    while filters and filters[-1].name not in FILTERS:
        packers.insert(0, filters.pop())
    for codec in filters + packers:
        refuse_unsafe(codec, header.path)
    separator = document.get("dimension_separator") or "."
    rank = len(header.shape)
    axes = tuple(range(rank)) if document.get("order", "C") == "C" else tuple(range(rank))[::-1]
    decoding = Decoding(header.stored, header.block_shape, axes, tuple(packers), tuple(filters))
    return ZarrLayout(
        header.block_shape, decoding, None, (), _separator(separator), _fill(header, document)
    )


def _v3_layout(header: ArrayHeader, document: Document) -> ZarrLayout:
    path = header.path
    for part in ("chunk_grid", "chunk_key_encoding"):
        if _named(document[part])[0] not in ("regular", "default", "v2"):
            raise SceneError(
                f"its array {path} has {part} {_named(document[part])[0]!r:.40}, which is not read"
            )
    if document.get("storage_transformers"):
        raise SceneError(f"its array {path} has storage transformers, which are not read")
    codecs = [_named(given) for given in document["codecs"]]
    shards = None
    if [name for name, _ in codecs] == ["sharding_indexed"]:
        settings = codecs[0][1]
        shards = _shard_index(path, settings)
        codecs = [_named(given) for given in settings["codecs"]]
    name, settings = _named(document["chunk_key_encoding"])
    separator = settings.get("separator", "/" if name == "default" else ".")
    return ZarrLayout(
        object_shape=_lengths(_named(document["chunk_grid"])[1]["chunk_shape"], 1),
        decoding=_v3_decoding(header, codecs),
        shards=shards,
        key_start=("c",) if name == "default" else (),
        separator=_separator(separator),
        fill=_fill(header, document),
    )


def _v3_decoding(header: ArrayHeader, codecs: list[tuple[str, Document]]) -> Decoding:
    axes: tuple[int, ...] = tuple(range(len(header.shape)))
    while codecs and codecs[0][0] == "transpose":
        order = codecs.pop(0)[1]["order"]
        order = {"C": axes, "F": axes[::-1]}.get(order, order) if isinstance(order, str) else order
        if sorted(order) != list(range(len(axes))):
            raise ValueError(f"transpose order {order!r}")
        axes = tuple(axes[axis] for axis in order)
    serializer, settings = codecs.pop(0) if codecs else ("none", {})
    expected = "vlen-utf8" if header.stored.kind == "O" else "bytes"
    if serializer != expected:
        raise SceneError(
            f"its array {header.path} is stored with codec {serializer!r:.60}, which is not read; rewrite "
            f"it with codec {expected}"
        )
    big = settings.get("endian", "little") == "big"
    packers = tuple(Codec(name.removeprefix("numcodecs."), given) for name, given in codecs)
    for codec in packers:
        refuse_unsafe(codec, header.path)
        if codec.name in FILTERS:
            raise SceneError(f"its array {header.path} has codec {codec.name} behind codec bytes")
    stored = header.stored.newbyteorder(">" if big else "<")
    return Decoding(stored, header.block_shape, axes, packers)


def _shard_index(path: str, settings: Document) -> ShardIndex:
    names = [_named(given) for given in settings["index_codecs"]]
    plain = ("bytes", {"endian": "little"})
    if names[:1] != [plain] or [name for name, _ in names[1:]] not in ([], ["crc32c"]):
        raise SceneError(
            f"the shard index of its array {path} is stored with {[name for name, _ in names]}; expected "
            "bytes in little endian, and crc32c"
        )
    return ShardIndex(settings.get("index_location", "end") == "end", len(names) == 2)


def _block_shape(document: Document, rank: int) -> tuple[int, ...]:
    if document.get("zarr_format") == 2:
        shape = outer = _lengths(document["chunks"], 1)
    else:
        shape = outer = _lengths(_named(document["chunk_grid"])[1]["chunk_shape"], 1)
        codecs = [_named(given) for given in document["codecs"]]
        if [name for name, _ in codecs] == ["sharding_indexed"]:
            shape = _lengths(codecs[0][1]["chunk_shape"], 1)
    if not len(shape) == len(outer) == rank or any(
        whole % part for whole, part in zip(outer, shape, strict=True)
    ):
        raise ValueError(f"chunk shapes {list(outer)} and {list(shape)} of {rank} dimensions")
    return shape


def _plain_attrs(header: ArrayHeader, document: Document) -> Document:
    """Attributes with `_FillValue` as a number.

    Version 2 has no other place for it than `fill_value`; in version 3 xarray writes it as an
    attribute, real numbers as base64 of a double.
    """
    attrs = dict(header.attrs)
    if document.get("zarr_format") == 2 and header.stored.kind in "iuf":
        stated = document.get("fill_value")
        if stated is not None:
            attrs.setdefault("_FillValue", _number(stated, header.stored))
    given = attrs.get("_FillValue")
    if isinstance(given, str) and header.stored.kind == "f" and document.get("zarr_format") == 3:
        attrs["_FillValue"] = struct.unpack("<d", base64.b64decode(given, validate=True))[0]
    return attrs


def _fill(header: ArrayHeader, document: Document) -> Any:
    stated = document.get("fill_value")
    if isinstance(stated, int | str) and header.stored.kind == "M":
        return np.array(stated).astype(header.stored.newbyteorder("="))[()]
    if stated is None or header.stored.kind not in "iufb":
        return np.zeros((), header.stored)[()]
    return _number(stated, header.stored)


def _number(stated: Any, dtype: np.dtype[Any]) -> Any:
    """A fill value as both versions write it: a number, NaN or Infinity by name, or bits in hexadecimal."""
    native = dtype.newbyteorder("=")
    if isinstance(stated, list | dict):
        raise ValueError(f"fill value {stated!r:.40}")
    if isinstance(stated, str) and stated.startswith("0x"):
        bits = int(stated, 16).to_bytes(native.itemsize, "little")
        return np.frombuffer(bits, native.newbyteorder("<")).astype(native)[0]
    return np.array(float(stated) if native.kind == "f" else stated, native)[()]


def _v2_codec(given: Document) -> Codec:
    return Codec(str(given["id"]), {key: value for key, value in given.items() if key != "id"})


def _v2_dtype(text: Any) -> np.dtype[Any]:
    return np.dtype(text) if isinstance(text, str) and _V2_DTYPE.fullmatch(text) else _UNKNOWN


def _v3_dtype(given: Any) -> np.dtype[Any]:
    name, settings = _named(given)
    if _V3_NUMBER.fullmatch(name):
        return np.dtype(name)
    if name == "numpy.datetime64":
        return np.dtype(f"M8[{int(settings.get('scale_factor', 1))}{settings['unit']}]")
    if name in ("fixed_length_utf32", "null_terminated_bytes"):
        length = int(settings["length_bytes"])
        return np.dtype(f"U{length // 4}" if name == "fixed_length_utf32" else f"S{length}")
    return np.dtype("O") if name == "string" else _UNKNOWN


def _named(given: Any) -> tuple[str, Document]:
    """Name and settings of an extension point, which may be a bare name."""
    if isinstance(given, str):
        return given, {}
    return str(given["name"]), given.get("configuration") or {}


def _lengths(given: Any, least: int) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) > _MOST_DIMS:
        raise ValueError(f"lengths {given!r:.60}")
    if any(type(length) is not int or not least <= length < 2**40 for length in given):
        raise ValueError(f"lengths {given!r:.60}")
    return tuple(given)


def _separator(given: Any) -> str:
    if given not in (".", "/"):
        raise ValueError(f"separator {given!r:.20}")
    return str(given)


def _not_understood(path: str, error: Exception) -> SceneError:
    return SceneError(
        f"the Zarr metadata of its array {path} is not understood "
        f"({type(error).__name__}: {error!s:.100}); it may be damaged"
    )
