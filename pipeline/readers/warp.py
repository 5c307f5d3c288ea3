"""Raster assets resampled onto another grid.

Every pixel of the target is computed from its own exact position in the file and from nothing else, so
that windows may be cut in any way. GDAL's warper (`rasterio.vrt.WarpedVRT`) cannot promise that: it
chooses the width of its kernels anew for every request. The kernels here are the usual ones; where the
request does not matter the two agree, and the tests compare them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np

from pipeline.errors import SceneError
from pipeline.readers.base import AssetReader
from pipeline.readers.positions import Positions
from pipeline.readers.rasters import open_raster_asset
from pipeline.readers.validity import holds_data
from pipeline.scenes import Access, Asset, Window

_BILINEAR, _CUBIC, _AVERAGE = range(3)
_KERNELS = {"bilinear": _BILINEAR, "cubic": _CUBIC, "average": _AVERAGE}
# What is held at once: target pixels of one step, and numbers of the file under them.
_MAX_TARGET_PX = 2**18
_MAX_SOURCE_NUMBERS = 2**24


@contextmanager
def open_warped_asset(asset: Asset, access: Access) -> Iterator[AssetReader]:
    """A reader of a raster asset on `asset.warp_onto`; SceneError where it cannot be warped."""
    if asset.kind != "raster":
        raise SceneError("is an array; only raster files can be warped onto another grid")
    if asset.resampling not in {"nearest", *_KERNELS}:
        raise SceneError(
            f"resampling {asset.resampling!r} is not known; expected nearest, {', '.join(_KERNELS)}"
        )
    assert asset.warp_onto is not None
    positions = Positions(asset.grid, asset.warp_onto)
    with open_raster_asset(asset, access) as source:
        yield WarpedReader(source, asset, positions)


class WarpedReader:
    """Windows of a raster on another grid.

    nearest: the number under the pixel's centre as it is, nodata too; readable where the file is and its
    own mask lets through. All are nearest where the grids' pixels coincide: no bit changes then.

    bilinear, cubic (Keys, a = -0.5), both widened where target pixels are larger than the file's, and
    average over the pixel's footprint: nodata, NaN and what the file's mask hides has no weight. A pixel is
    readable where its centre lies in the file and, in every plane, at least half of the kernel's weight on
    data. Computed in float64; integers are rounded half up, and what cubic overshoots is clipped to the
    type. What is not readable is 0.
    """

    def __init__(self, source: AssetReader, asset: Asset, positions: Positions) -> None:
        self._source, self._asset, self._positions = source, asset, positions
        self._kernel = None if positions.coincide else _KERNELS.get(asset.resampling or "nearest")
        self._last: tuple[Window, np.ndarray, np.ndarray] | None = None

    def read(self, window: Window) -> np.ndarray:
        return self._warped(window)[0].copy()

    def readable(self, window: Window) -> np.ndarray:
        return self._warped(window)[1].copy()

    def _warped(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [plane, y, x] and where they are readable; those of the last window are kept."""
        if self._last is None or self._last[0] != window:
            shape = (len(self._asset.planes), window.height, window.width)
            pixels, readable = np.zeros(shape, self._asset.dtype), np.zeros(shape[1:], np.bool_)
            self._fill(window, pixels, readable)
            self._last = window, pixels, readable
        return self._last[1:]

    def _fill(self, window: Window, pixels: np.ndarray, readable: np.ndarray) -> None:
        """Write one window into parts of the result, in steps of bounded size."""
        if window.height * window.width > _MAX_TARGET_PX:
            self._fill_halves(window, pixels, readable)
            return
        cols, rows, reach_x, reach_y = self._positions.of(window)
        grid = self._asset.grid
        inside = (cols >= 0) & (cols < grid.width) & (rows >= 0) & (rows < grid.height)
        if not inside.any():
            return
        reach_x, reach_y = (np.where(inside, reach, 1.0) for reach in (reach_x, reach_y))
        left, width = self._span(cols, reach_x, inside, grid.width)
        top, height = self._span(rows, reach_y, inside, grid.height)
        if height * width * len(pixels) > _MAX_SOURCE_NUMBERS:
            self._fill_halves(window, pixels, readable)
            return
        under = Window(top, left, height, width)
        numbers, unmasked = self._source.read(under), self._source.readable(under)
        cols, rows = cols - left, rows - top
        if self._kernel is None:
            at = rows[inside].astype(np.intp), cols[inside].astype(np.intp)
            pixels[:, inside] = numbers[:, *at]
            readable[inside] = True if unmasked is None else unmasked[at]
            return
        shown = inside.copy()
        for plane, values, out in zip(self._asset.planes, numbers, pixels, strict=True):
            data = holds_data(values, plane.nodata)
            if unmasked is not None:
                data &= unmasked
            wide = np.zeros(inside.shape)
            _resample(
                values.astype(np.float64), data, cols, rows, reach_x, reach_y, self._kernel, wide, shown
            )  # fmt: skip
            out[...] = _as_type(wide, out.dtype)
        pixels[:, ~shown] = 0
        readable[...] = shown

    def _span(
        self, centres: np.ndarray, reach: np.ndarray, inside: np.ndarray, size: int
    ) -> tuple[int, int]:
        """First pixel and number of pixels, in 0 ... size, that the kernels inside can touch."""
        support = 0 if self._kernel is None else 1 + (self._kernel == _CUBIC)
        half = support * np.maximum(reach, 1.0)
        first = max(0, int(np.floor((centres - half)[inside].min())) - 1)
        last = min(size, int(np.ceil((centres + half)[inside].max())) + 1)
        return first, last - first

    def _fill_halves(self, window: Window, pixels: np.ndarray, readable: np.ndarray) -> None:
        top, left, height, width = window
        if height == width == 1:
            raise SceneError(
                f"one pixel of the grid {self._positions.target.in_words()} covers more than "
                f"{_MAX_SOURCE_NUMBERS} of its numbers; warp onto finer pixels"
            )
        y, x = (height // 2, width) if height >= width else (height, width // 2)
        self._fill(Window(top, left, y, x), pixels[:, :y, :x], readable[:y, :x])
        far = (slice(y, None), slice(None)) if y < height else (slice(None), slice(x, None))
        rest = (
            Window(top + y, left, height - y, width)
            if y < height
            else Window(top, left + x, height, width - x)
        )
        self._fill(rest, pixels[:, *far], readable[far])


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        return np.clip(values, limits.min, limits.max).astype(dtype)
    low, high = (float(limit) for limit in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    if high > np.iinfo(dtype).max:
        high = np.nextafter(high, 0)
    return np.clip(np.floor(values + 0.5), low, high).astype(dtype)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _resample(source, data, cols, rows, reach_x, reach_y, kernel, values, readable):  # type: ignore[no-untyped-def]
    """Write the weighted mean of `source` float64 [y, x] where `data`, bool [y, x], around positions in
    its px [row, col] into `values` [row, col]; where less than half of the weight has data, unset
    `readable` instead. `reach` is the size of a target pixel in px of the source."""
    height, width = source.shape
    weights_x = np.empty(int(4 * max(1.0, reach_x.max())) + 3)
    weights_y = np.empty(int(4 * max(1.0, reach_y.max())) + 3)
    for i in range(cols.shape[0]):
        for j in range(cols.shape[1]):
            if not readable[i, j]:
                continue
            first_x, num_x = _weigh(cols[i, j], reach_x[i, j], kernel, weights_x)
            first_y, num_y = _weigh(rows[i, j], reach_y[i, j], kernel, weights_y)
            total = weights_x[:num_x].sum() * weights_y[:num_y].sum()
            summed, weight, low, high = 0.0, 0.0, np.inf, -np.inf
            for y in range(max(0, -first_y), min(num_y, height - first_y)):
                for x in range(max(0, -first_x), min(num_x, width - first_x)):
                    w = weights_x[x] * weights_y[y]
                    if w != 0 and data[first_y + y, first_x + x]:
                        value = source[first_y + y, first_x + x]
                        summed += w * value
                        weight += w
                        low, high = min(low, value), max(high, value)
            if weight < 0.5 * total * (1 - 1e-12):
                readable[i, j] = False
            elif kernel == _CUBIC:
                values[i, j] = summed / weight
            else:
                values[i, j] = min(max(summed / weight, low), high)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _weigh(centre, reach, kernel, weights):  # type: ignore[no-untyped-def]
    """Write the weights of the pixels along one axis around a position; the first of them, and how many.

    Keys (1981), "Cubic convolution interpolation for digital image processing".
    """
    if kernel == _AVERAGE:
        low, high = centre - 0.5 * reach, centre + 0.5 * reach
        first, num = int(np.floor(low)), int(np.ceil(high)) - int(np.floor(low))
        for k in range(num):
            weights[k] = min(high, first + k + 1.0) - max(low, first + k)
        return first, num
    scale = max(reach, 1.0)
    half = 2 * scale if kernel == _CUBIC else scale
    first = int(np.ceil(centre - half - 0.5))
    num = int(np.floor(centre + half - 0.5)) - first + 1
    for k in range(num):
        t = abs(first + k + 0.5 - centre) / scale
        if kernel == _BILINEAR:
            weights[k] = max(0.0, 1.0 - t)
        elif t < 1:
            weights[k] = (1.5 * t - 2.5) * t * t + 1
        else:
            weights[k] = ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0
    return first, num
