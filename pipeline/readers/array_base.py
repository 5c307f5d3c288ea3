"""Arrays of Zarr and netCDF files: what their headers say, and what every file of arrays offers.

Numbers are those that are stored: no scale, offset or fill value is applied. Only the type is made
plain: native byte order, `_Unsigned` honoured, booleans as 0 and 1.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.errors import AptileError, SceneError
from pipeline.locations import reason_of

# Coordinates are read whole while planning; nobody has longer ones.
MAX_COORDINATE_LENGTH = 2**24
# Bytes that such a coordinate may take, however wide its type.
_MAX_COORDINATE_BYTES = 2**28
# Objects of one file or store that are listed at most.
MAX_MEMBERS = 20_000
# What one read takes of an array that is not chunked.
_STRIP_BYTES = 2**20
_ROW_NAMES = ("y", "lat", "latitude", "northing", "yc", "row", "rows", "line", "lines")
_COLUMN_NAMES = ("x", "lon", "longitude", "easting", "xc", "col", "cols", "column", "columns")
_TIME_NAMES = ("time", "t", "date", "datetime", "times", "dates")
_BAND_NAMES = ("band", "bands", "channel", "channels", "wavelength")
_ROW_STANDARD_NAMES = ("projection_y_coordinate", "latitude", "grid_latitude")
_COLUMN_STANDARD_NAMES = ("projection_x_coordinate", "longitude", "grid_longitude")


@dataclass(frozen=True)
class ArrayHeader:
    """What an array says of itself.

    `path` is its place below the file's root ("measurements/reflectance/r10m/b02"), `stored` its type in
    the file, `block_shape` what is decoded at once, one length per dimension. `attrs` hold a
    `_FillValue` wherever the format has a place of its own for it.
    """

    path: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    block_shape: tuple[int, ...]
    attrs: Mapping[str, Any]

    @property
    def group(self) -> str:
        """Path of the group it lies in; empty for the root."""
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its numbers as they are read; that of the file where they are none."""
        if self.stored.kind == "b":
            return np.dtype(np.uint8)
        unsigned = str(self.attrs.get("_Unsigned", "")).lower()
        kinds = {("i", "true"): "u", ("u", "false"): "i"}
        kind = kinds.get((self.stored.kind, unsigned), self.stored.kind)
        if kind in "iuf":
            return np.dtype(f"{kind}{self.stored.itemsize}")
        return self.stored

    def numbers(self, stored: np.ndarray) -> np.ndarray:
        """Stored values in the type `dtype`, bit for bit."""
        if self.dtype == stored.dtype:
            return stored
        return stored.astype(stored.dtype.newbyteorder("="), copy=False).view(self.dtype)


class ArrayFile(Protocol):
    """An open file of arrays. Paths have no leading slash; every failure is a SceneError."""

    def header(self, path: str) -> ArrayHeader | None:
        """Header of an array; None if there is no array of that path."""

    def members(self, group: str) -> tuple[str, ...]:
        """Paths of the arrays that lie directly in a group, sorted."""

    def arrays(self) -> tuple[str, ...]:
        """Paths of all arrays, sorted."""

    def group_attrs(self, group: str) -> Mapping[str, Any]:
        """Attributes of a group; empty if there is none."""

    def check(self, path: str) -> None:
        """Raise SceneError unless decoding the array is safe and its blocks are small enough."""

    def block(self, path: str, index: tuple[int, ...]) -> np.ndarray | None:
        """The stored block `index` (counted in blocks), cut at the array's end; None if nobody wrote it."""

    def fill(self, path: str) -> Any:
        """What the format says a block reads as that nobody wrote."""


@contextmanager
def scene_errors() -> Iterator[None]:
    """Turn whatever a library raises into a SceneError of one line; also a decorator."""
    try:
        yield
    except (AptileError, AssertionError):
        raise
    except Exception as error:  # Zarr, HDF5 and every codec have errors of their own
        raise SceneError(f"cannot be read ({reason_of(error):.200})") from None


