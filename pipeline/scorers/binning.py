"""From pixel values to histogram bins.

`num_bins` equal bins over each band's value range; values outside count into the first or last bin, and
the top edge belongs to the last bin, as in `numpy.histogram`.
"""

from functools import lru_cache

import numba
import numpy as np

# Types of so many bits or fewer are binned by table.
_TABLE_BITS = 16


def bin_indices(
    image: np.ndarray, value_ranges: tuple[tuple[float, float], ...], num_bins: int
) -> np.ndarray:
    """uint8 or uint16 [band, y, x]: the histogram bin of every pixel (of invalid ones, any bin)."""
    indices = np.empty(image.shape, np.uint8 if num_bins <= 256 else np.uint16)
    if image.dtype.kind in "iu" and image.dtype.itemsize * 8 <= _TABLE_BITS:
        tables = _bin_tables(image.dtype.str, value_ranges, num_bins)
        _bins_from_tables(image.view(np.dtype(f"u{image.dtype.itemsize}")), tables, indices)
    else:
        _bins_from_edges(image, _bin_edges(value_ranges, num_bins), indices)
    return indices


def _bin_edges(value_ranges: tuple[tuple[float, float], ...], num_bins: int) -> np.ndarray:
    """float64 [band, num_bins + 1]."""
    return np.stack([np.linspace(low, high, num_bins + 1) for low, high in value_ranges])


@lru_cache(maxsize=32)
def _bin_tables(
    dtype: str, value_ranges: tuple[tuple[float, float], ...], num_bins: int
) -> np.ndarray:
    """[band, number]: bin of every number an 8- or 16-bit type holds, by its bits read as unsigned."""
    kind = np.dtype(dtype)
    values = np.arange(2 ** (8 * kind.itemsize), dtype=np.dtype(f"u{kind.itemsize}")).view(kind)
    edges = _bin_edges(value_ranges, num_bins)
    bins = np.stack([np.searchsorted(row, values, side="right") - 1 for row in edges])
    return np.clip(bins, 0, num_bins - 1).astype(np.uint8 if num_bins <= 256 else np.uint16)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _bins_from_tables(image: np.ndarray, tables: np.ndarray, indices: np.ndarray) -> None:
    num_bands, rows, cols = image.shape
    for band in range(num_bands):
        for y in range(rows):
            for x in range(cols):
                indices[band, y, x] = tables[band, image[band, y, x]]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _bins_from_edges(image: np.ndarray, edges: np.ndarray, indices: np.ndarray) -> None:
    """Bins by arithmetic, corrected against the edges: rounding may be off by one bin."""
    num_bands, rows, cols = image.shape
    last = edges.shape[1] - 2
    for band in range(num_bands):
        low, high = edges[band, 0], edges[band, last + 1]
        per_unit = (last + 1) / (high - low)
        for y in range(rows):
            for x in range(cols):
                value = np.float64(image[band, y, x])
                k = 0  # also for NaN, whose pixel is invalid
                if value >= high:
                    k = last
                elif value > low:
                    k = min(int((value - low) * per_unit), last)
                    if value < edges[band, k]:
                        k -= 1
                    elif k < last and value >= edges[band, k + 1]:
                        k += 1
                indices[band, y, x] = k
