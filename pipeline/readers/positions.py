"""Where the pixels of one grid lie in another."""

from functools import cached_property

import numpy as np
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform

from pipeline.errors import SceneError
from pipeline.scenes import Grid, Transform, Window

# What rasterio raises where PROJ has no answer; the first has no public name.
_NO_ANSWER = (CPLE_BaseError, RasterioError)
# Positions are rounded to this part of a pixel: far above the rounding errors of coordinates, so that
# aligned pixels meet exactly, and far below what could be seen.
_PER_PX = 2.0**20
# Where a CRS cannot express some of many points, those are looked for in blocks of so many px.
_BLOCK = 16


class Positions:
    """Positions of a target grid's pixels in a source grid, each by itself and exactly.

    Raises SceneError where a grid has no CRS, or a transform that maps pixels onto a line.
    """

    def __init__(self, source: Grid, target: Grid) -> None:
        for grid in (source, target):
            if grid.crs is None or grid.transform is None:
                raise SceneError(
                    f"cannot be warped from {source.in_words()} onto {target.in_words()}: both grids need "
                    "a CRS; leave grid.warp off, or give the archive a georeference"
                )
        assert source.transform is not None
        assert target.transform is not None
        self.source, self.target = source, target
        self._forward, self._inverse = target.transform, _inverted(source)
        there, here = CRS.from_user_input(target.crs), CRS.from_user_input(source.crs)
        self._systems = None if source.crs == target.crs else (there, here)
        self._geographic = here.is_geographic
        self._middle_x = _apply(source.transform, source.width / 2, source.height / 2)[0]

    @cached_property
    def coincide(self) -> bool:
        """Whether the grids are cut from one: equal pixels, whole pixels apart."""
        if self._systems is not None:
            return False
        height, width = self.target.height, self.target.width
        corners = np.array([[0, 0], [0, width], [height, 0]], np.float64)
        at = np.stack(self._placed(*_apply(self._forward, corners[:, 1], corners[:, 0])), axis=1)
        shift = at[0] - np.floor(at[0])
        return bool((at[:, ::-1] - at[0, ::-1] == corners).all() and not shift.any())

    def of(self, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Columns and rows of pixel centres, and a pixel's extent in x and y; all [y, x], in px of the
        source, whose first pixel's centre is (0.5, 0.5). NaN where the source's CRS has no such point.

        The extent is the local one, to the next pixel on the right and below.
        """
        top, left, height, width = window
        x, y = self._coordinates(top, left, height + 1, width + 1)
        cols, rows = self._placed(x, y)
        extents = []
        right, below = (slice(-1), slice(1, None)), (slice(1, None), slice(-1))
        steps = [(x[to] - x[:-1, :-1], y[to] - y[:-1, :-1]) for to in (right, below)]
        a, b, _, d, e, _ = self._inverse
        for p, q in ((a, b), (d, e)):
            parts = (p * self._around(dx) + q * dy for dx, dy in steps)
            extent = np.round(np.hypot(*parts) * _PER_PX) / _PER_PX
            extents.append(np.where(np.isfinite(extent), np.maximum(extent, 1 / _PER_PX), 1.0))
        return cols[:-1, :-1], rows[:-1, :-1], extents[0], extents[1]

    def _placed(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows of coordinates in the source's CRS."""
        near = self._middle_x + self._around(x - self._middle_x)
        cols, rows = _apply(self._inverse, near, y)
        return np.round(cols * _PER_PX) / _PER_PX, np.round(rows * _PER_PX) / _PER_PX

    def _around(self, dx: np.ndarray) -> np.ndarray:
        """Differences of x; on a globe, the short way around."""
        return dx - 360 * np.round(dx / 360) if self._geographic else dx

    def _coordinates(
        self, top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates x, y [row, col], in the source's CRS, of pixel centres of the target."""
        rows, cols = np.mgrid[top : top + height, left : left + width] + 0.5
        x, y = _apply(self._forward, cols, rows)
        if self._systems is None:
            return x, y
        try:
            return self._transformed(x, y)
        except _NO_ANSWER:
            return self._piecewise(top, left, height, width)

    def _transformed(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in the source's CRS; one of _NO_ANSWER if a single point has none."""
        assert self._systems is not None
        there = np.array(transform(*self._systems, x.ravel(), y.ravel())).reshape(2, *x.shape)
        there[:, ~np.isfinite(there).all(axis=0)] = np.nan
        return there[0], there[1]

    def _piecewise(
        self, top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `_coordinates`, where not all points have some. A block of which no corner and not the centre
        has any counts as having none; blocks are those of the target grid, whatever the window."""
        first_row, first_col = top // _BLOCK * _BLOCK, left // _BLOCK * _BLOCK
        shape = (-(-(top + height) // _BLOCK) * _BLOCK, -(-(left + width) // _BLOCK) * _BLOCK)
        out = np.full((2, shape[0] - first_row, shape[1] - first_col), np.nan)
        for row in range(0, out.shape[1], _BLOCK):
            for col in range(0, out.shape[2], _BLOCK):
                rows, cols = np.mgrid[:_BLOCK, :_BLOCK] + 0.5
                x, y = _apply(self._forward, cols + first_col + col, rows + first_row + row)
                out[:, row : row + _BLOCK, col : col + _BLOCK] = self._block(x, y)
        y0, x0 = top - first_row, left - first_col
        return out[0, y0 : y0 + height, x0 : x0 + width], out[1, y0 : y0 + height, x0 : x0 + width]

    def _block(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        try:
            return np.stack(self._transformed(x, y))
        except _NO_ANSWER:
            pass
        out = np.full((2, *x.shape), np.nan)
        probes = [(0, 0), (0, -1), (-1, 0), (-1, -1), (_BLOCK // 2, _BLOCK // 2)]
        if all(np.isnan(self._point(x, y, at)).any() for at in probes):
            return out
        for at in np.ndindex(*x.shape):
            out[:, *at] = self._point(x, y, at)
        return out

    def _point(self, x: np.ndarray, y: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
        try:
            return np.concatenate(self._transformed(x[at].reshape(1), y[at].reshape(1)))
        except _NO_ANSWER:
            return np.array([np.nan, np.nan])


def _apply(coefficients: Transform, u, v):  # type: ignore[no-untyped-def]
    a, b, c, d, e, f = coefficients
    return a * u + b * v + c, d * u + e * v + f


def _inverted(grid: Grid) -> Transform:
    assert grid.transform is not None
    a, b, c, d, e, f = grid.transform
    area = a * e - b * d
    if area == 0:
        raise SceneError(f"has a transform that cannot be inverted: {grid.in_words()}")
    p, q, r, s = e / area, -b / area, -d / area, a / area
    return p, q, -(p * c + q * f), r, s, -(r * c + s * f)