def read_whole(file: ArrayFile, path: str) -> np.ndarray:
    """All stored values of a small array such as a coordinate, in native byte order."""
    header = file.header(path)
    if header is None:
        raise SceneError(f"has no array {path}")
    count = math.prod(header.shape)
    if count > MAX_COORDINATE_LENGTH or count * header.stored.itemsize > _MAX_COORDINATE_BYTES:
        raise SceneError(
            f"its coordinate {path} has {count} values; at most {MAX_COORDINATE_LENGTH} are read, of "
            f"{_MAX_COORDINATE_BYTES} bytes in all"
        )
    file.check(path)
    blocks = [-(-n // size) for n, size in zip(header.shape, header.block_shape, strict=True)]
    whole = np.full(header.shape, file.fill(path), header.stored.newbyteorder("="))
    for index in np.ndindex(*blocks):
        block = file.block(path, index)
        if block is not None:
            starts = [i * size for i, size in zip(index, header.block_shape, strict=True)]
            place = tuple(slice(s, s + n) for s, n in zip(starts, block.shape, strict=True))
            whole[place] = block
    return whole


@dataclass(frozen=True)
class Axes:
    """Which dimension of an array is which; None where there is none, `rest` all others."""

    y: str
    x: str
    time: str | None
    band: str | None
    rest: tuple[str, ...]


def find_axes(file: ArrayFile, header: ArrayHeader) -> Axes | None:
    """The dimensions of an array by their names, then by the CF attributes of their coordinates.

    None if it has no two dimensions that are rows and columns.
    """
    roles: dict[str, str] = {}
    for known in (_role_by_name, _role_by_attributes):
        for dim in header.dims:
            role = None if dim in roles.values() else known(file, header, dim)
            if role is not None and role not in roles:
                roles[role] = dim
    if "y" not in roles or "x" not in roles:
        return None
    rest = tuple(dim for dim in header.dims if dim not in roles.values())
    return Axes(roles["y"], roles["x"], roles.get("time"), roles.get("band"), rest)


def coordinate(file: ArrayFile, header: ArrayHeader, dim: str) -> ArrayHeader | None:
    """The one-dimensional array named like a dimension, in the array's group or one around it.

    None if there is none; SceneError if it has another length than the array.
    """
    for group in enclosing(header.group):
        found = file.header(f"{group}/{dim}" if group else dim)
        if found is not None and found.dims == (dim,):
            length = header.shape[header.dims.index(dim)]
            if found.shape != (length,):
                raise SceneError(
                    f"its coordinate {found.path} has {found.shape[0]} values; {header.path} has {length} "
                    f"positions along {dim}"
                )
            return found
    return None


def enclosing(group: str) -> list[str]:
    """A group and those around it, the root last."""
    parts = group.split("/") if group else []
    return ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]


def checked_path(text: str) -> str:
    """A path below a file's root without slashes at its ends; SceneError where it leads elsewhere."""
    path = text.strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path:
        raise SceneError(f"has no array {text!r}: expected a path such as group/variable")
    return path


def refuse_large_block(path: str, shape: tuple[int, ...], itemsize: int, limit: int) -> None:
    """A few kB of file can hold one block that decodes to gigabytes."""
    block_bytes = itemsize
    for length in shape:
        block_bytes *= length
    if block_bytes > limit:
        raise SceneError(
            f"one chunk of its array {path} decodes to {block_bytes} bytes "
            f"({' x '.join(map(str, shape))}), more than run.max_block_bytes {limit}; raise that, or "
            "rewrite it in smaller chunks"
        )


def strips(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The block shape of an array without chunks: some rows of the last two dimensions, about a MiB."""
    if len(shape) < 2:
        return tuple(max(length, 1) for length in shape)
    rows = _STRIP_BYTES // max(shape[-1] * itemsize, 1)
    return (*[1] * (len(shape) - 2), min(max(rows, 1), max(shape[-2], 1)), max(shape[-1], 1))


def _role_by_name(file: ArrayFile, header: ArrayHeader, dim: str) -> str | None:
    name = dim.lower()
    roles = {"y": _ROW_NAMES, "x": _COLUMN_NAMES, "time": _TIME_NAMES, "band": _BAND_NAMES}
    return next((role for role, names in roles.items() if name in names), None)


def _role_by_attributes(file: ArrayFile, header: ArrayHeader, dim: str) -> str | None:
    found = coordinate(file, header, dim)
    if found is None:
        return None
    axis = {"Y": "y", "X": "x", "T": "time"}.get(str(found.attrs.get("axis", "")).upper())
    standard = str(found.attrs.get("standard_name", ""))
    if axis is not None:
        return axis
    if standard in _ROW_STANDARD_NAMES:
        return "y"
    if standard in _COLUMN_STANDARD_NAMES:
        return "x"
    is_time = found.stored.kind == "M" or " since " in str(found.attrs.get("units", ""))
    return "time" if is_time or standard == "time" else None
