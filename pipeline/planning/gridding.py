"""How grids relate: equal, the same at another resolution, overlapping, or neither."""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pipeline.errors import ConfigError, SceneError
from pipeline.georef import canonical_crs, native_corners
from pipeline.planning.footprints import LONLAT, transformed
from pipeline.scenes import Grid
from pipeline.settings.config import GridConfig

# Corners and pixel sizes that differ by less than this share of a pixel are equal.
_TOLERANCE_PX = 1e-3
_MAX_RATIO = 1000
_POINTS_PER_SIDE = 9


def grid_key(grid: Grid) -> tuple[object, ...]:
    """Equal for equal grids with a CRS, also where their numbers were rounded differently."""
    assert grid.transform is not None
    return (grid.crs, grid.height, grid.width, *(_rounded(v) for v in grid.transform))


def corner_key(grid: Grid) -> tuple[object, ...]:
    """Equal for grids with the same CRS and top left corner, whatever their resolution."""
    assert grid.transform is not None
    return (grid.crs, _rounded(grid.transform[2]), _rounded(grid.transform[5]))


# A large archive has few grids and asks about each of them very often.
@lru_cache(maxsize=2**16)
def ratio_between(reference: Grid, other: Grid) -> Fraction | None:
    """Pixels of `reference` along one side of a pixel of `other`; None unless they share corner and extent.

    Extents may differ by less than one pixel of `other`, which is what integer sizes leave open.
    Between engineering grids sizes alone decide.
    """
    if reference == other:
        return Fraction(1)
    if reference.crs != other.crs:
        return None
    if reference.transform is None or other.transform is None:
        ratio = Fraction(reference.height, other.height)
        return ratio if ratio == Fraction(reference.width, other.width) else None
    step = math.hypot(reference.transform[0], reference.transform[3])
    ratio = Fraction(math.hypot(other.transform[0], other.transform[3]) / step).limit_denominator(
        _MAX_RATIO
    )
    if ratio == 0 or not _same_transform(scaled(reference, ratio), other):
        return None
    rows, cols = other.height * ratio - reference.height, other.width * ratio - reference.width
    fits = abs(rows) < ratio and abs(cols) < ratio if ratio > 1 else rows == cols == 0
    return ratio if fits else None


def scaled(grid: Grid, ratio: Fraction) -> Grid:
    """The grid with the same corner whose pixels are `ratio` times as long, covering all of it."""
    height, width = math.ceil(grid.height / ratio), math.ceil(grid.width / ratio)
    if grid.transform is None:
        return Grid(height, width, grid.crs, None)
    a, b, c, d, e, f = grid.transform
    k = float(ratio)
    return Grid(height, width, grid.crs, (a * k, b * k, c, d * k, e * k, f))


def named_grid(config: GridConfig) -> Grid | None:
    """The grid a configuration names, or None. Raises ConfigError for an unknown CRS."""
    if config.crs is None:
        return None
    assert config.origin is not None
    assert config.pixel_size is not None
    assert config.shape is not None
    (x, y), size = config.origin, config.pixel_size
    try:
        crs = canonical_crs(config.crs)
    except SceneError as error:
        raise ConfigError(f"grid.crs: {error}") from None
    return Grid(*config.shape, crs, (size, 0.0, x, 0.0, -size, y))


def lonlat_box(grid: Grid) -> np.ndarray | None:
    """float64 (west, south, east, north) of a grid in degrees; None where it has none.

    West exceeds east where the grid crosses the antimeridian.
    """
    if grid.crs is None:
        return None
    outline = native_corners(grid, _outline(grid))
    points = transformed(grid.crs, LONLAT, outline[:, None])[:, 0]
    lons, lats = points[np.isfinite(points).all(axis=1)].T
    if not len(lons):
        return None
    if np.ptp(lons) > 180:
        west, east = lons[lons > 0].min(initial=180), lons[lons <= 0].max(initial=-180)
        return np.array([west, lats.min(), east, lats.max()])
    return np.array([lons.min(), lats.min(), lons.max(), lats.max()])


def boxes_overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [n]: which of `others` [n, 4] share more than a line with `box`; see `lonlat_box`."""
    west, south, east, north = others.T
    width = (east - west) % 360
    ahead = (box[0] - west) % 360
    behind = (west - box[0]) % 360
    across = (ahead < width) | (behind < (box[2] - box[0]) % 360)
    return across & (box[1] < north) & (box[3] > south)


def _outline(grid: Grid) -> np.ndarray:
    """Pixel corners float64 [n, (col, row)] along the edge of a grid."""
    t = np.linspace(0, 1, _POINTS_PER_SIDE)
    zero, one = np.zeros_like(t), np.ones_like(t)
    sides = [(t, zero), (one, t), (t, one), (zero, t)]
    unit = np.concatenate([np.stack(side, axis=1) for side in sides])
    return unit * (grid.width, grid.height)


def _same_transform(first: Grid, second: Grid) -> bool:
    """Whether corners and pixel vectors agree to a small share of a pixel over the whole grid."""
    assert first.transform is not None
    assert second.transform is not None
    step = math.hypot(first.transform[0], first.transform[3])
    corners = np.array([[0, 0], [first.width, 0], [0, first.height]], np.float64)
    apart = native_corners(first, corners) - native_corners(second, corners)
    return bool(np.abs(apart).max() < _TOLERANCE_PX * step)


def _rounded(value: float) -> float:
    """Nine significant digits: 1 mm in a UTM northing, 1 m in degrees of longitude is 1e-5."""
    return float(f"{value:.10g}")
