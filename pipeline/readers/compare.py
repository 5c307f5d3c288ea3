"""Files against what a catalogue says of them: headers, and checksums.

A catalogue that states everything is believed while planning, and checked when its files are opened.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
from rasterio.crs import CRS

from pipeline.errors import SceneError
from pipeline.fetch.files import opened
from pipeline.locations import reason_of
from pipeline.readers.rasters import RasterHeader
from pipeline.scenes import Access, Asset, Grid, Plane, Transform

TOLERANCE_PX = 1e-6
_RELATIVE_TOLERANCE = 1e-6
_PIECE_BYTES = 4 * 2**20
# Multihash: code of the function and length of the digest, both as in the multiformats table.
_MULTIHASHES = {"1114": "sha1", "1220": "sha256", "1340": "sha512", "d50110": "md5"}


def compare_header(asset: Asset, header: RasterHeader) -> None:
    """Raise SceneError, with both values, where a file's header contradicts its catalogue.

    Compared are size, CRS, transform (to 1e-6 px at every corner), type, the bands' numbers, and per
    band nodata, scale and offset. Nodata, scale or offset that only one of the two states is no
    contradiction: catalogues and files both leave them out, and the one that is there counts.
    """
    _compare_grids(asset.grid, header.grid)
    if np.dtype(asset.dtype) != np.dtype(header.dtype):
        raise _contradiction("type", header.dtype, asset.dtype)
    for plane in asset.planes:
        number = int(plane.key)
        if number >= header.num_bands:
            raise SceneError(
                f"has {header.num_bands} bands in its file; its catalogue says that {plane.band!r} is "
                f"number {number + 1}"
            )
        _compare_band(plane, header, number)


def verify_checksum(href: str, multihash_hex: str, access: Access) -> None:
    """Raise SceneError unless the file has this multihash (sha1, sha2-256, sha2-512 or md5, in hex).

    Reads all of it, 4 MiB at a time.
    """
    given = multihash_hex.lower()
    prefix = next((p for p in _MULTIHASHES if given.startswith(p)), None)
    name = _MULTIHASHES[prefix] if prefix else ""
    if not prefix or len(given) != len(prefix) + 2 * hashlib.new(name, b"").digest_size:
        raise SceneError(
            f"has the checksum {given[:24]!r}..., which is no known multihash; expected hex digits that "
            f"begin with one of {', '.join(f'{code} ({what})' for code, what in _MULTIHASHES.items())}"
        )
    found = prefix + _digest(href, name, access)
    if found != given:
        raise _contradiction("checksum", found, given)


def same_crs(one: str | None, other: str | None) -> bool:
    """Whether two systems in the form of `pipeline.georef.canonical_crs` are the same."""
    if one is None or other is None:
        return one is other
    return one == other or _same_systems(one, other)


def same_transform(one: Transform, other: Transform, height: int, width: int) -> bool:
    """Whether two transforms put every corner of a grid at most 1e-6 px apart."""
    a, b, _, d, e, _ = one
    pixel = min(math.hypot(a, d), math.hypot(b, e))
    for col, row in ((0, 0), (width, 0), (0, height), (width, height)):
        x, y = (
            (one[i] - other[i]) * col + (one[i + 1] - other[i + 1]) * row + one[i + 2] - other[i + 2]
            for i in (0, 3)
        )  # fmt: skip
        if not math.hypot(x, y) <= TOLERANCE_PX * pixel:
            return False
    return True


def _compare_grids(stated: Grid, found: Grid) -> None:
    if (stated.height, stated.width) != (found.height, found.width):
        raise _contradiction(
            "size", f"{found.height} x {found.width} px", f"{stated.height} x {stated.width} px"
        )
    if not same_crs(stated.crs, found.crs):
        raise _contradiction("CRS", f"{found.crs or 'none':.80}", f"{stated.crs or 'none':.80}")
    if stated.transform is None or found.transform is None:
        agree = stated.transform is found.transform
    else:
        agree = same_transform(found.transform, stated.transform, found.height, found.width)
    if not agree:
        raise _contradiction("transform", found.transform, stated.transform)


def _compare_band(plane: Plane, header: RasterHeader, number: int) -> None:
    nodata = header.nodata[number]
    if not (plane.nodata is None or nodata is None or _same_nodata(plane.nodata, nodata, header)):
        raise _contradiction(f"nodata of band {plane.band!r}", nodata, plane.nodata)
    for what, stated, found in (
        ("scale", plane.scale, header.scales[number]),
        ("offset", plane.offset, header.offsets[number]),
    ):
        if None not in (stated, found) and not _close(stated, found):
            raise _contradiction(f"{what} of band {plane.band!r}", found, stated)


def _same_nodata(stated: float, found: float, header: RasterHeader) -> bool:
    """Equal as numbers, or as numbers of a float32 file; NaN equals NaN."""
    if math.isnan(stated) or math.isnan(found):
        return math.isnan(stated) and math.isnan(found)
    if header.dtype != "float32":
        return stated == found
    with np.errstate(over="ignore"):
        return bool(np.float32(stated) == np.float32(found))


def _close(stated: float | None, found: float | None) -> bool:
    assert stated is not None
    assert found is not None
    return math.isclose(stated, found, rel_tol=_RELATIVE_TOLERANCE)


@lru_cache(maxsize=4096)
def _same_systems(one: str, other: str) -> bool:
    return bool(CRS.from_user_input(one) == CRS.from_user_input(other))


def _digest(href: str, name: str, access: Access) -> str:
    # Broken files are looked for, not attackers.
    digest = hashlib.new(name, usedforsecurity=False)
    try:
        with opened(href, access) as file:
            for start in range(0, file.size, _PIECE_BYTES):
                digest.update(file.read(start, _PIECE_BYTES))
    except OSError as error:
        raise SceneError(f"{href} cannot be read: {reason_of(error)}") from None
    return digest.hexdigest()


def _contradiction(what: str, found: object, stated: object) -> SceneError:
    return SceneError(f"has {what} {found} in its file, {stated} in its catalogue")
