"""Shannon entropy of every cell at every level, from one pass over the pixels.

A pixel counts into one of `num_bins` equal bins over its band's value range; values outside count
into the first or last bin, and the top edge belongs to the last bin, as in `numpy.histogram`. The
score is the entropy in bits of the histogram of the cell's valid pixels, NaN without any.

How all levels come from one pass:

1. every pixel becomes its bin index, by table for integers up to 16 bits;
2. cells smaller than a histogram are counted one by one, and uncounted again;
3. larger cells keep their histograms: a coarser cell's is the sum of its four children's.

Entropy is `log2(n) - sum(c * log2(c)) / n`. The terms `c * log2(c)` come from a table of integers
(fixed point), so sums are exact: a score has the same bits in whatever order and by whichever of the
two ways its pixels are counted.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np

from pipeline.grid import BaseGrid, morton_yx
from pipeline.scorers.config import EntropyConfig

FIXED_POINT = 1 << 32
_TABLE_BITS = 16
# From this many pixels per histogram bin on, adding up children beats counting pixels again.
_MERGE_PIXELS_PER_BIN = 0.5


@dataclass(frozen=True)
class EntropyScorer:
    """Entropy of a frame's cells. `value_ranges` are (low, high) per band, in the pixels' numbers."""

    config: EntropyConfig
    value_ranges: tuple[tuple[float, float], ...]

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x], fine to coarse, of `image` [band, y, x].

        `valid` is bool [y, x]; both have exactly the grid's size. NaN marks a cell without a valid
        pixel; every other score lies in [0, log2(min(bins, valid pixels of the cell))], or in [0, 1]
        if normalised.
        """
        bins, num_bins = self._bins(image)
        cell_yx = morton_yx(grid.num_scales - 1)
        shapes = [grid.level_shape(s) for s in range(grid.num_scales)]
        offsets = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
        scores = np.empty(offsets[-1], np.float32)
        merge_from = _first_merged_level(grid, num_bins)
        num_histograms = 4 ** (grid.num_scales - 1 - merge_from)
        _entropy_of_roots(
            bins,
            np.ascontiguousarray(valid),
            grid.base_patch_size,
            grid.num_scales,
            merge_from,
            cell_yx,
            np.zeros((num_histograms, num_bins), np.uint32),
            _count_log_count(grid.root_size_px**2),
            self.config.combine == "max",
            _normalizers(grid.root_size_px**2, num_bins, self.config.normalize),
            scores,
            offsets,
        )
        levels = np.split(scores, offsets[1:-1])
        return [level.reshape(shape) for level, shape in zip(levels, shapes, strict=True)]

    def _bins(self, image: np.ndarray) -> tuple[np.ndarray, int]:
        """Bin index of every pixel, uint8 or uint16 [plane, y, x], and the number of bins."""
        num_bins = self.config.num_bins
        if self.config.combine == "gray":
            weights = np.asarray(self.config.gray_weights, np.float64)
            gray = np.zeros(image.shape[1:])
            for weight, band in zip(weights, image, strict=True):
                gray += weight * band
            return bin_indices(gray[None], self.value_ranges[:1], num_bins), num_bins
        indices = bin_indices(image, self.value_ranges, num_bins)
        if self.config.combine != "joint":
            return indices, num_bins
        joint = np.zeros(image.shape[1:], np.uint16)
        for band in indices:
            joint = joint * np.uint16(num_bins) + band
        return joint[None], num_bins ** len(image)


def bin_indices(
    image: np.ndarray, value_ranges: tuple[tuple[float, float], ...], num_bins: int
) -> np.ndarray:
    """uint8 or uint16 [band, y, x]: the histogram bin of every pixel (of invalid ones, any bin)."""
    indices = np.empty(image.shape, np.uint8 if num_bins <= 256 else np.uint16)
    for band, (low, high) in enumerate(value_ranges):
        plane = image[band]
        if plane.dtype.kind in "iu" and plane.dtype.itemsize * 8 <= _TABLE_BITS:
            table = _bin_table(plane.dtype.str, low, high, num_bins)
            _bins_from_table(plane.view(np.dtype(f"u{plane.dtype.itemsize}")), table, indices[band])
        else:
            _bins_from_edges(plane, np.linspace(low, high, num_bins + 1), indices[band])
    return indices


def _first_merged_level(grid: BaseGrid, num_bins: int) -> int:
    """The first level whose cells keep a histogram; finer ones are counted and uncounted."""
    for level, size in enumerate(grid.patch_sizes):
        if size**2 >= _MERGE_PIXELS_PER_BIN * num_bins:
            return level
    return grid.num_scales - 1


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


