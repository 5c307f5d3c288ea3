"""Inner chunks of shards, straight into the caller's arrays: positions from the shard's index, every byte
checked, decoded in place. Decoding does not hold the interpreter's lock: threads decode at once.

Shards are untrusted: index and chunks carry crc32c, positions must lie inside the object, and what blosc's
header says must agree with the array before anything is decoded.
"""

import errno
import os
import struct
import threading
from collections import OrderedDict
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

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
# uint8 [byte]; that an array is a buffer numpy declares from Python 3.12 on.
Packed = Any
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Content(Protocol):
    """The bytes of one object."""

    size: int
    tries: int
    """How often what does not match its checksum is read: more than once where it may suffer on the way."""

    def read(self, offset: int, length: int) -> Packed:
        """uint8 [length], good until this thread reads again. Fewer where the object ends before."""

    def ask(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        """These ranges are going to be read: make them come, without waiting for them."""

    def arrange(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        """These are the ranges there are, none of them empty."""

    def forget(self, offset: int) -> None:
        """The range from `offset` on came spoilt: the next read brings it anew."""


class Here:
    """What reads need not do where bytes are at hand."""

    tries = 1

    def ask(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        pass

    def arrange(self, offsets: np.ndarray, lengths: np.ndarray) -> None:
        pass

    def forget(self, offset: int) -> None:
        pass


class Whole(Here):
    """An object that is held in memory."""

    def __init__(self, content: bytes) -> None:
        self._bytes, self.size = np.frombuffer(content, np.uint8), len(content)

    def read(self, offset: int, length: int) -> Packed:
        return self._bytes[offset : offset + length]


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

    @property
    def held_bytes(self) -> int:
        """What the index takes."""
        return self._offsets.nbytes + self._lengths.nbytes

    def ask(self, chunks: np.ndarray) -> None:
        """These chunks are going to be decoded."""
        if self._content is not None:
            there = chunks[self._lengths[chunks] > 0]
            self._content.ask(self._offsets[there], self._lengths[there])

    def _decode_one(self, offset: int, length: int, out: np.ndarray) -> None:
        payload, end = self._checked(offset, length), length - CRC_BYTES
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
        table = self._checked(end, index_bytes + CRC_BYTES).view("<u8").reshape(num_chunks, 2)
        there = (table != _NO_CHUNK).any(1)
        table = np.where(there[:, None], table, 0)
        offsets, lengths = table[:, 0].copy(), table[:, 1].copy()
        shortest = _BLOSC_SIZES.size + CRC_BYTES
        longest = min(self._chunk_bytes + blosc.MAX_OVERHEAD + CRC_BYTES, end)
        # Unsigned: nothing is added to what may be as large as a number can be.
        wrong = there & ((lengths < shortest) | (lengths > longest))
        wrong |= offsets > np.uint64(end) - np.minimum(lengths, np.uint64(end))
        if wrong.any():
            chunk = int(wrong.argmax())
            raise self._damaged(
                int(offsets[chunk]), int(lengths[chunk]), f"cannot be those of chunk {chunk}"
            )
        # Below the object's size, so that the same bits are the same number with a sign.
        offsets, lengths = offsets.view(np.int64), lengths.view(np.int64)
        content.arrange(offsets[there], lengths[there])
        return offsets, lengths

    def _checked(self, offset: int, length: int) -> Packed:
        """Bytes that match the checksum after them."""
        assert self._content is not None
        for _ in range(self._content.tries):
            packed, end = self._read(offset, length), length - CRC_BYTES
            if google_crc32c.value(packed[:end]) == _CRC.unpack_from(packed, end)[0]:
                return packed[:end]
            self._content.forget(offset)
        raise self._damaged(offset, length, "do not match their checksum")

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
    remedy = "check the disk and the permissions"
    if error.errno in TOO_MANY_OPEN:
        remedy = "raise the limit of open files (ulimit -n)"
    return StoreError(
        f"{where} cannot be read: {error.strerror}; {remedy}, then run the same command again"
    )


class Recent(Generic[_Key, _Value]):
    """What was used last, up to a limit: of values, or of their weights. Safe from threads and forks."""

    def __init__(self, limit: int) -> None:
        self._limit, self._weight = limit, 0
        self._values: OrderedDict[_Key, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        _all_recent.add(self)

    def get(self, key: _Key) -> _Value | None:
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: _Key, value: _Value, weight: int = 1) -> None:
        with self._lock:
            self._weight += weight - self._values.pop(key, (None, 0))[1]
            self._values[key] = value, weight
            while self._weight > self._limit and len(self._values) > 1:
                self._weight -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._weight = 0

    def __len__(self) -> int:
        return len(self._values)

    def unlock(self) -> None:
        """In a forked process: whoever held the lock is not here."""
        self._lock = threading.Lock()


_all_recent: "WeakSet[Recent[Any, Any]]" = WeakSet()


def _after_fork() -> None:
    for recent in _all_recent:
        recent.unlock()


os.register_at_fork(after_in_child=_after_fork)
