"""Local files, read by ranges.

Read, not mapped: a mapped page that is not in memory is waited for with the interpreter's lock held, and one
that was cut off ends the process. A read waits without the lock, fails in words and is as fast.
"""

import os
import threading

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
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_WILLNEED)


def _scratch(length: int) -> Packed:
    """uint8 [length] of this thread; what was there before is lost."""
    held = getattr(_of_thread, "scratch", None)
    if held is None or len(held) < length:
        held = _of_thread.scratch = np.empty(length, np.uint8)
    return held[:length]
