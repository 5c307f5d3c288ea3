"""Arrays of netCDF-3 files (classic and 64-bit offset), mapped into memory: nothing is decoded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.io import netcdf_file

from pipeline.errors import SceneError
from pipeline.locations import is_url
from pipeline.readers.array_base import ArrayHeader, refuse_large_block, scene_errors, strips
from pipeline.readers.netcdf3_header import check_netcdf3
from pipeline.scenes import Access


@contextmanager
def open_netcdf3(href: str, access: Access) -> Iterator["Netcdf3File"]:
    """A netCDF-3 file; SceneError if it lies behind a URL."""
    if is_url(href):
        raise SceneError(
            "is a netCDF-3 file, which is read from a folder only; copy it, or rewrite it"
        )
    check_netcdf3(href)
    file = netcdf_file(href, "r", mmap=True)
    opened = Netcdf3File(file, access.max_block_bytes)
    try:
        yield opened
    finally:
        opened.forget()
        file.close()


class Netcdf3File:
    """An open netCDF-3 file as an `ArrayFile`. It has no groups, and every number of it was written."""

    def __init__(self, file: Any, max_block_bytes: int) -> None:
        self._max_block_bytes = max_block_bytes
        self._variables = dict(file.variables)
        self._attrs = {name: _plain(value) for name, value in file._attributes.items()}

    def forget(self) -> None:
        """Drop all references to the mapped file, so that it can be closed."""
        self._variables.clear()

    @scene_errors()
    def header(self, path: str) -> ArrayHeader | None:
        variable = self._variables.get(path)
        if variable is None:
            return None
        stored = np.dtype("S1") if variable.data.dtype.kind in "SV" else variable.data.dtype
        shape = tuple(int(length) for length in variable.data.shape)
        attrs = {name: _plain(value) for name, value in variable._attributes.items()}
        return ArrayHeader(
            path, tuple(variable.dimensions), shape, stored, strips(shape, stored.itemsize), attrs
        )

    @scene_errors()
    def members(self, group: str) -> tuple[str, ...]:
        return tuple(sorted(self._variables)) if not group else ()

    @scene_errors()
    def arrays(self) -> tuple[str, ...]:
        return self.members("")

    @scene_errors()
    def group_attrs(self, group: str) -> Mapping[str, Any]:
        return self._attrs if not group else {}

    @scene_errors()
    def check(self, path: str) -> None:
        header = self.header(path)
        if header is None:
            raise SceneError(f"has no array {path}")
        size = header.stored.itemsize
        refuse_large_block(path, header.block_shape, size, self._max_block_bytes)

    @scene_errors()
    def block(self, path: str, index: tuple[int, ...]) -> np.ndarray | None:
        header = self.header(path)
        assert header is not None
        part = tuple(
            slice(i * size, (i + 1) * size)
            for i, size in zip(index, header.block_shape, strict=True)
        )
        return np.array(self._variables[path].data[part])

    @scene_errors()
    def fill(self, path: str) -> Any:
        header = self.header(path)
        assert header is not None
        return np.zeros((), header.stored)[()]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray) and value.size == 1:
        return value.reshape(-1)[0]
    return value
