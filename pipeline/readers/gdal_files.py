"""GDAL's view of a file that this package reads: GDAL asks for bytes, and never for an address.

GDAL cannot hear of a Python exception, and takes missing bytes for damage, or for zeros where a raster is
not compressed. So the first failure is kept, nothing is read after it, and whoever reads pixels asks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rasterio
from rasterio.abc import MultiByteRangeResourceContainer

from pipeline.errors import SceneError
from pipeline.fetch.files import OpenFile

# Of compressed blocks that GDAL asks for at once and keeps until they are decoded. What is beyond it
# takes one by one, which is slower.
RAW_BYTES = 128 * 2**20


class GdalFiles(MultiByteRangeResourceContainer):  # type: ignore[misc]
    """A folder that holds nothing but one file."""

    def __init__(self, name: str, file: OpenFile) -> None:
        self._name, self.file = name, file
        self.failure: SceneError | None = None

    def check(self) -> None:
        """Raise the SceneError, if any, that a read came to."""
        if self.failure is not None:
            raise self.failure

    def open(self, path: str, mode: str = "r", **options: Any) -> "_Handle":
        del options
        if not self.isfile(path) or "w" in mode or "+" in mode:
            raise FileNotFoundError(path)
        return _Handle(self)

    def isfile(self, path: str) -> bool:
        return path == self._name

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return [self._name]

    def mtime(self, path: str) -> int:
        return 0

    def rm(self, path: str) -> None:
        raise PermissionError(path)

    def size(self, path: str) -> int:
        if not self.isfile(path):
            raise FileNotFoundError(path)
        return self.file.size


class _Handle:
    """What GDAL reads through; in one thread at a time."""

    def __init__(self, files: GdalFiles) -> None:
        self._files, self._at = files, 0

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._files.file.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, length: int) -> bytes:
        (data,) = self._kept([(self._at, length)])
        self._at += len(data)
        return data

    def get_byte_ranges(self, offsets: list[int], sizes: list[int]) -> list[bytes]:
        found = self._kept(list(zip(offsets, sizes, strict=True)))
        for data, offset, size in zip(found, offsets, sizes, strict=True):
            if len(data) != size and self._files.failure is None:
                self._files.failure = SceneError(
                    f"ends before byte {offset + size}, where a block of it should end; copy it again"
                )
        return [data.ljust(size, b"\0") for data, size in zip(found, sizes, strict=True)]

    def _kept(self, parts: list[tuple[int, int]]) -> list[bytes]:
        files = self._files
        if files.failure is None:
            try:
                if len(parts) == 1:
                    return [files.file.read(*parts[0])]
                return files.file.read_parts(parts)
            except SceneError as error:
                files.failure = error
            except Exception as error:  # GDAL would go on as if nothing had been
                files.failure = SceneError(f"cannot be read: {type(error).__name__}: {error}")
        return [b""] * len(parts)


@contextmanager
def opened_through(name: str, file: OpenFile, driver: str) -> Iterator[tuple[Any, GdalFiles]]:
    """A raster whose bytes `file` gives, under a file name for messages; the failure of a read is raised
    whatever GDAL made of it."""
    files = GdalFiles(name, file)
    try:
        with rasterio.open(name, driver=driver, opener=files) as raster:
            yield raster, files
    except Exception:
        files.check()
        raise
    files.check()
