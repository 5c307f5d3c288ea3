"""Footprints of tiles: polygons in longitude and latitude that are right at the antimeridian and poles.

A tile's outline is straight in its grid's CRS and curved in longitude and latitude. Each side is halved
until the chords between its points lie within `MAX_ERROR_PX` of the curve, so that most tiles have four
corners and large ones more. Going round the outline, longitudes are unrolled: 179, 181, not 179, -179.
What reaches beyond +-180 is then cut there into parts (RFC 7946, section 3.1.9). An outline that turns
once around the Earth has a pole inside; it is closed along that pole, as is one with a corner on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import rasterio.warp
import shapely
from rasterio._err import CPLE_BaseError, CPLE_NotSupportedError
from rasterio.crs import CRS

from pipeline.errors import SceneError
from pipeline.scenes import Grid

LONLAT = "OGC:CRS84"
MAX_ERROR_PX = 0.01
# Chords are not cut below half a pixel nor beyond this number per side; only sides that just miss a pole
# need so many.
MAX_SEGMENTS = 1024
_POLAR_LATITUDE = 80
# Points at once: about 40 MB.
_BATCH_POINTS = 2**19
# Degrees: what rounding makes of a point on the antimeridian (0.1 mm) and on a pole (1 um).
_ROUNDING = 1e-9
_POLE_ROUNDING = 1e-11
_POLYGONAL = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
_WORLD = (-180.0, -90.0, 180.0, 90.0)


@dataclass(frozen=True)
class Footprints:
    """Where tiles lie: the part of each inside its grid.

    `geometry` holds WKB in longitude and latitude (OGC:CRS84), rings counter-clockwise: a Polygon, or a
    MultiPolygon for a tile cut at the antimeridian. It is None where part of the outline has no longitude
    and latitude: beyond the edge of the Earth in a geostationary image, in a CRS that is not tied to the
    Earth, or without a CRS.
    `bounds` float64 [tile, (xmin, ymin, xmax, ymax)] are in the CRS; NaN without one.
    `lonlat_box` float64 [tile, (west, south, east, north)] encloses the tile, in degrees; west > east
    where it crosses the antimeridian; (-180, 180) with latitude +-90 around a pole; NaN without geometry.
    """

    geometry: list[bytes | None]
    bounds: np.ndarray
    lonlat_box: np.ndarray


@dataclass(frozen=True)
class _Tiles:
    """Tiles of grids in one CRS: `affine` [tile, 6] as in `Grid.transform`; `rects` float64 [tile, (left,
    top, right, bottom)] in px of their grid, cut to it."""

    crs: str
    affine: np.ndarray
    rects: np.ndarray

    def __getitem__(self, index: np.ndarray) -> "_Tiles":
        return _Tiles(self.crs, self.affine[index], self.rects[index])

    def native(self, pixels: np.ndarray) -> np.ndarray:
        """Coordinates in the CRS of positions [tile, point, (col, row)]."""
        a, b, c, d, e, f = self.affine.T[..., None]
        cols, rows = pixels[..., 0], pixels[..., 1]
        return np.stack([a * cols + b * rows + c, d * cols + e * rows + f], axis=-1)

    def lonlat(self, pixels: np.ndarray) -> np.ndarray:
        """Longitude and latitude of positions [tile, point, (col, row)]; see `transformed`."""
        points, system = self.native(pixels), CRS.from_user_input(self.crs)
        if system.is_geographic:
            # Pixels centred on a pole reach beyond it.
            pole = np.pi / 2 / system.units_factor[1]
            points[..., 1] = np.clip(points[..., 1], -pole, pole)
        return transformed(self.crs, LONLAT, points)


def footprints(grid: Grid, rows: np.ndarray, cols: np.ndarray, tile_px: int) -> Footprints | None:
    """Footprints of the tiles [tile] at `rows`, `cols` of a grid; None for a grid without a CRS.

    Outlines are exact to `MAX_ERROR_PX`; where they just miss a pole, to a pixel.
    Raises SceneError if the CRS is tied to the Earth and yet no tile has a longitude and latitude.
    """
    if grid.crs is None or grid.transform is None:
        return None
    found = many_footprints([grid], np.zeros(len(rows), np.int64), rows, cols, tile_px)
    if found.geometry and not any(found.geometry) and _on_earth(grid.crs):
        raise SceneError(
            f"lies outside the domain of its CRS ({grid.in_words()}): no tile has a longitude and "
            "latitude; correct the file's CRS or transform"
        )
    return found


def many_footprints(
    grids: Sequence[Grid], which: np.ndarray, rows: np.ndarray, cols: np.ndarray, tile_px: int
) -> Footprints:
    """Footprints of the tiles [tile] at `rows`, `cols` of the grids number `which`, as in `footprints`.

    All grids of a CRS are worked on together: much faster than one by one. Tiles of a grid without a CRS
    have no geometry and NaN in `bounds` and `lonlat_box`; no grid is an error.
    """
    which = np.asarray(which, np.int64)
    affine = np.array([grid.transform or (np.nan,) * 6 for grid in grids]).reshape(-1, 6)[which]
    sizes = np.array([(grid.width, grid.height) for grid in grids]).reshape(-1, 2)[which]
    rects = _rectangles(sizes, rows, cols, tile_px)
    systems = [grid.crs if grid.transform else None for grid in grids]
    number = {crs: position for position, crs in enumerate(dict.fromkeys(systems))}
    system = np.array([number[crs] for crs in systems], np.int64)[which]
    geometry = np.full(len(which), None, dtype=object)
    bounds, boxes = np.full((2, len(which), 4), np.nan)
    for crs, position in number.items():
        if crs is not None:
            of_crs = np.flatnonzero(system == position)
            tiles = _Tiles(crs, affine[of_crs], rects[of_crs])
            corners = tiles.native(_along_sides(tiles.rects, 1))
            bounds[of_crs] = np.concatenate([corners.min(1), corners.max(1)], axis=1)
            for batch in _batches(np.arange(len(of_crs)), 1):
                geometry[of_crs[batch]], boxes[of_crs[batch]] = _described(tiles[batch])
    return Footprints(geometry.tolist(), bounds, boxes)


def transformed(source: str, target: str, points: np.ndarray) -> np.ndarray:
    """Points [group, point, (x, y)] of one CRS in another; not finite, by groups, where there is no result.

    The library refuses all points of a call when one is outside the projection's domain, so calls are
    halved until those groups are alone. Geographic systems have longitude first, in their own units.
    Raises the library's CPLE_NotSupportedError for systems of different celestial bodies, or of none.
    """
    try:
        flat = rasterio.warp.transform(source, target, *points.reshape(-1, 2).T)
        return np.stack(flat, axis=1).reshape(points.shape)
    except CPLE_NotSupportedError:
        raise
    except CPLE_BaseError:
        half = len(points) // 2
        if half == 0:
            return np.full(points.shape, np.nan)
        parts = [transformed(source, target, part) for part in (points[:half], points[half:])]
        return np.concatenate(parts)


def _on_earth(crs: str) -> bool:
    try:
        transformed(crs, LONLAT, np.zeros((1, 1, 2)))
    except CPLE_NotSupportedError:
        return False
    return True


def _rectangles(sizes: np.ndarray, rows: np.ndarray, cols: np.ndarray, tile_px: int) -> np.ndarray:
    """float64 [tile, (left, top, right, bottom)] in px, cut to grids of `sizes` [tile, (cols, rows)]."""
    corner = np.stack([cols, rows], axis=1).astype(np.float64) * tile_px
    return np.concatenate([corner, np.minimum(corner + tile_px, sizes)], axis=1)


def _described(tiles: _Tiles) -> tuple[np.ndarray, np.ndarray]:
    """WKB (object) [tile] and boxes [tile, 4]; None and NaN where there is none."""
    polygons = np.full(len(tiles.rects), None, dtype=object)
    boxes = np.full((len(tiles.rects), 4), np.nan)
    with suppress(CPLE_NotSupportedError):
        for index, samples, margin in _outlines(tiles):
            polygons[index], boxes[index] = _polygons(samples, margin)
    right = _plausible(tiles, polygons)
    polygons[right] = shapely.to_wkb(shapely.orient_polygons(polygons[right]))
    polygons[~right], boxes[~right] = None, np.nan
    return polygons, boxes


def _plausible(tiles: _Tiles, polygons: np.ndarray) -> np.ndarray:
    """bool [tile]: valid polygons around their tile's centre.

    Others come from outlines that leave the part of the plane where a projection is one to one.
    """
    known = np.isin(shapely.get_type_id(polygons), _POLYGONAL) & shapely.is_valid(polygons)
    known[known] = shapely.area(polygons[known]) > 0
    rects = tiles.rects[known]
    centres = tiles[known].lonlat((rects[:, None, :2] + rects[:, None, 2:]) / 2)[:, 0]
    known[known] = shapely.intersects_xy(polygons[known], _wrapped(centres[:, 0]), centres[:, 1])
    return known


def _outlines(tiles: _Tiles) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Outlines in groups of equally many points.

    Yields the tiles' indices, longitude and latitude [tile, point, 2] of every vertex of the outline and
    of the middle between it and the next, and by how many degrees [tile, 2] the curve may exceed them.
    """
    todo, segments = np.arange(len(tiles.rects)), 1
    while todo.size:
        rough = []
        for index in _batches(todo, segments):
            rects = tiles.rects[index]
            samples = tiles[index].lonlat(_along_sides(rects, 2 * segments))
            sides = np.tile(rects[:, 2:] - rects[:, :2], 2)
            known = np.isfinite(samples).all((1, 2))
            index, samples, sides = index[known], samples[known], sides[known]
            error, margin = _chord_errors(samples, np.repeat(sides / segments, segments, axis=1))
            finest = segments >= np.minimum(2 * sides.max(1), MAX_SEGMENTS)
            done = (error <= MAX_ERROR_PX) | finest
            yield index[done], samples[done], margin[done]
            rough.append(index[~done])
        todo, segments = np.concatenate(rough), 2 * segments


