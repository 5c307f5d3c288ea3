"""Shannon entropy of every cell at every level, from one pass over the pixels.

A pixel counts into one of `num_bins` equal bins over its band's value range; values outside count
into the first or last bin, and the top edge belongs to the last bin, as in `numpy.histogram`. The
score is the entropy in bits of the histogram of the cell's valid pixels, NaN without any.

How all levels come from one pass:

1. every pixel becomes its bin index (`pipeline.scorers.binning`);
2. cells of fewer pixels than a histogram is worth are counted on their own, those of 2 x 2 px by
   comparing their pixels;
3. larger cells keep their histograms: a coarser cell's is the sum of its four children's.

Entropy is `log2(n) - sum(c * log2(c)) / n`. The terms `c * log2(c)` come from a table of integers
(fixed point), so sums are exact: a score has the same bits in whatever order and by whichever way its
pixels are counted.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np

from pipeline.grid import BaseGrid, morton_yx
from pipeline.scorers.binning import bin_indices
from pipeline.scorers.config import EntropyConfig

FIXED_POINT = 1 << 32
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
        shapes, offsets, cell_yx = _level_layout(grid)
        merge_from = _first_merged_level(grid, num_bins)
        num_histograms = 4 ** (grid.num_scales - 1 - merge_from)
        scores = np.empty(offsets[-1], np.float32)
        _entropy_of_roots(
            bins,
            valid,
            bool(valid.all()),
            grid.base_patch_size,
            grid.num_scales,
            merge_from,
            cell_yx,
            np.empty((num_histograms, num_bins), _count_type(grid.root_size_px)),
            _count_log_count(grid.root_size_px**2),
            self.config.combine == "max",
            _normalizers(grid.root_size_px**2, num_bins, self.config.normalize),
            scores,
            offsets,
        )
        return [
            scores[offsets[s] : offsets[s + 1]].reshape(shape) for s, shape in enumerate(shapes)
        ]

    def _bins(self, image: np.ndarray) -> tuple[np.ndarray, int]:
        """Bin index of every pixel, uint8 or uint16 [plane, y, x], and the number of bins."""
        num_bins = self.config.num_bins
        if self.config.combine == "gray":
            weights = np.asarray(self.config.weights, np.float64)
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


@lru_cache(maxsize=32)
def _level_layout(grid: BaseGrid) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Shape (y, x) of every level, where each begins in a flat array, a root's cells in Z-order."""
    shapes = [grid.level_shape(s) for s in range(grid.num_scales)]
    offsets = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
    return shapes, offsets, morton_yx(grid.num_scales - 1).astype(np.uintp)


@lru_cache(maxsize=64)
def _first_merged_level(grid: BaseGrid, num_bins: int) -> int:
    """The first level whose cells keep a histogram; finer ones share one row, cell after cell."""
    for level, size in enumerate(grid.patch_sizes):
        # Cells of one and of four pixels never need a histogram.
        if size > 2 and size**2 >= _MERGE_PIXELS_PER_BIN * num_bins:
            return level
    return grid.num_scales - 1


def _count_type(root_size_px: int) -> Any:
    """The smaller the counts, the more of them one instruction adds."""
    return np.uint16 if root_size_px < 256 else np.uint32


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


