"""Reading the arrays of a store. Shapes and codecs come from the committed header, never from an array's
own `zarr.json`: that one may belong to a commit that is not there yet.
"""

from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from pipeline.errors import IntegrityError
from pipeline.storage.commit import MEND
from pipeline.storage.layout import ArraySpec, StoreLayout, array_metadata
from pipeline.storage.objects import LocalObjects, Objects

_CACHE_BYTES = 32 * 2**20


class Pending(Protocol):
    """Values under way."""

    def result(self) -> Any: ...


class Array(Protocol):
    """One array; reads start at once and run beside each other."""

    def read(self, first: "slice | np.ndarray") -> Pending:
        """Values at positions of the first axis: a slice, or int64 [n] in any order."""


class Arrays:
    """The arrays of some modalities, opened at first use."""

    def __init__(self, objects: Objects, layouts: dict[str, StoreLayout]) -> None:
        self._objects, self._layouts = objects, layouts
        self._open: dict[str, Array] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def pending(self, name: str, positions: "slice | np.ndarray") -> Pending:
        """A read under way; a run of neighbouring positions is one slice, anything else an index."""
        array = self._array(name)
        if isinstance(positions, slice) or not len(positions):
            return array.read(positions)
        first = int(positions[0])
        run = np.array_equal(positions, np.arange(first, first + len(positions)))
        return array.read(slice(first, first + len(positions)) if run else positions)

    def _array(self, name: str) -> Array:
        if name not in self._open:
            modality, _, inside = name.partition("/")
            layout = self._layouts[modality]
            specs = layout.arrays()
            if inside.startswith("partitions/"):
                specs = layout.partition_arrays(inside.split("/")[1])
            self._open[name] = self._opened(name, specs[name], layout.codec)
        return self._open[name]

    def _opened(self, name: str, spec: ArraySpec, codec: str) -> Array:
        if isinstance(self._objects, LocalObjects):
            return _LocalArray(f"{self._objects.folder}/{name}/", spec, codec, self._context)
        from pipeline.storage.buckets import BucketArray, BucketObjects  # obstore is an extra

        assert isinstance(self._objects, BucketObjects)
        return BucketArray(self._objects, name, spec, codec)


class _LocalArray:
    def __init__(self, path: str, spec: ArraySpec, codec: str, context: ts.Context) -> None:
        self._array = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": path},
                "metadata": array_metadata(spec, codec),
                "recheck_cached_data": False,
            },
            open=True,
            read=True,
            assume_metadata=True,
            context=context,
        ).result()

    def read(self, first: "slice | np.ndarray") -> Pending:
        return self._array[first].read()


def values(pending: Pending) -> np.ndarray:
    """The values of a read; a checksum mismatch becomes an IntegrityError."""
    try:
        return np.asarray(pending.result())
    except ValueError as error:
        raise IntegrityError(f"{' '.join(str(error).split())}; {MEND}") from None
