"""Raster files through GDAL: headers, and windows of pixels.

Files are untrusted. A file is opened by the driver its suffix names and by no other, nothing outside
the roots the user named is followed, and the header is checked before any pixel is read.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipeline.georef import canonical_crs
from pipeline.locations import check_allowed, is_url, signed
from pipeline.readers.gates import check_jpeg, check_tiff, refuse_many_bands, refuse_special_file
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
    # A server that does not answer, or sends nothing any more, is not waited for without end.
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_LOW_SPEED_TIME": "60",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
}

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
    _check_before_opening(href, _driver(href, access), access.max_block_bytes)
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


def _check_before_opening(href: str, driver: str, budget: int) -> None:
    # What is not there, GDAL says in its own words.
    if is_url(href) or not Path(href).exists():
        return
    with _raster_errors():
        refuse_special_file(href)
        if driver == "GTiff":
            check_tiff(href, budget)
        elif driver == "JPEG":
            check_jpeg(href, budget)


@contextmanager
def open_raster(href: str, access: Access) -> Iterator[DatasetReader]:
    """A raster, by an allowed driver only; every failure inside becomes a SceneError."""
    check_allowed(href, access)
    driver = _driver(href, access)
    with _raster_errors(), rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
        # A scene without georeference is legitimate; its header says so.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(signed(href, access), driver=driver) as raster:
            yield raster


@contextmanager
def _raster_errors() -> Iterator[None]:
    try:
        yield
    except _RASTER_ERRORS as error:
        raise SceneError(_reason(error)) from None


@contextmanager
def open_raster_asset(asset: Asset, access: Access) -> Iterator["RasterReader"]:
    """A reader of an asset on its own grid; SceneError where the file is not as planned."""
    with open_raster(asset.href, access) as raster:
        yield RasterReader(raster, tuple(int(plane.key) + 1 for plane in asset.planes))


class RasterReader:
    """Windows of some bands (1-based) of an open raster."""

    def __init__(self, raster: Any, bands: tuple[int, ...]) -> None:
        self._raster, self._bands = raster, list(bands)
        flags = {flag for band in raster.mask_flag_enums for flag in band}
        # GDAL marks the fourth band of any uint8 file as alpha: one that is read as data is no mask.
        alpha = {
            band for band, kind in enumerate(raster.colorinterp, 1) if kind == ColorInterp.alpha
        }
        by_alpha = MaskFlags.alpha in flags
        self._masked = not alpha & set(bands) if by_alpha else MaskFlags.per_dataset in flags

    def read(self, window: Window) -> np.ndarray:
        return self._raster.read(self._bands, window=_raster_window(window))

    def readable(self, window: Window) -> np.ndarray | None:
        if not self._masked:
            return None
        return self._raster.dataset_mask(window=_raster_window(window)) != 0


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
    text = " ".join(str(error).split())
    if text.endswith("not recognized as being in a supported file format."):
        return f"{text.rstrip('.')}; it is damaged or of another kind than its name says"
    if text.startswith("TIFF") or "IReadBlock failed" in text:
        return f"its pixels cannot be read, so it is damaged: {text}; copy it again"
    return text or type(error).__name__
