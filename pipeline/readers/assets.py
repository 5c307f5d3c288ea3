"""Opening any asset for reading by window, once it is what was planned."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

from pipeline.errors import SceneError
from pipeline.fetch.files import fingerprint
from pipeline.locations import check_allowed, is_url
from pipeline.readers.base import AssetReader
from pipeline.readers.compare import compare_header, verify_checksum
from pipeline.readers.rasters import RasterHeader, open_raster_asset, read_header
from pipeline.readers.warp import open_warped_asset
from pipeline.scenes import Access, Asset


@contextmanager
def open_asset(asset: Asset, access: Access) -> Iterator[tuple[Asset, AssetReader]]:
    """The asset with what its file says beyond its catalogue, and a reader on its `shown_grid`.

    Every failure becomes a SceneError: a file that is gone, cannot be opened, changed since it was
    planned, or contradicts what its catalogue states of grid, type, nodata or checksum.
    """
    if asset.kind == "raster":
        asset = _confirmed(asset, access)
    opener = open_warped_asset if asset.warp_onto is not None else _open_plain
    with opener(asset, access) as reader:
        yield asset, reader


@contextmanager
def _open_plain(asset: Asset, access: Access) -> Iterator[AssetReader]:
    if asset.kind == "raster":
        with open_raster_asset(asset, access) as raster:
            yield raster
    else:
        from pipeline.readers.arrays import open_array_asset  # xarray is an extra

        with open_array_asset(asset, access) as array:
            yield array


def _confirmed(asset: Asset, access: Access) -> Asset:
    check_allowed(asset.href, access)
    if asset.checksum is not None:
        _verified(asset.href, asset.fingerprint, asset.checksum, access)
    if asset.header_seen and not is_url(asset.href):
        if _changed(asset, access):
            raise SceneError(
                f"{asset.href} was changed since the job was planned; run the command again"
            )
        return asset
    header = read_header(asset.href, access)
    compare_header(asset, header)
    return asset if asset.header_seen else _completed(asset, header)


def _completed(asset: Asset, header: RasterHeader) -> Asset:
    """With the nodata of the file where the catalogue states none. An offset that only the file states
    comes too late: numbers were harmonised without it."""
    planes = []
    for plane in asset.planes:
        number = int(plane.key)
        if plane.offset is None and header.offsets[number]:
            raise SceneError(
                f"{asset.href} states offset {header.offsets[number]:g} for {plane.band}, its catalogue "
                "none; state it there"
            )
        nodata = header.nodata[number] if plane.nodata is None else plane.nodata
        planes.append(replace(plane, nodata=nodata))
    return replace(asset, planes=tuple(planes))


def _changed(asset: Asset, access: Access) -> bool:
    try:
        return fingerprint(asset.href, access) != asset.fingerprint
    except OSError as error:
        raise SceneError(f"{asset.href} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1024)
def _verified(href: str, version: str, checksum: str, access: Access) -> None:
    """Verify a checksum once per process: it takes reading the whole file."""
    del version
    verify_checksum(href, checksum, access)
