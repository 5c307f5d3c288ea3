"""Decoding chunks of Zarr and HDF5 files with codecs known to be safe, within stated bounds.

The libraries decode whatever a chunk says it holds, however much that is, and a chunk that nobody
wrote is the same to them as one full of fill values. Both matter here: archives are untrusted, and an
unknown pixel must not become a number. So chunks are taken as bytes, and the codecs called one by one,
in the calling thread.
"""

import bz2
import gzip
import io
import lzma
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numcodecs
import numcodecs.blosc
import numcodecs.lz4
import numpy as np
import pyarrow as pa

from pipeline.errors import SceneError

# Codecs from bytes to bytes. None of them can run code or read another file.
PACKERS = ("blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma", "shuffle", "crc32c", "crc32",
           "adler32", "fletcher32")  # fmt: skip
# Filters of Zarr v2, which may change the type.
FILTERS = ("delta", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype")
_NUMERIC = re.compile(r"[<>|=]?(?:[iuf][1248]|b1)")
_LZMA_MEMORY = 256 * 2**20
# Names are expected to be shorter than this.
_TEXT_BYTES = 1024

numcodecs.blosc.set_nthreads(1)


@dataclass(frozen=True)
class Codec:
    """A codec by its numcodecs name, and its settings."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Decoding:
    """How the bytes of a chunk become numbers.

    `dtype` has the byte order of the file; object means texts of any length (`vlen-utf8`). The chunk's
    axes are stored in the order `axes`, the last one varying fastest. `packers` and `filters` are in the
    order of encoding, filters first.
    """

    dtype: np.dtype[Any]
    block_shape: tuple[int, ...]
    axes: tuple[int, ...]
    packers: tuple[Codec, ...] = ()
    filters: tuple[Codec, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.count * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Numbers in a chunk."""
        return math.prod(self.block_shape)

    @property
    def limit(self) -> int:
        """Most bytes that any honest encoding of a chunk takes, at any step."""
        widest = {"O": _TEXT_BYTES}.get(self.dtype.kind, 8 if self.filters else 0)
        return self.count * max(widest, self.dtype.itemsize) * 5 // 4 + 4096


def refuse_unsafe(codec: Codec, path: str) -> None:
    """Raise SceneError unless a codec is one of those above with plain settings."""
    if codec.name not in PACKERS + FILTERS:
        raise SceneError(
            f"its array {path} is stored with codec {codec.name!r:.60}, which is not read; rewrite it with "
            f"one of {', '.join(PACKERS + FILTERS)}"
        )
    for setting in ("dtype", "astype", "encode_dtype", "decode_dtype"):
        given = codec.settings.get(setting)
        if given is not None and not _NUMERIC.fullmatch(str(given)):
            raise SceneError(
                f"its array {path} is stored with codec {codec.name} of {setting} {given!r:.40}; expected "
                "numbers"
            )


def decode(decoding: Decoding, data: bytes) -> np.ndarray:
    """The numbers of a chunk, shape `block_shape`, in the file's byte order.

    Raises SceneError for bytes that are damaged or hold another amount of numbers.
    """
    try:
        for codec in reversed(decoding.packers):
            data = unpack(codec, data, decoding.limit)
        for codec in reversed(decoding.filters):
            settings = {**codec.settings, "id": codec.name}
            data = numcodecs.get_codec(settings).decode(data)
        if decoding.dtype.kind == "O":
            return _texts(data, decoding.count).reshape(decoding.block_shape)
        plain = np.ascontiguousarray(np.frombuffer(memoryview(data).cast("B"), np.uint8))
    except SceneError:
        raise
    except Exception as error:  # every codec has errors of its own
        raise SceneError(f"holds a chunk that cannot be decoded ({reason(error)})") from None
    if plain.nbytes != decoding.nbytes:
        raise SceneError(
            f"holds a chunk of {plain.nbytes} bytes; expected {decoding.nbytes} "
            f"({' x '.join(map(str, decoding.block_shape))} of {decoding.dtype.name})"
        )
    stored_shape = [decoding.block_shape[axis] for axis in decoding.axes]
    stored = plain.view(decoding.dtype).reshape(stored_shape)
    return stored.transpose(np.argsort(decoding.axes))


def unpack(codec: Codec, data: bytes, limit: int) -> bytes:
    """Undo one codec from bytes to bytes; SceneError if more than `limit` bytes come out."""
    match codec.name:
        case "blosc":
            _within(int.from_bytes(data[4:8], "little"), limit)
            plain = numcodecs.blosc.decompress(data)
        case "lz4":
            _within(int.from_bytes(data[:4], "little"), limit)
            plain = numcodecs.lz4.decompress(data)
        case "zstd":
            with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
                plain = stream.read(limit + 1)
        case "gzip":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                plain = stream.read(limit + 1)
        case "zlib":
            plain = _inflate(zlib.decompressobj(), data, limit)
        case "bz2":
            plain = _inflate(bz2.BZ2Decompressor(), data, limit)
        case "lzma":
            if codec.settings.get("format", lzma.FORMAT_XZ) == lzma.FORMAT_RAW:
                raise SceneError("holds raw LZMA chunks, which are not read; rewrite it as xz")
            plain = _inflate(lzma.LZMADecompressor(memlimit=_LZMA_MEMORY), data, limit)
        case _:
            settings = {**codec.settings, "id": codec.name}
            plain = numcodecs.get_codec(settings).decode(data)
    _within(len(memoryview(plain).cast("B")), limit)
    return plain


def reason(error: BaseException) -> str:
    """An error on one short line."""
    text = " ".join(str(error).split())
    return f"{text:.200}" or type(error).__name__


def _inflate(decompressor: Any, data: bytes, limit: int) -> bytes:
    plain = decompressor.decompress(data, limit + 1)
    if not decompressor.eof and len(plain) <= limit:
        raise SceneError("holds a chunk whose compressed bytes end early")
    return plain


def _within(length: int, limit: int) -> None:
    if length > limit:
        raise SceneError(
            f"holds a chunk that decodes to more than {limit} bytes, the most its header allows"
        )


def _texts(data: bytes, count: int) -> np.ndarray:
    stated = int.from_bytes(data[:4], "little")
    if stated != count:
        raise SceneError(f"holds a chunk of {stated} texts; expected {count}")
    return numcodecs.VLenUTF8().decode(data)
