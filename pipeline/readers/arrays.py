"""Variables of Zarr and netCDF files as assets of scenes, read by window in the arrays' own blocks.

Numbers are the stored ones. A block that nobody wrote reads as the format's fill value, and its pixels
are not readable: what is unknown must not become a number. A Zarr writer that leaves out blocks full of
fill values makes those unknown, too, since nothing tells them from lost ones.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipeline.errors import SceneError
from pipeline.fetch.files import fingerprint, opened
from pipeline.locations import check_allowed, is_url
from pipeline.readers.array_base import (
    ArrayFile,
    ArrayHeader,
    checked_path,
    find_axes,
    scene_errors,
)
from pipeline.readers.hdf5_arrays import open_hdf5
from pipeline.readers.netcdf3_arrays import open_netcdf3
from pipeline.readers.zarr_arrays import ZarrFile
from pipeline.scenes import Access, Asset, Window

NETCDF_SUFFIXES = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".netcdf")
# Decoded blocks that neighbouring windows share, per open asset; as much as GDAL is given.
_CACHE_BYTES = 128 * 2**20

Cell = tuple[int, int, int]


@contextmanager
def open_array_file(href: str, access: Access) -> Iterator[ArrayFile]:
    """A Zarr store (a folder, or a URL without a netCDF suffix) or a netCDF file."""
    with ExitStack() as stack:
        with scene_errors():
            check_allowed(href, access)
            file = stack.enter_context(_opener(href, access))
        yield file


@contextmanager
def open_array_asset(asset: Asset, access: Access) -> Iterator["ArrayReader"]:
    """A reader of an asset on its own grid; SceneError where the arrays are not as planned."""
    with open_array_file(asset.href, access) as file:
        if is_netcdf(asset.href) and asset.header_seen:
            with scene_errors():
                found = fingerprint(asset.href, access)
            if found != asset.fingerprint:
                raise SceneError(
                    f"changed since it was planned: its fingerprint is {found}, was {asset.fingerprint}"
                )
        yield ArrayReader(file, asset)


def is_netcdf(href: str) -> bool:
    """Whether a location is a file, and so netCDF, rather than a Zarr store."""
    if is_url(href):
        return urlsplit(href).path.lower().endswith(NETCDF_SUFFIXES)
    return not Path(href).is_dir()


class ArrayReader:
    """Windows of the planes of an asset."""

    def __init__(self, file: ArrayFile, asset: Asset) -> None:
        self._shape = (len(asset.planes), asset.grid.height, asset.grid.width)
        self._dtype = np.dtype(asset.dtype)
        self._cache = _Cache()
        planes: dict[str, list[tuple[int, int]]] = {}
        for number, plane in enumerate(asset.planes):
            path, position = plane_key(plane.key, asset.band_dim)
            planes.setdefault(path, []).append((number, position))
        self._layers = [
            _Layer(file, asset, path, members, self._cache) for path, members in planes.items()
        ]

    def read(self, window: Window) -> np.ndarray:
        pixels = np.empty((self._shape[0], window.height, window.width), self._dtype)
        for layer in self._layers:
            layer.read(window, pixels)
        return pixels

    def readable(self, window: Window) -> np.ndarray | None:
        """bool [y, x], False where a block of any plane was never written; None if all were."""
        written = np.ones((window.height, window.width), np.bool_)
        for layer in self._layers:
            layer.clear_unwritten(window, written)
        return None if written.all() else written


def plane_key(key: int | str, band_dim: str | None) -> tuple[str, int]:
    """Path of a plane's array and its position along the band dimension (0 without one).

    A key is the path, behind which `[position]` stands where bands are a dimension.
    """
    text = str(key)
    if band_dim is None:
        return checked_path(text), 0
    path, _, position = text.rpartition("[")
    if not path or not position[:-1].isdecimal():
        raise SceneError(f"has no plane {text!r}; expected a path and a position such as bands[3]")
    return checked_path(path), int(position[:-1])


@dataclass(frozen=True)
class _Part:
    """Where one block lies: its rows and columns in the grid, and its number."""

    cell: Cell
    top: int
    left: int


class _Layer:
    """The planes of an asset that lie in one array."""

    def __init__(
        self,
        file: ArrayFile,
        asset: Asset,
        path: str,
        members: list[tuple[int, int]],
        cache: "_Cache",
    ) -> None:
        header = file.header(path)
        if header is None:
            raise SceneError(f"has no array {path}; it was there when it was planned")
        file.check(path)
        self._file, self._header, self._cache = file, header, cache
        self._fixed = dict(asset.select)
        self._axes = _plane_axes(file, header, self._fixed, asset.band_dim)
        self._refuse_change(asset, members)
        lengths = dict(zip(header.dims, header.block_shape, strict=True))
        band, y, x = self._axes
        self._block = (lengths[band] if band else 1, lengths[y], lengths[x])
        self._members: dict[int, list[tuple[int, int]]] = {}
        for number, position in members:
            block, within = divmod(position, self._block[0])
            self._members.setdefault(block, []).append((number, within))
        self._written: dict[Cell, bool] = {}

    def read(self, window: Window, pixels: np.ndarray) -> None:
        """Fill the layer's planes of `pixels` [plane, y, x]."""
        for part in self._parts(window):
            cell = self._load(part, window)
            rows, cols, own_rows, own_cols = _overlap(part, cell.shape[1:], window)
            numbers = [number for number, _ in self._members[part.cell[0]]]
            pixels[numbers, rows, cols] = cell[:, own_rows, own_cols]

    def clear_unwritten(self, window: Window, written: np.ndarray) -> None:
        """Clear in `written` [y, x] what lies in blocks that nobody wrote."""
        for part in self._parts(window):
            if part.cell not in self._written:
                self._load(part, window)
            if not self._written[part.cell]:
                rows, cols, _, _ = _overlap(part, self._block[1:], window)
                written[rows, cols] = False

    def _parts(self, window: Window) -> Iterator[_Part]:
        _, height, width = self._block
        for band in self._members:
            for row in range(window.top // height, -(-(window.top + window.height) // height)):
                for col in range(window.left // width, -(-(window.left + window.width) // width)):
                    yield _Part((band, row, col), row * height, col * width)

    def _load(self, part: _Part, window: Window) -> np.ndarray:
        """Numbers [plane, y, x] of the layer's planes in one block."""
        key = (self._header.path, part.cell)
        found = self._cache.get(key)
        if found is not None:
            return found
        block = self._file.block(self._header.path, self._index(part.cell))
        self._written[part.cell] = block is not None
        cell = self._planes(part, block)
        if not _inside(part, cell.shape[1:], window):
            self._cache.keep(key, cell)
        return cell

    def _index(self, cell: Cell) -> tuple[int, ...]:
        numbers = dict(zip(self._axes, cell, strict=True))
        return tuple(
            numbers[dim] if dim in numbers else self._fixed[dim] // size
            for dim, size in zip(self._header.dims, self._header.block_shape, strict=True)
        )

    def _planes(self, part: _Part, block: np.ndarray | None) -> np.ndarray:
        within = [position for _, position in self._members[part.cell[0]]]
        if block is None:
            lengths = dict(zip(self._header.dims, self._header.shape, strict=True))
            _, y, x = self._axes
            shape = (
                len(within),
                min(self._block[1], lengths[y] - part.top),
                min(self._block[2], lengths[x] - part.left),
            )
            fill = np.asarray(self._file.fill(self._header.path), self._header.stored)
            return np.broadcast_to(self._header.numbers(fill.reshape(1))[0], shape)
        picked = block[
            tuple(
                self._fixed[dim] % size if dim in self._fixed else slice(None)
                for dim, size in zip(self._header.dims, self._header.block_shape, strict=True)
            )
        ]
        kept = [dim for dim in self._header.dims if dim not in self._fixed]
        order = [kept.index(dim) for dim in self._axes if dim is not None]
        picked = picked.transpose(order)
        planes = picked[within] if self._axes[0] else picked[None]
        return self._header.numbers(np.ascontiguousarray(planes))

    def _refuse_change(self, asset: Asset, members: list[tuple[int, int]]) -> None:
        """Raise SceneError, with both values, unless size, type and further dimensions are as planned."""
        header = self._header
        lengths = dict(zip(header.dims, header.shape, strict=True))
        band, y, x = self._axes
        found, planned = (lengths[y], lengths[x]), (asset.grid.height, asset.grid.width)
        if found != planned:
            raise SceneError(
                f"its array {header.path} has {found[0]} x {found[1]} px; planned were "
                f"{planned[0]} x {planned[1]}"
            )
        if header.dtype.name != asset.dtype:
            raise SceneError(
                f"its array {header.path} is {header.dtype.name}; planned was {asset.dtype}"
            )
        needed = {**self._fixed, **({band: max(p for _, p in members)} if band else {})}
        for dim, index in needed.items():
            if not 0 <= index < lengths[dim]:
                raise SceneError(
                    f"its array {header.path} has {lengths[dim]} positions along {dim}; planned was "
                    f"position {index}"
                )


def _plane_axes(
    file: ArrayFile, header: ArrayHeader, fixed: dict[str, int], band_dim: str | None
) -> tuple[str | None, str, str]:
    """Band, y and x dimension of an array whose other dimensions are fixed."""
    axes = find_axes(file, header)
    planned = {*fixed, band_dim} - {None}
    if axes is None or set(header.dims) != planned | {axes.y, axes.x}:
        raise SceneError(
            f"its array {header.path} has dimensions {', '.join(header.dims)}; planned were y and x, "
            f"{', '.join([*fixed, *([band_dim] if band_dim else [])]) or 'nothing else'}"
        )
    return band_dim, axes.y, axes.x


def _overlap(
    part: _Part, shape: tuple[int, ...], window: Window
) -> tuple[slice, slice, slice, slice]:
    """Rows and columns that a block and a window share, in the window and in the block."""
    top = max(part.top, window.top)
    left = max(part.left, window.left)
    bottom = min(part.top + shape[0], window.top + window.height)
    right = min(part.left + shape[1], window.left + window.width)
    return (
        slice(top - window.top, bottom - window.top),
        slice(left - window.left, right - window.left),
        slice(top - part.top, bottom - part.top),
        slice(left - part.left, right - part.left),
    )


def _inside(part: _Part, shape: tuple[int, ...], window: Window) -> bool:
    """Whether a window has all of a block, so that no other window will need it."""
    _, _, rows, cols = _overlap(part, shape, window)
    return rows == slice(0, shape[0]) and cols == slice(0, shape[1])


class _Cache:
    """The blocks used last, up to a number of bytes."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._bytes = 0

    def get(self, key: Any) -> np.ndarray | None:
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def keep(self, key: Any, block: np.ndarray) -> None:
        self._blocks[key] = block
        self._bytes += block.nbytes
        while self._bytes > _CACHE_BYTES and len(self._blocks) > 1:
            _, oldest = self._blocks.popitem(last=False)
            self._bytes -= oldest.nbytes


def _opener(href: str, access: Access) -> AbstractContextManager[ArrayFile]:
    if not is_netcdf(href):
        return nullcontext(ZarrFile(href, access))
    if not (is_url(href) or Path(href).is_file()):
        raise SceneError(f"is {'no regular file' if Path(href).exists() else 'not there'}")
    with opened(href, access) as file:
        magic = file.read(0, 8)
    if magic == b"\x89HDF\r\n\x1a\n":
        return open_hdf5(href, access)
    if magic[:4] in (b"CDF\x01", b"CDF\x02"):
        return open_netcdf3(href, access)
    raise SceneError("is no netCDF file (HDF5, classic or 64-bit offset) by its first bytes")
