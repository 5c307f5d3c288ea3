"""Scores: one number per cell and level that says how much is going on inside the cell.

The entropy score: clip each band to its value range, count `num_bins` equal bins over that range
(the top edge belongs to the last bin, as in `numpy.histogram`), take the Shannon entropy in bits
over the valid pixels of the cell, and average over the bands. A cell without a valid pixel scores
NaN; no cell ever sees another cell's pixels.

How all levels come from one pass over the pixels:

1. every pixel becomes its bin index, by table for integers up to 16 bits;
2. each base cell of a root is counted into its own histogram;
3. the histogram of a coarser cell is the sum of its four children's, added up in place.

Entropy is `log2(n) - sum(c * log2(c)) / n`. The terms `c * log2(c)` come from a table of integers
(fixed point), so sums are exact and a score has the same bits in whatever order pixels are met.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np

from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid, covering_grid, morton_yx, pad_to_grid

FIXED_POINT = 1 << 32
_TABLE_BITS = 16


@dataclass(frozen=True)
class EntropyScorer:
    """Entropy of a frame's cells at every level of a grid.

    `value_ranges` holds one (low, high) per band, in the units of the pixels; values outside count
    into the first or last bin.
    """

    num_bins: int
    value_ranges: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for band, (low, high) in enumerate(self.value_ranges):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(
                    f"value range of band {band} is ({low}, {high}); give two finite numbers, low < high"
                )

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x], fine to coarse, of `image` [band, y, x].

        `valid` is bool [y, x]; both have exactly the grid's size. NaN marks a cell without a valid
        pixel; every other score lies in [0, log2(min(num_bins, valid pixels of the cell))].
        """
        assert image.shape == (len(self.value_ranges), *grid.shape_px), image.shape
        assert valid.shape == grid.shape_px
        cell_yx = morton_yx(grid.num_scales - 1)
        shapes = [grid.level_shape(s) for s in range(grid.num_scales)]
        offsets = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
        scores = np.empty(offsets[-1], np.float32)
        _entropy_of_roots(
            self._bin_indices(image),
            np.ascontiguousarray(valid),
            grid.base_patch_size,
            grid.num_scales,
            cell_yx,
            np.zeros((len(cell_yx), self.num_bins), np.uint32),
            _count_log_count(grid.root_size_px**2),
            scores,
            offsets,
        )
        levels = np.split(scores, offsets[1:-1])
        return [level.reshape(shape) for level, shape in zip(levels, shapes, strict=True)]

    def _bin_indices(self, image: np.ndarray) -> np.ndarray:
        """uint8 or uint16 [band, y, x]: the histogram bin of every pixel (of invalid ones, any bin)."""
        indices = np.empty(image.shape, np.uint8 if self.num_bins <= 256 else np.uint16)
        for band, (low, high) in enumerate(self.value_ranges):
            plane = image[band]
            if plane.dtype.kind in "iu" and plane.dtype.itemsize * 8 <= _TABLE_BITS:
                table = _bin_table(plane.dtype.str, low, high, self.num_bins)
                raw = plane.view(np.dtype(f"u{plane.dtype.itemsize}"))
                _bins_from_table(raw, table, indices[band])
            else:
                edges = np.linspace(low, high, self.num_bins + 1)
                _bins_from_edges(plane, edges, indices[band])
        return indices


def score_maps(
    image: np.ndarray,
    *,
    base_patch_size: int,
    num_scales: int,
    bands: tuple[int, ...] | None = None,
    num_bins: int = 32,
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None,
    valid: np.ndarray | None = None,
    scorer: str = "entropy",
) -> list[np.ndarray]:
    """Score maps of an image [band, y, x] of any size, float32 [cell_y, cell_x], fine to coarse.

    The image is padded with invalid pixels to whole roots. Pixels are invalid where `valid`
    (bool [y, x]) is False or a scored band is NaN or infinite. `bands` are indices into the first
    axis (all by default). `value_range` is one (low, high) or one per scored band; (0, 1) unless
    given, but an integer image must name it. Raises ConfigError for settings that cannot be used.
    """
    image, valid, grid = as_frame(image, valid, bands, base_patch_size, num_scales)
    ranges = _ranges_per_band(value_range, image)
    return make_scorer(scorer, num_bins, ranges).maps(image, valid, grid)


