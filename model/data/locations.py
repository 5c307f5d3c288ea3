"""Where tiles lie on Earth, from the footprints in a store's manifest."""

import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.errors import IntegrityError

_POLYGON, _MULTIPOLYGON = 3, 6


def centres(footprints: pa.Array) -> np.ndarray:
    """float64 [tile, 2]: (latitude, longitude) in degrees of the centroids of footprints; NaN without one.

    `footprints` are WKB (multi)polygons in longitude and latitude, as in the manifest. Longitudes are in
    -180 ... 180, and a tile cut at the antimeridian has its centre near it. Around a pole, where a tile has
    every longitude, that of the centre means nothing. Raises IntegrityError for anything else.
    """
    found = np.full((len(footprints), 2), np.nan)
    for tile, content in enumerate(footprints.to_pylist()):
        if content is not None:
            found[tile] = _centre(content)
    return found


def _centre(content: bytes) -> tuple[float, float]:
    try:
        outlines = list(_outlines(content))
    except (struct.error, ValueError) as error:
        raise IntegrityError(
            f"the manifest has a footprint that is no WKB polygon ({error}); the store is damaged; "
            "`aptile verify` says what else is"
        ) from None
    west, east = (f([f(lonlat[:, 0]) for lonlat in outlines]) for f in (min, max))
    if len(outlines) > 1 and east - west > 180:
        # The parts on either side of the antimeridian, brought together.
        outlines = [np.column_stack([xy[:, 0] % 360, xy[:, 1]]) for xy in outlines]
    areas, points = zip(*map(_centroid, outlines), strict=True)
    lon, lat = np.average(points, axis=0, weights=areas)
    return float(lat), float((lon + 180) % 360 - 180)


def _centroid(outline: np.ndarray) -> tuple[float, np.ndarray]:
    """Area and centroid of a closed ring [n, 2]; of one without area the mean of its points."""
    origin = outline[0]
    x, y = (outline - origin).T
    cross = x[:-1] * y[1:] - x[1:] * y[:-1]
    area = cross.sum() / 2
    if area == 0:
        return np.finfo(float).tiny, outline.mean(0)
    middle = [(axis[:-1] + axis[1:]) @ cross / (6 * area) for axis in (x, y)]
    return abs(area), origin + middle


def _outlines(content: bytes) -> Iterator[np.ndarray]:
    """Outer rings float64 [point, (longitude, latitude)] of a WKB polygon or multipolygon."""
    kind, at = _begin(content, 0)
    if kind == _POLYGON:
        yield _ring(content, 0)[0]
    elif kind == _MULTIPOLYGON:
        (number,) = struct.unpack_from(_order(content, 0) + "I", content, at)
        if not number:
            raise ValueError("no polygon")
        at += 4
        for _ in range(number):
            outline, at = _ring(content, at)
            yield outline
    else:
        raise ValueError(f"geometry type {kind}")


def _ring(content: bytes, at: int) -> tuple[np.ndarray, int]:
    """The outer ring of the polygon that begins at a byte, and where that polygon ends."""
    order = _order(content, at)
    kind, at = _begin(content, at)
    if kind != _POLYGON:
        raise ValueError(f"geometry type {kind} in a multipolygon")
    (rings,) = struct.unpack_from(order + "I", content, at)
    at += 4
    outer = np.empty((0, 2))
    for ring in range(rings):
        (points,) = struct.unpack_from(order + "I", content, at)
        if not ring:
            outer = np.frombuffer(content, order + "f8", 2 * points, at + 4).reshape(-1, 2)
        at += 4 + 16 * points
    if len(outer) < 4:
        raise ValueError(f"a ring of {len(outer)} points")
    return outer, at


def _begin(content: bytes, at: int) -> tuple[int, int]:
    """Geometry type of what begins at a byte, and where its content begins."""
    (kind,) = struct.unpack_from(_order(content, at) + "I", content, at + 1)
    return kind, at + 5


def _order(content: bytes, at: int) -> str:
    """Byte order, as `struct` writes it."""
    return "<" if content[at : at + 1] == b"\x01" else ">"
