"""Local files, read by ranges: out of the page cache in place, or by a read that can fail.

A mapped file costs no copy, but a page that must come from the disk would be waited for with the
interpreter's lock held, and one that cannot come kills the process. So the system is asked first which are
there.
"""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable

import numpy as np

from pipeline.storage.chunks import Here, Packed

# Copying less than this costs less than asking.
_MAPPED_FROM = 2**16
_of_thread = threading.local()


class LocalFile(Here):
    """A file. Reads share no position, so threads and forked processes may read at once.

    Raises OSError where it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY)
        status = os.fstat(self._file)
        self.size = status.st_size
        # To others the system says of every page that it is there.
        self._is_told = _MINCORE is not None and (
            status.st_uid == os.geteuid() or os.access(path, os.W_OK)
        )
        self._mapped: Packed = None

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        # Whoever still reads holds the object: no number of a file is closed and given to another.
        if hasattr(self, "_file"):
            close(self._file)

    def read(self, offset: int, length: int) -> Packed:
        if length >= _MAPPED_FROM and self._is_told and self._is_cached(offset, length):
            return self._mapped[offset : offset + length]
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

    def _is_cached(self, offset: int, length: int) -> bool:
        """Whether all pages of a range are in memory, none of them beyond the file's end."""
        # The system may hold pages of what was cut off, which must not be touched.
        if os.fstat(self._file).st_size < self.size or (self._mapped is None and not self._map()):
            return False
        assert _MINCORE is not None
        before = offset % mmap.PAGESIZE
        pages = -(-(before + length) // mmap.PAGESIZE)
        there = _flags(pages)
        if _MINCORE(self._address + offset - before, before + length, there):
            return False
        return b"\0" not in there.raw[:pages]

    def _map(self) -> bool:
        try:
            found = mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return False  # it was cut short meanwhile, as the read will tell
        mapped = np.frombuffer(found, np.uint8)
        # Other threads look at the second one first.
        self._address, self._mapped = mapped.ctypes.data, mapped
        return True


def _mincore() -> Callable[..., int] | None:
    """The system call that tells which pages are in memory; None where there is none."""
    if sys.platform != "linux":
        return None
    try:
        call = ctypes.CDLL(None).mincore
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return call


_MINCORE = _mincore()


def _flags(pages: int) -> "ctypes.Array[ctypes.c_char]":
    """Room of this thread for a byte per page."""
    held = getattr(_of_thread, "flags", None)
    if held is None or len(held) < pages:
        held = _of_thread.flags = ctypes.create_string_buffer(pages)
    return held


def _scratch(length: int) -> Packed:
    """uint8 [length] of this thread; what was there before is lost."""
    held = getattr(_of_thread, "scratch", None)
    if held is None or len(held) < length:
        held = _of_thread.scratch = np.empty(length, np.uint8)
    return held[:length]
