"""Raster files through GDAL: headers, and windows of pixels.

Files are untrusted. A file is opened by the driver its suffix names and by no other, nothing outside
the roots the user named is followed, and the header is checked before any pixel is read.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterWindow

from pipeline.errors import SceneError
from pipeline.fetch.files import LocalFile, OpenFile, RemoteFile, refuse_special_file
from pipeline.fetch.retries import on_disk
from pipeline.georef import canonical_crs
from pipeline.locations import check_allowed, is_url
from pipeline.readers.gates import check_jpeg, check_tiff, refuse_many_bands
from pipeline.readers.gdal_files import RAW_BYTES, opened_through
from pipeline.scenes import Access, Asset, Grid, Window

DRIVERS = {
    ".tif": "GTiff",
    ".tiff": "GTiff",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".jp2": "JP2OpenJPEG",
}
SUFFIXES = tuple(DRIVERS)
# What a damaged file makes rasterio raise: not all of GDAL's errors reach it in errors of its own.
_RASTER_ERRORS = (RasterioError, CRSError, CPLE_BaseError, OSError, UnicodeError, MemoryError)
# GDAL's own cache holds the blocks that neighbouring windows share; its default is 5 % of the host.
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 128 * 2**20,
    "GDAL_NUM_THREADS": "1",
    # Sidecars (.aux.xml, .msk, .tfw) may lead to other files and drivers: only the file itself counts.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_MAX_RAW_BLOCK_CACHE_SIZE": RAW_BYTES,
}

_MADE_UP = re.compile(r"/vsiriopener_[0-9a-f]+/")
_Opened = tuple[DatasetReader, Callable[[], None]]

logging.getLogger("rasterio").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class RasterHeader:
    """What a raster file says of itself. `nodata`, `scales`, `offsets` and `descriptions` have one entry
    per band; scale and offset are None where the file states none."""

    grid: Grid
    dtype: str
    nodata: tuple[float | None, ...]
    scales: tuple[float | None, ...]
    offsets: tuple[float | None, ...]
    descriptions: tuple[str | None, ...]
    block_shape: tuple[int, int]
    tags: dict[str, str]

    @property
    def num_bands(self) -> int:
        return len(self.nodata)


def read_header(href: str, access: Access) -> RasterHeader:
    """Header of a raster; SceneError if it cannot be opened or must not be read."""
    check_allowed(href, access)
    _check_before_opening(href, _driver(href, access), access)
    with open_raster(href, access) as raster:
        types = set(raster.dtypes)
        if len(types) != 1:
            raise SceneError(f"its bands have several types {sorted(types)}; expected one")
        (dtype,) = types
        refuse_many_bands(raster.count)
        # GDAL has complex types that NumPy has no name for.
        if not dtype.startswith(("uint", "int", "float")):
            raise SceneError(f"its pixels are {dtype}; expected real numbers")
        _refuse_large_blocks(raster, np.dtype(dtype).itemsize, access.max_block_bytes)
        stated = [pair != (1.0, 0.0) for pair in zip(raster.scales, raster.offsets, strict=True)]
        rows, cols = raster.block_shapes[0]
        return RasterHeader(
            grid=_grid(raster),
            dtype=dtype,
            nodata=tuple(raster.nodatavals),
            scales=tuple(
                s if says else None for s, says in zip(raster.scales, stated, strict=True)
            ),
            offsets=tuple(
                o if says else None for o, says in zip(raster.offsets, stated, strict=True)
            ),
            descriptions=tuple(raster.descriptions),
            block_shape=(rows, cols),
            tags=dict(raster.tags()),
        )


def _check_before_opening(href: str, driver: str, access: Access) -> None:
    # What is not there, GDAL says in its own words.
    if is_url(href) or not Path(href).exists():
        return

    def check() -> None:
        refuse_special_file(href)
        if driver == "GTiff":
            check_tiff(href, access.max_block_bytes)
        elif driver == "JPEG":
            check_jpeg(href, access.max_block_bytes)

    with _raster_errors():
        on_disk(check, href, access.retries)


@contextmanager
def open_raster(href: str, access: Access) -> Iterator[DatasetReader]:
    """A raster, by an allowed driver only; every failure inside becomes a SceneError.

    A remote one is read through `pipeline.fetch`, and so is a local one that GDAL cannot open: if a disk
    or network file system only failed for a moment, it opens then.
    """
    with _opened(href, access) as (raster, _):
        yield raster


@contextmanager
def open_raster_asset(asset: Asset, access: Access) -> Iterator["RasterReader"]:
    """A reader of an asset on its own grid; SceneError where the file is not as planned."""
    bands = tuple(int(plane.key) + 1 for plane in asset.planes)
    with ExitStack() as stack:
        raster, check = stack.enter_context(_opened(asset.href, access))

        def again() -> _Opened:
            return stack.enter_context(_opened(asset.href, access, through_files=True))

        yield RasterReader(raster, bands, check, None if is_url(asset.href) else again)


@contextmanager
def _opened(href: str, access: Access, through_files: bool = False) -> Iterator[_Opened]:
    """A raster, and what raises the failure of a read that GDAL may have taken for something else."""
    check_allowed(href, access)
    driver = _driver(href, access)
    with ExitStack() as stack:
        stack.enter_context(_raster_errors())
        stack.enter_context(rasterio.Env(**GDAL_OPTIONS))
        stack.enter_context(warnings.catch_warnings())
        # A scene without georeference is legitimate; its header says so.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        native = None
        if not is_url(href) and not through_files:
            native = _native(href, driver)
        if native is not None:
            yield stack.enter_context(native), _nothing_else
        else:
            file = _file(href, access, stack)
            raster, files = stack.enter_context(opened_through(_name(href), file, driver))
            yield raster, files.check


def _native(href: str, driver: str) -> DatasetReader | None:
    """A local raster as GDAL opens it by itself; None where it cannot, though there is a file."""
    try:
        return rasterio.open(href, driver=driver)
    except _RASTER_ERRORS:
        if not Path(href).is_file():
            raise
        return None


def _file(href: str, access: Access, stack: ExitStack) -> OpenFile:
    if is_url(href):
        return RemoteFile(href, access)
    return stack.enter_context(closing(LocalFile(href, access)))


def _name(href: str) -> str:
    """What GDAL calls a file that it does not open itself: a local one by its path, for messages."""
    return PurePosixPath(urlsplit(href).path).name if is_url(href) else href


def _nothing_else() -> None:
    """GDAL itself says everything there is to say."""


@contextmanager
def _raster_errors() -> Iterator[None]:
    try:
        yield
    except _RASTER_ERRORS as error:
        raise SceneError(_reason(error)) from None


class RasterReader:
    """Windows of some bands (1-based) of an open raster.

    `check` raises what came of a read that GDAL may have taken for something else. A read that fails is
    tried once more on the raster that `again` opens, afresh and so that the system's errors show.
    """

    def __init__(
        self,
        raster: Any,
        bands: tuple[int, ...],
        check: Callable[[], None] = _nothing_else,
        again: Callable[[], _Opened] | None = None,
    ) -> None:
        self._raster, self._bands = raster, list(bands)
        self._check, self._again = check, again
        flags = {flag for band in raster.mask_flag_enums for flag in band}
        # GDAL marks the fourth band of any uint8 file as alpha: one that is read as data is no mask.
        alpha = {
            band for band, kind in enumerate(raster.colorinterp, 1) if kind == ColorInterp.alpha
        }
        by_alpha = MaskFlags.alpha in flags
        self._masked = not alpha & set(bands) if by_alpha else MaskFlags.per_dataset in flags

    def read(self, window: Window) -> np.ndarray:
        part = _raster_window(window)
        return self._sure(lambda: self._raster.read(self._bands, window=part))

    def readable(self, window: Window) -> np.ndarray | None:
        if not self._masked:
            return None
        part = _raster_window(window)
        return self._sure(lambda: self._raster.dataset_mask(window=part)) != 0

    def _sure(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            numbers = read()
        except _RASTER_ERRORS:
            self._check()
            if self._again is None:
                raise
            (self._raster, self._check), self._again = self._again(), None
            return self._sure(read)
        self._check()
        return numbers


def _raster_window(window: Window) -> RasterWindow:
    return RasterWindow(window.left, window.top, window.width, window.height)


def _driver(href: str, access: Access) -> str:
    name = urlsplit(href).path if is_url(href) else href
    suffix = PurePosixPath(name).suffix.lower()
    driver = DRIVERS.get(suffix)
    if driver is None:
        raise SceneError(f"ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if driver not in access.drivers:
        raise SceneError(
            f"is a {suffix} file, which decodes very slowly; set run.jpeg2000 to read it anyway"
        )
    return driver


def _grid(raster: DatasetReader) -> Grid:
    if raster.crs is None:
        return Grid(raster.height, raster.width, None, None)
    a, b, c, d, e, f = tuple(raster.transform)[:6]
    return Grid(raster.height, raster.width, canonical_crs(raster.crs.to_wkt()), (a, b, c, d, e, f))


def _refuse_large_blocks(raster: DatasetReader, itemsize: int, max_block_bytes: int) -> None:
    """A few kB of file can hold one block that decodes to gigabytes."""
    interleaved = raster.count if raster.profile.get("interleave") == "pixel" else 1
    rows, cols = raster.block_shapes[0]
    block_bytes = rows * cols * interleaved * itemsize
    if block_bytes > max_block_bytes:
        raise SceneError(
            f"one block of it decodes to {block_bytes} bytes ({rows} x {cols} px), more than "
            f"run.max_block_bytes {max_block_bytes}; raise that, or rewrite the scene in smaller blocks"
        )


def _reason(error: Exception) -> str:
    """The innermost message of a raster error, on one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file"
    # Files that GDAL does not open itself have names of rasterio's making in front of their own.
    text = _MADE_UP.sub("", " ".join(str(error).split()))
    if text.endswith("not recognized as being in a supported file format."):
        return f"{text.rstrip('.')}; it is damaged or of another kind than its name says"
    if text.startswith("TIFF") or "IReadBlock failed" in text:
        return f"its pixels cannot be read, so it is damaged: {text}; copy it again"
    return text or type(error).__name__
