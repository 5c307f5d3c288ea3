"""Local files, read by ranges.

Read, not mapped: a mapped page that is not in memory is waited for with the interpreter's lock held, and
one that was cut off ends the process. A read waits without the lock and fails with an error.
"""

import os
import threading
from collections.abc import Iterator

import numpy as np

from pipeline.storage.chunks import Here, Packed

_of_thread = threading.local()


class LocalFile(Here):
    """A file. Reads share no position, so threads and forked processes may read at once.

    Raises OSError where it cannot be opened.
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
        for start, end in _runs(offsets, lengths):
            # To ask for what is in the page cache costs far more than to see that it is.
            if not self._is_at_hand(start):
                os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_WILLNEED)

    def _is_at_hand(self, offset: int) -> bool:
        """Whether a byte can be read without the disk; its neighbours are likely to have come with it."""
        try:
            return os.preadv(self._file, (bytearray(1),), offset, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):
            return False  # not there, or a system that does not tell


def _runs(offsets: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of ranges, those that touch each other as one."""
    order = np.argsort(offsets, kind="stable")
    offsets, ends = offsets[order], (offsets + lengths)[order]
    cuts = np.flatnonzero(offsets[1:] > ends[:-1]) + 1
    begins, lasts = np.append(0, cuts)[: len(offsets)], np.append(cuts, 0)[: len(offsets)] - 1
    yield from zip(offsets[begins].tolist(), ends[lasts].tolist(), strict=True)


def _scratch(length: int) -> Packed:
    """uint8 [length] of this thread; what was there before is lost."""
    held = getattr(_of_thread, "scratch", None)
    if held is None or len(held) < length:
        held = _of_thread.scratch = np.empty(length, np.uint8)
    return held[:length]