def _batches(tiles: np.ndarray, segments: int) -> list[np.ndarray]:
    """Tiles in groups that have a bounded number of points."""
    size = max(1, _BATCH_POINTS // (8 * segments))
    return [tiles[start : start + size] for start in range(0, len(tiles), size)]


def _along_sides(rects: np.ndarray, points_per_side: int) -> np.ndarray:
    """Pixel positions [tile, point, (col, row)] around each rectangle, clockwise from its top left."""
    step = np.arange(points_per_side) / points_per_side
    full, none = np.ones(points_per_side), np.zeros(points_per_side)
    across = np.concatenate([step, full, 1 - step, none])
    down = np.concatenate([none, step, full, 1 - step])
    low, high = rects[:, None, :2], rects[:, None, 2:]
    return low + (high - low) * np.stack([across, down], axis=1)


def _chord_errors(samples: np.ndarray, lengths_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far outlines lie from chords: px [tile], and degrees [tile, (longitude, latitude)].

    `samples` alternate between vertices and middles; `lengths_px` [tile, chord].
    """
    start, middle = samples[:, 0::2], samples[:, 1::2]
    end = np.roll(start, -1, axis=1)
    shrink = np.maximum(np.cos(np.radians(middle[..., 1])), 1e-12)
    turn = _wrapped(end[..., 0] - start[..., 0])
    aside = _wrapped(middle[..., 0] - start[..., 0]) - turn / 2
    chord = np.stack([turn * shrink, end[..., 1] - start[..., 1]])
    offset = np.stack([aside * shrink, middle[..., 1] - (start[..., 1] + end[..., 1]) / 2])
    length = np.maximum(np.hypot(*chord), 1e-300)
    # Only the distance across the chord counts: points may be denser at one end of it.
    across = np.abs(chord[0] * offset[1] - chord[1] * offset[0]) / length
    error = np.where(across < 1e-12, 0, across) / length * lengths_px
    # A chord of more than 180 degrees was taken the wrong way round.
    error[np.abs(aside) > 90] = np.inf
    meridian = _meridians(samples)
    error[meridian] = across[meridian] = 0
    margin = np.abs(np.stack([chord[1] / shrink, chord[0]])) / length * across
    return error.max(1), np.minimum(margin.max(2), 360).T


def _meridians(samples: np.ndarray) -> np.ndarray:
    """bool [tile, chord]: chords that begin or end at a pole or run through it."""
    pole = _lone_poles(samples)
    through = pole | _through_pole(samples, np.roll(samples, -1, axis=1))
    return through[:, 0::2] | through[:, 1::2] | np.roll(pole[:, 0::2], -1, axis=1)


def _lone_poles(samples: np.ndarray) -> np.ndarray:
    """bool [tile, point]: points on a pole whose neighbours are not, so that their longitude is moot.

    Where a projection draws the pole as a line, neighbours are on it too and have longitudes.
    """
    pole = 90 - np.abs(samples[..., 1]) < _POLE_ROUNDING
    return pole & ~np.roll(pole, 1, axis=1) & ~np.roll(pole, -1, axis=1)


def _through_pole(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool [...]: chords near a pole from one meridian to the opposite: no way around is shorter."""
    latitude = np.abs(np.stack([start[..., 1], end[..., 1]]))
    near = (latitude.min(0) > 89) & (latitude.max(0) < 90 - _POLE_ROUNDING)
    return near & (np.abs(_wrapped(end[..., 0] - start[..., 0])) > 180 - 1e-4)


def _polygons(samples: np.ndarray, margin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polygons (object) and boxes of outlines with equally many points."""
    lons, turns = _unrolled(samples[..., 0])
    lats = samples[..., 1]
    rings = np.stack([lons, lats], axis=2)
    polygons = shapely.polygons(_at_antimeridian(rings[:, ::2]))
    low, high = rings.min(1), rings.max(1)
    through = _lone_poles(samples) | _through_pole(samples, np.roll(samples, -1, axis=1))
    for tile in np.flatnonzero((turns != 0) | through.any(1)).tolist():
        ring = _closed(_polar_path(samples[tile]))
        polygons[tile], low[tile], high[tile] = shapely.polygons(ring), *_around(ring)
    _touch_poles(samples, polygons, low, high)
    beyond = np.abs(shapely.bounds(polygons)[:, [0, 2]]).max(1, initial=0) > 180
    polygons[beyond] = _cut(polygons[beyond])
    return polygons, _boxes(low - margin, high + margin)


def _touch_poles(
    samples: np.ndarray, polygons: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    """Let tiles touch the pole, in place, whose outline is nearer to it than its chords are long.

    Their boxes then hold all longitudes; their polygons change only where chords cross each other.
    """
    colatitude = 90 - np.abs(samples[..., 1])
    near = np.flatnonzero(colatitude.min(1) < 90 - _POLAR_LATITUDE)
    nearest = colatitude[near].argmin(1)
    around = near[:, None], (nearest[:, None] + [-1, 0, 1]) % samples.shape[1]
    plane = colatitude[around] * np.exp(1j * np.radians(samples[..., 0][around]))
    least, chord = colatitude[near, nearest], 2 * np.abs(np.diff(plane, axis=1)).max(1)
    touching = (least > _POLE_ROUNDING) & (least < chord)
    for tile, point in zip(near[touching].tolist(), nearest[touching].tolist(), strict=True):
        ring = _closed(np.roll(samples[tile], -point, axis=0)[1:])
        low[tile], high[tile] = _around(ring)
        if not shapely.is_valid(polygons[tile]):
            polygons[tile] = shapely.polygons(ring)


def _unrolled(lons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes [tile, point] without jumps, and how many turns [tile] each outline makes.

    The middle of their range is in [-180, 180).
    """
    steps = _wrapped(np.diff(lons, axis=1, append=lons[:, :1]))
    path = lons[:, :1] + np.cumsum(np.pad(steps[:, :-1], ((0, 0), (1, 0))), axis=1)
    # Whole turns are added to the numbers as they are, for the sums are rounded.
    middle = (path.min(1) + path.max(1)) / 2
    path -= (middle - _wrapped(middle))[:, None]
    return lons + 360 * np.round((path - lons) / 360), np.round(steps.sum(1) / 360)


def _polar_path(samples: np.ndarray) -> np.ndarray:
    """The outline [point, 2] of a tile around or through a pole, from where the pole is left to where it
    is reached; from antimeridian to antimeridian if the pole is inside."""
    pole = np.flatnonzero(_lone_poles(samples[None])[0])
    if pole.size:
        return np.roll(samples, -int(pole[0]), axis=0)[1:]
    through = np.flatnonzero(_through_pole(samples, np.roll(samples, -1, axis=0)))
    if through.size:
        return np.roll(samples, -int(through[0]) - 1, axis=0)
    return _opened(samples)


def _closed(path: np.ndarray) -> np.ndarray:
    """A ring along a path and back along the pole nearby."""
    lons = _unrolled(path[None, :, 0])[0][0]
    pole = np.copysign(90, path[:, 1].mean())
    ring = np.stack([lons, path[:, 1]], axis=1)
    return _at_antimeridian(np.concatenate([ring, [[lons[-1], pole], [lons[0], pole]]]))


def _around(ring: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest longitude, all of which meet at the pole, and latitude of such a ring."""
    return (-180, ring[:, 1].min()), (180, ring[:, 1].max())


def _opened(samples: np.ndarray) -> np.ndarray:
    """An outline around a pole as a path from the antimeridian to the antimeridian."""
    jump = int(np.abs(np.diff(samples[:, 0], append=samples[:1, 0])).argmax())
    path = _at_antimeridian(np.roll(samples, -jump - 1, axis=0))
    side = np.copysign(180, path[0, 0])
    before, after = abs(-side - path[-1, 0]), abs(path[0, 0] - side)
    latitude = np.interp(before, [0, before + after], path[[-1, 0], 1])
    return np.concatenate([[[side, latitude]], path, [[-side, latitude]]])


def _at_antimeridian(points: np.ndarray) -> np.ndarray:
    """Points with longitudes that rounding put beyond +-180 on it."""
    lons = points[..., 0]
    near = np.abs(np.abs(lons) - 180) < _ROUNDING
    return np.stack([np.where(near, np.copysign(180, lons), lons), points[..., 1]], axis=-1)


def _cut(polygons: np.ndarray) -> np.ndarray:
    """Polygons whose longitudes exceed +-180 in parts within it; None for invalid ones."""
    polygons[~shapely.is_valid(polygons)] = None
    parts = []
    for shift in (-360.0, 0.0, 360.0):
        moved = shapely.transform(polygons, partial(np.add, (shift, 0.0)))
        inside = shapely.intersection(moved, shapely.box(*_WORLD))
        # A side that merely touches the antimeridian leaves a line there.
        inside[~np.isin(shapely.get_type_id(inside), _POLYGONAL)] = None
        parts.append(inside)
    whole = shapely.union_all(parts, axis=0)
    return shapely.transform(whole, lambda points: np.clip(points, _WORLD[:2], _WORLD[2:]))


def _boxes(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Boxes [tile, 4] around longitudes without jumps and latitudes from `low` to `high` [tile, 2]."""
    west, east = (_at_antimeridian(corner)[:, 0] for corner in (low, high))
    around = east - west >= 360 - _ROUNDING
    west = np.where(around, -180, _wrapped(west))
    east = np.where(around, 180, -_wrapped(-east))
    return np.stack([west, np.maximum(low[:, 1], -90), east, np.minimum(high[:, 1], 90)], axis=1)


def _wrapped(degrees: np.ndarray) -> np.ndarray:
    """Angles in [-180, 180); those that are there already keep every bit."""
    # Just below 180, the sum is rounded up.
    return np.maximum(degrees - 360 * np.floor((degrees + 180) / 360), -180)
