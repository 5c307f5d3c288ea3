"""Inner chunks of shards, straight into the caller's arrays: positions from the shard's index, every byte
checked, decoded in place. Decoding does not hold the interpreter's lock: threads decode at once.

Shards are untrusted: index and chunks carry crc32c, positions must lie inside the object, and what blosc's
header says must agree with the array before anything is decoded.
"""

import os
import struct
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import google_crc32c
import numpy as np
from numcodecs import blosc

from pipeline.errors import IntegrityError, StoreError
from pipeline.storage.commit import MEND
from pipeline.storage.layout import ArraySpec

CRC_BYTES = 4
_CRC = struct.Struct("<I")
# Of blosc's header: bytes of the decoded and of the encoded chunk.
_BLOSC_SIZES = struct.Struct("<4xI4xI")
# Offset and length of a chunk without bytes: all of it is fill value.
_NO_CHUNK = 2**64 - 1
# blosc's own threads would be shared by all callers, and do not survive a fork.
blosc.use_threads = False
_of_thread = threading.local()
# uint8 [byte]; that an array is a buffer numpy declares from Python 3.12 on.
Packed = Any
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Content(Protocol):
    """The bytes of one object."""

    size: int

    def read(self, offset: int, length: int) -> Packed:
        """uint8 [length], good until this thread reads again. Fewer where the object ends before."""

    def ask(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        """These ranges are going to be read: make them come, without waiting for them."""


class Whole:
    """An object that is held in memory."""

    def __init__(self, content: bytes) -> None:
        self._bytes, self.size = np.frombuffer(content, np.uint8), len(content)

    def read(self, offset: int, length: int) -> Packed:
        return self._bytes[offset : offset + length]

    def ask(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        pass


class LocalFile:
    """A file. Reads share no position, so threads and forked processes may read at once.

    Read, not mapped: as fast, and a file cut short meanwhile is an error instead of a signal.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        # Whoever still reads holds the object: no number of a file is closed and given to another.
        if hasattr(self, "_file"):
            close(self._file)

    def read(self, offset: int, length: int) -> Packed:
        found = _scratch(length)
        read = os.preadv(self._file, (found,), offset)
        while read < length:
            more = os.preadv(self._file, (found[read:],), offset + read)
            if not more:
                return found[:read]
            read += more
        return found

    def ask(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        if not hasattr(os, "posix_fadvise"):
            return  # macOS
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_WILLNEED)


class Shard:
    """One object of an array that is sharded and chunked along its first axis only.

    `where` names it in messages. Without `content` all of it is fill value. Raises IntegrityError where
    its index is damaged.
    """

    def __init__(self, where: str, content: Content | None, spec: ArraySpec) -> None:
        self._where, self._content = where, content
        self._fill = spec.fill_value
        self._chunk_bytes = int(np.prod(spec.chunk)) * np.dtype(spec.dtype).itemsize
        num_chunks = spec.shard[0] // spec.chunk[0]
        if content is None:
            self._offsets = self._lengths = np.zeros(num_chunks, np.int64)
        else:
            self._offsets, self._lengths = self._index(content, num_chunks)

    def decode(self, chunks: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Chunks (int64 [n], counted from the shard's first) into `out[rows[i]]`, of the chunk's shape.

        Raises IntegrityError where one is damaged, StoreError where the object cannot be read.
        """
        lengths = self._lengths[chunks].tolist()
        for row, offset, length in zip(
            rows.tolist(), self._offsets[chunks].tolist(), lengths, strict=True
        ):
            if length:
                self._decode_one(offset, length, out[row])
            else:
                out[row] = self._fill

    def ask(self, chunks: np.ndarray) -> None:
        """These chunks are going to be decoded."""
        if self._content is not None:
            there = chunks[self._lengths[chunks] > 0]
            self._content.ask(self._offsets[there], self._lengths[there])

    def _decode_one(self, offset: int, length: int, out: np.ndarray) -> None:
        packed, end = self._read(offset, length), length - CRC_BYTES
        payload = packed[:end]
        if google_crc32c.value(payload) != _CRC.unpack_from(packed, end)[0]:
            raise self._damaged(offset, length, "do not match their checksum")
        decoded, encoded = _BLOSC_SIZES.unpack_from(payload)
        if decoded != self._chunk_bytes or encoded != end:
            expected = f"instead of {self._chunk_bytes} and {end}"
            told = f"claim {decoded} bytes in {encoded}, {expected}"
            raise self._damaged(offset, length, told)
        try:
            blosc.decompress(payload, out)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(offset, length, f"cannot be decoded ({error})") from None

    def _index(self, content: Content, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
        """Offset and length of every chunk, int64 [chunk]; length 0 where all of it is fill value."""
        index_bytes = 16 * num_chunks
        end = content.size - index_bytes - CRC_BYTES
        if end < 0:
            raise self._damaged(0, content.size, f"are too few for an index of {num_chunks} chunks")
        packed = self._read(end, index_bytes + CRC_BYTES)
        if google_crc32c.value(packed[:index_bytes]) != _CRC.unpack_from(packed, index_bytes)[0]:
            raise self._damaged(end, len(packed), "are an index that does not match its checksum")
        table = packed[:index_bytes].view("<u8").reshape(num_chunks, 2)
        there = (table != _NO_CHUNK).any(1)
        offsets, lengths = (np.where(there, column, 0) for column in table.T)
        shortest = _BLOSC_SIZES.size + CRC_BYTES
        longest = self._chunk_bytes + blosc.MAX_OVERHEAD + CRC_BYTES
        # Unsigned: nothing is added to what may be as large as a number can be.
        wrong = (lengths < shortest) | (lengths > min(longest, end)) | (offsets > end)
        wrong |= offsets > np.uint64(end) - np.minimum(lengths, np.uint64(end))
        wrong &= there
        if wrong.any():
            chunk = int(wrong.argmax())
            raise self._damaged(
                int(offsets[chunk]), int(lengths[chunk]), f"cannot be those of chunk {chunk}"
            )
        return offsets.astype(np.int64), lengths.astype(np.int64)

    def _read(self, offset: int, length: int) -> Packed:
        assert self._content is not None
        try:
            packed = self._content.read(offset, length)
        except OSError as error:
            raise unreadable(self._where, error) from None
        if len(packed) != length:
            raise self._damaged(offset, length, f"end after {len(packed)}")
        return packed

    def _damaged(self, offset: int, length: int, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._where}: the {length} bytes from byte {offset} on {what}; {MEND}"
        )


def unreadable(where: str, error: OSError) -> StoreError:
    """What is told of a file that is there and cannot be read."""
    return StoreError(
        f"{where} cannot be read: {error.strerror}; check the disk and the permissions, then run the same "
        "command again"
    )


class Recent(Generic[_Key, _Value]):
    """What was used last, so many of it.

    Without a lock: every step is one of the interpreter's own, so that no fork finds it held.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._values = limit, OrderedDict[_Key, _Value]()

    def get(self, key: _Key) -> _Value | None:
        found = self._values.get(key)
        if found is not None:
            with suppress(KeyError):
                self._values.move_to_end(key)
        return found

    def put(self, key: _Key, value: _Value) -> None:
        self._values[key] = value
        while len(self._values) > self._limit:
            with suppress(KeyError):
                self._values.popitem(last=False)

    def clear(self) -> None:
        self._values.clear()


def _scratch(length: int) -> Packed:
    """uint8 [length] of this thread; what was there before is lost."""
    held = getattr(_of_thread, "scratch", None)
    if held is None or len(held) < length:
        held = _of_thread.scratch = np.empty(length, np.uint8)
    return held[:length]
