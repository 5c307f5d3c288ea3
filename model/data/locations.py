"""Where tiles lie on Earth, from the footprints in a store's manifest."""

import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.errors import IntegrityError

_POLYGON, _MULTIPOLYGON = 3, 6
# Byte order, type, number of rings, number of points in the first.
_HEADER = struct.Struct("<BIII")


def centres(footprints: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64 [tile, 2]: (latitude, longitude) in degrees of the centroids of footprints; NaN without one.

    `footprints` are WKB (multi)polygons in longitude and latitude, as in the manifest. Longitudes are in
    -180 ... 180, and a tile cut at the antimeridian has its centre near it. Around a pole, where a tile has
    every longitude, that of the centre means nothing. Raises IntegrityError for anything else.
    """
    contents = footprints.to_pylist()
    lengths = np.array([-1 if content is None else len(content) for content in contents])
    found = np.full((len(contents), 2), np.nan)
    for length in np.unique(lengths[lengths >= 0]).tolist():
        at = np.flatnonzero(lengths == length)
        found[at] = _centres_of_one_length([contents[tile] for tile in at.tolist()])
    return found


def _centres_of_one_length(contents: list[bytes]) -> np.ndarray:
    """[tile, (latitude, longitude)] of footprints of equally many bytes: nearly all have the same form."""
    length = len(contents[0])
    points = max(length - _HEADER.size, 0) // 16
    header = np.frombuffer(_HEADER.pack(1, _POLYGON, 1, points), np.uint8)
    each = np.frombuffer(b"".join(contents), np.uint8).reshape(len(contents), length)
    rings = each[:, _HEADER.size :]
    if points < 4 or rings.shape[1] % 16 or not (each[:, : _HEADER.size] == header).all():
        return np.array([_centre(content) for content in contents])
    outlines = np.ascontiguousarray(rings).view("<f8").reshape(-1, points, 2)
    return _centroids(outlines)[1][:, ::-1]


def _centre(content: bytes) -> tuple[float, float]:
    """(latitude, longitude) of a footprint of any form."""
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
    areas, points = zip(*(_centroids(outline[None]) for outline in outlines), strict=True)
    lon, lat = np.average(np.concatenate(points), axis=0, weights=np.concatenate(areas))
    return float(lat), float((lon + 180) % 360 - 180)


def _centroids(rings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas [n] and centroids [n, 2] of closed rings [n, point, 2]; without area the mean of its points."""
    origins = rings[:, :1]
    x, y = np.moveaxis(rings - origins, 2, 0)
    cross = x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]
    areas = cross.sum(1) / 2
    flat = areas == 0
    moments = [((axis[:, :-1] + axis[:, 1:]) * cross).sum(1) for axis in (x, y)]
    middles = np.stack(moments, axis=1) / np.where(flat, 1, 6 * areas)[:, None] + origins[:, 0]
    middles[flat] = rings[flat].mean(1)
    return np.where(flat, np.finfo(float).tiny, np.abs(areas)), middles


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