# The loops below index with unsigned integers: with signed ones every access would first ask whether
# the index is negative, which halves the speed.
Unsigned = Any


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _entropy_of_roots(
    bins: np.ndarray,
    valid: np.ndarray,
    frame_valid: bool,
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

    `cell_yx` unsigned [cell, 2] are the positions of one root's nodes of a level in Z-order, in units
    of the node; `histograms` [cell, bin] is scratch for the nodes of level `merge_from`.
    """
    num_planes = bins.shape[0]
    rows, cols = np.uintp(bins.shape[1]), np.uintp(bins.shape[2])
    root_px = np.uintp(base_patch_size << (num_scales - 1))
    # The nodes of a root, level after level: fewer than 4/3 of its base cells.
    node_bits = np.empty(2 * cell_yx.shape[0], np.float64)
    num_valid = np.empty(2 * cell_yx.shape[0], np.int64)
    unit = (1.0 if keep_largest else 1.0 / num_planes) / FIXED_POINT
    for root in range(np.uintp((rows // root_px) * (cols // root_px))):
        top = np.uintp(root // (cols // root_px)) * root_px
        left = np.uintp(root % (cols // root_px)) * root_px
        all_valid = True
        for y in range(np.uintp(0) if frame_valid else root_px):
            for x in range(root_px):
                all_valid &= valid[top + y, left + x]
        for k in range(np.uintp(node_bits.size)):
            node_bits[k] = 0.0
        for plane in range(np.uintp(num_planes)):
            _nodes_of_root(
                bins, valid, plane, all_valid, top, left, base_patch_size, num_scales, merge_from,
                cell_yx, histograms, clogc, keep_largest, node_bits, num_valid,
            )  # fmt: skip
        node = np.uintp(0)
        nodes = np.uintp(cell_yx.shape[0])
        for s in range(num_scales):
            size = np.uintp(base_patch_size << s)
            for cell in range(nodes):
                y, x = top // size + cell_yx[cell, 0], left // size + cell_yx[cell, 1]
                at = np.uintp(offsets[s]) + y * (cols // size) + x
                if size == 1:
                    scores[at] = 0.0 if valid[y, x] else np.nan
                else:
                    limit = normalizers[np.uintp(num_valid[node + cell])]
                    scores[at] = np.float32(node_bits[node + cell] * unit / limit)
            node += nodes
            nodes //= np.uintp(4)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _nodes_of_root(
    bins: np.ndarray,
    valid: np.ndarray,
    plane: Unsigned,
    all_valid: bool,
    top: Unsigned,
    left: Unsigned,
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
    node = np.uintp(0)
    nodes = np.uintp(cell_yx.shape[0])
    for s in range(num_scales):
        size = np.uintp(base_patch_size << s)
        # One pixel has no entropy; the caller knows.
        for cell in range(nodes if size > 1 else np.uintp(0)):
            y, x = top + cell_yx[cell, 0] * size, left + cell_yx[cell, 1] * size
            if s > merge_from:
                child = node - np.uintp(4) * (nodes - cell)
                count = np.int64(0)
                for k in range(np.uintp(4)):
                    count += num_valid[child + k]
                used = _add_children(histograms, cell, clogc)
            elif size == 2:
                count, used = _pairs_of_four(bins, valid, plane, y, x, clogc)
            else:
                row = cell if s == merge_from else np.uintp(0)
                for k in range(np.uintp(histograms.shape[1])):
                    histograms[row, k] = 0
                if not all_valid:
                    count, used = _count_valid(
                        bins, valid, plane, y, x, size, histograms, row, clogc
                    )
                else:
                    count, used = np.int64(size * size), np.int64(0)
                    # A fixed number of turns is unrolled.
                    if size == 4:
                        for dy in range(np.uintp(4)):
                            for dx in range(np.uintp(4)):
                                used += _count_one(
                                    bins, plane, y + dy, x + dx, histograms, row, clogc
                                )
                    else:
                        for dy in range(size):
                            for dx in range(size):
                                used += _count_one(
                                    bins, plane, y + dy, x + dx, histograms, row, clogc
                                )
            num_valid[node + cell] = count
            bits = (clogc[0, np.uintp(count)] - used) / count
            if keep_largest:
                # Comparing with NaN is False: a cell without a pixel keeps NaN.
                larger = node_bits[node + cell] >= bits
                node_bits[node + cell] = node_bits[node + cell] if larger else bits
            else:
                node_bits[node + cell] += bits
        node += nodes
        nodes //= np.uintp(4)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_one(
    bins: np.ndarray,
    plane: Unsigned,
    y: Unsigned,
    x: Unsigned,
    histograms: np.ndarray,
    row: Unsigned,
    clogc: np.ndarray,
) -> Any:
    """Count one pixel; by how much it raises the histogram's sum of `c * log2(c)`."""
    k = np.uintp(bins[plane, y, x])
    seen = np.uintp(histograms[row, k])
    histograms[row, k] = seen + np.uintp(1)
    return clogc[np.uintp(1), seen]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_valid(
    bins: np.ndarray,
    valid: np.ndarray,
    plane: Unsigned,
    top: Unsigned,
    left: Unsigned,
    size: Unsigned,
    histograms: np.ndarray,
    row: Unsigned,
    clogc: np.ndarray,
) -> tuple[Any, Any]:
    """Count a cell's valid pixels; their number, and the histogram's sum of `c * log2(c)`."""
    count, used = np.int64(0), np.int64(0)
    for dy in range(size):
        for dx in range(size):
            if valid[top + dy, left + dx]:
                used += _count_one(bins, plane, top + dy, left + dx, histograms, row, clogc)
                count += 1
    return count, used


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _pairs_of_four(
    bins: np.ndarray,
    valid: np.ndarray,
    plane: Unsigned,
    y: Unsigned,
    x: Unsigned,
    clogc: np.ndarray,
) -> tuple[Any, Any]:
    """Valid pixels of a 2 x 2 cell, and their sum of `c * log2(c)`, without a histogram.

    The number of equal pairs tells the counts: 0 all differ, 1 one pair, 2 two pairs, 3 three
    alike, 6 all alike.
    """
    one = np.uintp(1)
    a, b = bins[plane, y, x], bins[plane, y, x + one]
    c, d = bins[plane, y + one, x], bins[plane, y + one, x + one]
    va, vb = valid[y, x], valid[y, x + one]
    vc, vd = valid[y + one, x], valid[y + one, x + one]
    pairs = np.int64((a == b) & va & vb) + np.int64((a == c) & va & vc)
    pairs += np.int64((a == d) & va & vd) + np.int64((b == c) & vb & vc)
    pairs += np.int64((b == d) & vb & vd) + np.int64((c == d) & vc & vd)
    count = np.int64(va) + np.int64(vb) + np.int64(vc) + np.int64(vd)
    if pairs <= 2:
        return count, pairs * clogc[0, 2]
    return count, clogc[0, 3] if pairs == 3 else clogc[0, 4]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add_children(histograms: np.ndarray, cell: Unsigned, clogc: np.ndarray) -> Any:
    """Put the sum of rows `4 * cell ...` into row `cell`; the sum of its `c * log2(c)`.

    In place: a child's row is read before any later cell overwrites it, because `cell <= 4 * cell`.
    """
    first = np.uintp(4) * cell
    num_bins = np.uintp(histograms.shape[1])
    for k in range(num_bins):
        histograms[cell, k] = (
            histograms[first, k]
            + histograms[first + np.uintp(1), k]
            + histograms[first + np.uintp(2), k]
            + histograms[first + np.uintp(3), k]
        )
    used = np.int64(0)
    for k in range(num_bins):
        used += clogc[np.uintp(0), np.uintp(histograms[cell, k])]
    return used
