"""Memory for batches, used again: faulting in fresh pages costs more than decoding into them.

An array's memory returns to the pool when nothing refers to it any more: neither the array, nor a slice
or view of it, nor a tensor made from either.
"""

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

# Below this, malloc reuses memory by itself.
_SMALLEST_POOLED = 1 << 17
# Blocks come in sizes of 1, 1.25, 1.5 and 1.75 times a power of two: at most a fifth is given away,
# and batches of nearly the same size share them.
_STEPS_PER_DOUBLING = 4


class BufferPool:
    """Arrays whose memory is used again; may be called from several threads at once.

    At most `max_free_bytes` lie idle; what is in use is not limited. With `pinned`, memory is page-locked
    (CUDA only) and torch's own cache keeps it, which also waits for copies to the device under way.
    """

    def __init__(self, max_free_bytes: int = 1 << 30, pinned: bool = False) -> None:
        self.max_free_bytes, self.pinned = max_free_bytes, pinned
        self._lock = threading.Lock()
        self._free: list[np.ndarray] = []
        self._free_bytes = 0
        # Arrays die anywhere, even while this pool's lock is held: appending needs no lock.
        self._returned: deque[np.ndarray] = deque()

    @property
    def free_bytes(self) -> int:
        """Bytes that lie idle."""
        with self._lock:
            self._collect()
            return self._free_bytes

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """A C-contiguous array of that shape; its content is arbitrary."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = count * dtype.itemsize
        if nbytes < _SMALLEST_POOLED:
            return np.empty(shape, dtype)
        if self.pinned:
            block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
            return block.view(dtype).reshape(shape)
        block = self._block(_rounded(nbytes))
        # Its base is no array, so numpy lets everything derived from it keep `flat` alive.
        flat: np.ndarray = np.frombuffer(block.data, dtype, count)
        weakref.finalize(flat, self._returned.append, block).atexit = False
        return flat.reshape(shape)

    def _block(self, nbytes: int) -> np.ndarray:
        with self._lock:
            self._collect()
            # The last to come back is the likeliest to be in the processor's cache.
            for index in reversed(range(len(self._free))):
                if self._free[index].nbytes == nbytes:
                    self._free_bytes -= nbytes
                    return self._free.pop(index)
        return np.empty(nbytes, np.uint8)

    def _collect(self) -> None:
        """Put what was returned among the free blocks, and drop the oldest beyond the limit."""
        while self._returned:
            block = self._returned.popleft()
            self._free.append(block)
            self._free_bytes += block.nbytes
        while self._free_bytes > self.max_free_bytes:
            self._free_bytes -= self._free.pop(0).nbytes

    def __getstate__(self) -> dict[str, Any]:
        """Another process begins with an empty pool."""
        return {"max_free_bytes": self.max_free_bytes, "pinned": self.pinned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _rounded(nbytes: int) -> int:
    """The size of block that holds so many bytes."""
    power = 1 << (nbytes - 1).bit_length() - 1
    step = power // _STEPS_PER_DOUBLING
    return -(-nbytes // step) * step