def as_frame(
    image: np.ndarray,
    valid: np.ndarray | None,
    bands: tuple[int, ...] | None,
    base_patch_size: int,
    num_scales: int,
) -> tuple[np.ndarray, np.ndarray, BaseGrid]:
    """The scored bands [band, y, x], their validity bool [y, x], both padded, and the grid."""
    if image.ndim != 3 or image.dtype.kind not in "iuf":
        raise ConfigError(
            f"image has shape {image.shape} and type {image.dtype}; expected real numbers [band, y, x]"
        )
    if valid is not None and (valid.shape != image.shape[1:] or valid.dtype != np.bool_):
        raise ConfigError(
            f"valid has shape {valid.shape} and type {valid.dtype}; expected bool {image.shape[1:]}"
        )
    image = np.ascontiguousarray(image if bands is None else image[list(bands)])
    inside = np.ones(image.shape[1:], np.bool_) if valid is None else valid
    if image.dtype.kind == "f":
        inside = inside & np.isfinite(image).all(axis=0)
    height, width = image.shape[1:]
    grid = covering_grid(height, width, base_patch_size, num_scales)
    return pad_to_grid(image, grid), pad_to_grid(inside, grid), grid


def make_scorer(
    name: str, num_bins: int, value_ranges: tuple[tuple[float, float], ...]
) -> EntropyScorer:
    """The scorer of that name; ConfigError for a name that is not registered."""
    if name not in SCORERS:
        raise ConfigError(f"scorer is {name!r}; expected one of {sorted(SCORERS)}")
    return SCORERS[name](num_bins, value_ranges)


def _ranges_per_band(value_range: object, image: np.ndarray) -> tuple[tuple[float, float], ...]:
    if value_range is None:
        if image.dtype.kind in "iu":
            raise ConfigError(
                f"the image holds {image.dtype} numbers and no value_range was given; name the range "
                "of its values, for example value_range=(0, 10000)"
            )
        value_range = (0.0, 1.0)
    ranges = np.asarray(value_range, np.float64)
    if ranges.shape not in {(2,), (len(image), 2)}:
        raise ConfigError(
            f"value_range is {value_range}; expected (low, high), or one per scored band ({len(image)})"
        )
    return tuple(
        (float(low), float(high)) for low, high in np.broadcast_to(ranges, (len(image), 2))
    )


@lru_cache(maxsize=256)
def _bin_table(dtype: str, low: float, high: float, num_bins: int) -> np.ndarray:
    """Bin of every number an 8- or 16-bit type can hold, indexed by its bits read as unsigned."""
    kind = np.dtype(dtype)
    values = np.arange(2 ** (8 * kind.itemsize), dtype=np.dtype(f"u{kind.itemsize}")).view(kind)
    edges = np.linspace(low, high, num_bins + 1)
    bins = np.searchsorted(edges, values, side="right") - 1
    return np.clip(bins, 0, num_bins - 1).astype(np.uint8 if num_bins <= 256 else np.uint16)