@lru_cache(maxsize=16)
def _normalizers(max_count: int, num_bins: int, normalize: bool) -> np.ndarray:
    """float64 [max_count + 1]: what the entropy of so many pixels is divided by.

    The attainable maximum if normalised, else 1; also 1 where only 0 is attainable.
    """
    if not normalize:
        return np.ones(max_count + 1)
    limit = np.log2(np.clip(np.arange(max_count + 1), 1, num_bins))
    return np.where(limit > 0, limit, 1.0)


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
    merge_from: int,
    cell_yx: np.ndarray,
    histograms: np.ndarray,
    clogc: np.ndarray,
    keep_largest: bool,
    normalizers: np.ndarray,
    scores: np.ndarray,
    offsets: np.ndarray,
) -> None:
    """Fill `scores` (all levels flat, level `s` from `offsets[s]`, row-major inside).

    `cell_yx` [cell, 2] are the positions of one root's nodes of a level in Z-order, in units of the
    node; `histograms` [cell, bin], zero on entry, is scratch for the nodes of level `merge_from`.
    """
    num_planes, rows, cols = bins.shape
    root_px = base_patch_size << (num_scales - 1)
    # The nodes of a root, level after level: fewer than 4/3 of its base cells.
    node_bits = np.empty(2 * cell_yx.shape[0], np.float64)
    num_valid = np.empty(2 * cell_yx.shape[0], np.int64)
    weight = 1.0 if keep_largest else 1.0 / num_planes
    for top in range(0, rows, root_px):
        for left in range(0, cols, root_px):
            all_valid = True
            for y in range(top, top + root_px):
                for x in range(left, left + root_px):
                    all_valid &= valid[y, x]
            node_bits[:] = 0.0
            for plane in range(num_planes):
                _nodes_of_root(
                    bins[plane], valid, all_valid, top, left, base_patch_size, num_scales,
                    merge_from, cell_yx, histograms, clogc, keep_largest, node_bits, num_valid,
                )  # fmt: skip
            node = 0
            nodes = cell_yx.shape[0]
            for s in range(num_scales):
                size = base_patch_size << s
                for cell in range(nodes):
                    at = (top // size + cell_yx[cell, 0]) * (cols // size)
                    at += left // size + cell_yx[cell, 1]
                    limit = normalizers[num_valid[node + cell]]
                    bits = node_bits[node + cell] * weight / limit
                    scores[offsets[s] + at] = np.float32(bits)
                node += nodes
                nodes //= 4


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _nodes_of_root(
    bins: np.ndarray,
    valid: np.ndarray,
    all_valid: bool,
    top: int,
    left: int,
    base_patch_size: int,
    num_scales: int,
    merge_from: int,
    cell_yx: np.ndarray,
    histograms: np.ndarray,
    clogc: np.ndarray,
    keep_largest: bool,
    node_bits: np.ndarray,
    num_valid: np.ndarray,
) -> None:
    """Add one plane's entropies to the nodes of one root, or keep the larger of the two."""
    node = 0
    nodes = cell_yx.shape[0]
    for s in range(num_scales):
        size = base_patch_size << s
        for cell in range(nodes):
            y, x = top + cell_yx[cell, 0] * size, left + cell_yx[cell, 1] * size
            if s < merge_from and size == 1:
                # One pixel has no entropy.
                count, used = np.int64(all_valid or valid[y, x]), np.int64(0)
            elif s < merge_from:
                count, used = _count_pixels(
                    bins, valid, all_valid, y, x, size, histograms[0], clogc
                )
                _uncount_pixels(bins, y, x, size, histograms[0])
            elif s == merge_from:
                histograms[cell, :] = 0
                count, used = _count_pixels(
                    bins, valid, all_valid, y, x, size, histograms[cell], clogc
                )
            else:
                child = node - 4 * nodes + 4 * cell
                count = (
                    num_valid[child]
                    + num_valid[child + 1]
                    + num_valid[child + 2]
                    + num_valid[child + 3]
                )
                used = _add_children(histograms, cell, clogc)
            num_valid[node + cell] = count
            bits = (clogc[0, count] - used) / count / FIXED_POINT
            if keep_largest:
                # NaN compares false both ways: a cell without a pixel keeps NaN.
                larger = node_bits[node + cell] >= bits
                node_bits[node + cell] = node_bits[node + cell] if larger else bits
            else:
                node_bits[node + cell] += bits
        node += nodes
        nodes //= 4
    # Uncounted levels of the next plane or root start from an empty row.
    if merge_from > 0:
        histograms[0, :] = 0


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_pixels(
    bins: np.ndarray,
    valid: np.ndarray,
    all_valid: bool,
    y0: int,
    x0: int,
    size: int,
    histogram: np.ndarray,
    clogc: np.ndarray,
) -> tuple[Any, Any]:
    """Count a cell's valid pixels into `histogram`; their number, and the sum of `c * log2(c)`."""
    used = np.int64(0)
    count = np.int64(0)
    if all_valid:
        for y in range(y0, y0 + size):
            for x in range(x0, x0 + size):
                k = np.uint32(bins[y, x])
                used += clogc[1, histogram[k]]
                histogram[k] += np.uint32(1)
        return np.int64(size * size), used
    for y in range(y0, y0 + size):
        for x in range(x0, x0 + size):
            if valid[y, x]:
                k = np.uint32(bins[y, x])
                used += clogc[1, histogram[k]]
                histogram[k] += np.uint32(1)
                count += 1
    return count, used


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _uncount_pixels(bins: np.ndarray, y0: int, x0: int, size: int, histogram: np.ndarray) -> None:
    for y in range(y0, y0 + size):
        for x in range(x0, x0 + size):
            histogram[np.uint32(bins[y, x])] = 0


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add_children(histograms: np.ndarray, cell: int, clogc: np.ndarray) -> Any:
    """Put the sum of rows `4 * cell ...` into row `cell`; the sum of its `c * log2(c)`.

    In place: a child's row is read before any later cell overwrites it, because `cell <= 4 * cell`.
    """
    first = 4 * cell
    for k in range(histograms.shape[1]):
        histograms[cell, k] = (
            histograms[first, k]
            + histograms[first + 1, k]
            + histograms[first + 2, k]
            + histograms[first + 3, k]
        )
    used = np.int64(0)
    for k in range(histograms.shape[1]):
        used += clogc[0, histograms[cell, k]]
    return used
