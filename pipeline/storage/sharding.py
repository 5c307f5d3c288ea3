"""Shards as objects: inner chunks, each compressed as soon as it is known, and an index of where they lie.

The bytes are those of the Zarr v3 sharding codec with its index at the end, as tensorstore writes them too;
but no block of a whole shard is held, and chunks that nobody writes cost nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from pipeline.storage.layout import BLOSC, ArraySpec
from pipeline.storage.objects import Writer

_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
# Offset and length of a chunk without bytes: all of it is fill value.
_NO_CHUNK = 2**64 - 1
# Several threads would put their parts of a chunk in the order in which they finish.
blosc.use_threads = False


@dataclass
class ShardEncoder:
    """One object of an array that is sharded and chunked along its first axis only.

    Chunks may come in any order. The same values give the same bytes, whoever encodes them.
    """

    spec: ArraySpec
    codec: str
    _chunks: dict[int, bytes] = field(default_factory=dict)

    def put(self, chunk: int, values: np.ndarray) -> None:
        """Set one inner chunk, counted from the shard's first; `values` has its shape and type."""
        assert values.shape == self.spec.chunk
        assert values.dtype == np.dtype(self.spec.dtype)
        if _is_fill(values, self.spec.fill_value):
            self.drop(chunk)
            return
        how = BLOSC[self.codec]
        packed = blosc.compress(
            np.ascontiguousarray(values),
            how["cname"].encode(),
            how["clevel"],
            _SHUFFLES[how["shuffle"]],
        )
        self._chunks[chunk] = packed

    def put_leading(self, values: np.ndarray) -> None:
        """Set the chunks that hold the leading part of the shard; the last one is filled up."""
        length = self.spec.chunk[0]
        for chunk, start in enumerate(range(0, len(values), length)):
            part = values[start : start + length]
            if len(part) < length:
                whole = np.full(self.spec.chunk, self.spec.fill_value, self.spec.dtype)
                whole[: len(part)] = part
                part = whole
            self.put(chunk, part)

    def drop(self, chunk: int) -> None:
        """Let an inner chunk be fill value again."""
        self._chunks.pop(chunk, None)

    def pieces(self) -> list[bytes]:
        """The object's bytes in parts that follow one another; none where all is fill value."""
        if not self._chunks:
            return []
        index = np.full((self.spec.shard[0] // self.spec.chunk[0], 2), _NO_CHUNK, "<u8")
        pieces, end = [], 0
        for chunk, packed in sorted(self._chunks.items()):
            pieces += [packed, _checksum(packed)]
            length = len(packed) + len(pieces[-1])
            index[chunk] = end, length
            end += length
        table = index.tobytes()
        return [*pieces, table, _checksum(table)]


def encoders(arrays: Mapping[str, ArraySpec], codec: str) -> dict[str, ShardEncoder]:
    """An empty encoder for every array."""
    return {name: ShardEncoder(spec, codec) for name, spec in arrays.items()}


def write_shard(objects: Writer, shard: int, encoded: Mapping[str, ShardEncoder]) -> dict[str, Any]:
    """Write one shard of some arrays durably: size and sha256 of its objects, by path, for the ledger.

    Arrays of fill value alone have no object.
    """
    contents = {
        f"{name}/{encoder.spec.shard_key(shard)}": pieces
        for name, encoder in encoded.items()
        if (pieces := encoder.pieces())
    }
    return objects.write_all(contents)


def _checksum(content: bytes) -> bytes:
    return google_crc32c.value(content).to_bytes(4, "little")


def _is_fill(values: np.ndarray, fill: float | int | bool) -> bool:
    """Whether every value has the very bits of the fill value: -0.0 is a number of its own."""
    one, bits = np.array(fill, values.dtype), f"u{values.dtype.itemsize}"
    flat = values.view(bits)
    # Most chunks differ in their first value already.
    return bool(flat.flat[0] == one.view(bits) and (flat == one.view(bits)).all())