@lru_cache(maxsize=16)
def _count_log_count(max_count: int) -> np.ndarray:
    """int64 [2, max_count + 1]: `c * log2(c)` in fixed point, and its step from `c` to `c + 1`."""
    counts = np.arange(max_count + 2, dtype=np.float64)
    values = np.round(counts * np.log2(np.maximum(counts, 1)) * FIXED_POINT).astype(np.int64)
    return np.stack([values[:-1], np.diff(values)])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _bins_from_table(plane: np.ndarray, table: np.ndarray, indices: np.ndarray) -> None:
    rows, cols = plane.shape
    for y in range(rows):
        for x in range(cols):
            indices[y, x] = table[plane[y, x]]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _bins_from_edges(plane: np.ndarray, edges: np.ndarray, indices: np.ndarray) -> None:
    """Bins by arithmetic, corrected against the edges: rounding may be off by one bin."""
    rows, cols = plane.shape
    last = edges.size - 2
    low, high = edges[0], edges[-1]
    per_unit = (last + 1) / (high - low)
    for y in range(rows):
        for x in range(cols):
            value = np.float64(plane[y, x])
            k = 0  # also for NaN, whose pixel is invalid
            if value >= high:
                k = last
            elif value > low:
                k = min(int((value - low) * per_unit), last)
                if value < edges[k]:
                    k -= 1
                elif k < last and value >= edges[k + 1]:
                    k += 1
            indices[y, x] = k


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _entropy_of_roots(
    bins: np.ndarray,
    valid: np.ndarray,
    base_patch_size: int,
    num_scales: int,
    cell_yx: np.ndarray,
    histograms: np.ndarray,
    clogc: np.ndarray,
    scores: np.ndarray,
    offsets: np.ndarray,
) -> None:
    """Fill `scores` (all levels flat, level `s` from `offsets[s]`, row-major inside).

    `cell_yx` [cell, 2] are the positions of one root's base cells in Z-order and `histograms`
    [cell, bin] is scratch for them.
    """
    num_bands, rows, cols = bins.shape
    num_cells, num_bins = histograms.shape
    side = 1 << (num_scales - 1)
    root_px = base_patch_size * side
    # The nodes of a root, level after level: fewer than 4/3 of its base cells.
    total_bits = np.empty(2 * num_cells, np.float64)
    num_valid = np.empty(num_cells, np.int64)
    for root_y in range(rows // root_px):
        for root_x in range(cols // root_px):
            top, left = root_y * root_px, root_x * root_px
            all_valid = True
            for y in range(top, top + root_px):
                for x in range(left, left + root_px):
                    all_valid &= valid[y, x]
            total_bits[:] = 0.0
            for band in range(num_bands):
                for cell in range(num_cells):
                    y0 = top + cell_yx[cell, 0] * base_patch_size
                    x0 = left + cell_yx[cell, 1] * base_patch_size
                    histogram = histograms[cell]
                    histogram[:] = 0
                    used = np.int64(0)
                    count = base_patch_size * base_patch_size if all_valid else 0
                    for y in range(y0, y0 + base_patch_size):
                        for x in range(x0, x0 + base_patch_size):
                            if all_valid or valid[y, x]:
                                k = np.uint32(bins[band, y, x])
                                used += clogc[1, histogram[k]]
                                histogram[k] += np.uint32(1)
                                count += not all_valid
                    num_valid[cell] = count
                    total_bits[cell] += (clogc[0, count] - used) / count
                node = num_cells
                level_cells = num_cells
                for _ in range(1, num_scales):
                    level_cells //= 4
                    for cell in range(level_cells):
                        count = _merge_children(histograms, num_valid, cell)
                        used = np.int64(0)
                        for b in range(num_bins):
                            used += clogc[0, histograms[cell, b]]
                        total_bits[node + cell] += (clogc[0, count] - used) / count
                    node += level_cells
            node = 0
            level_cells = num_cells
            for s in range(num_scales):
                level_cols = cols // (base_patch_size << s)
                row0, col0 = root_y * (side >> s), root_x * (side >> s)
                for cell in range(level_cells):
                    at = (row0 + cell_yx[cell, 0]) * level_cols + col0 + cell_yx[cell, 1]
                    bits = total_bits[node + cell] / num_bands / FIXED_POINT
                    scores[offsets[s] + at] = np.float32(bits)
                node += level_cells
                level_cells //= 4


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _merge_children(histograms: np.ndarray, num_valid: np.ndarray, cell: int) -> int:
    """Add the histograms of children `4 * cell ...` into row `cell`; the number of valid pixels.

    In place: a child's row is read before any later cell overwrites it, because `cell <= 4 * cell`.
    """
    first = 4 * cell
    for b in range(histograms.shape[1]):
        histograms[cell, b] = (
            histograms[first, b]
            + histograms[first + 1, b]
            + histograms[first + 2, b]
            + histograms[first + 3, b]
        )
    count = num_valid[first] + num_valid[first + 1] + num_valid[first + 2] + num_valid[first + 3]
    num_valid[cell] = count
    return count


SCORERS = {"entropy": EntropyScorer}
