"""Run-length segmentations: what a partition is, and everything that follows from it.

A partition of a sequence of units (base cells in storage order, but as well bytes or timesteps) is
`scales`, uint8 [leaf]: leaf `i` covers `4**scale` consecutive units. The high bit marks a leaf that
holds no valid pixel; it covers units but becomes no token. Run lengths, starts, positions and
descriptors are views computed from it, never stored.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from pipeline.errors import IntegrityError
from pipeline.grid import BaseGrid

MISSING_BIT = np.uint8(0x80)
SCALE_MASK = np.uint8(0x7F)

DESCRIPTOR = np.dtype(
    [
        ("y", np.int32),
        ("x", np.int32),
        ("scale", np.uint8),
        ("size", np.int32),
        ("score", np.float32),
        ("timestep", np.int32),
        ("missing", np.bool_),
    ]
)


def levels(scales: np.ndarray) -> np.ndarray:
    """Scale of every leaf, uint8 [leaf], without the missing bit."""
    return scales & SCALE_MASK


def is_missing(scales: np.ndarray) -> np.ndarray:
    """bool [leaf]: True where a leaf holds no valid pixel and so becomes no token."""
    return (scales & MISSING_BIT) != 0


def run_lengths(scales: np.ndarray) -> np.ndarray:
    """int64 [leaf]: number of consecutive units each leaf covers, `4**scale`."""
    return _RUN_LENGTHS.take(scales)


# int64 [byte]: a look-up takes a quarter of the time of the shifts.
_RUN_LENGTHS = np.int64(1) << (2 * levels(np.arange(256, dtype=np.uint8)).astype(np.int64))


def starts(scales: np.ndarray) -> np.ndarray:
    """int64 [leaf]: first unit of each leaf, the exclusive cumulative sum of the run lengths."""
    lengths = run_lengths(scales)
    return np.cumsum(lengths) - lengths


def counts_per_scale(scales: np.ndarray, num_scales: int) -> np.ndarray:
    """int64 [scale]: tokens (leaves that are not missing) of every scale, fine to coarse."""
    return np.bincount(scales[~is_missing(scales)], minlength=num_scales)


def check(scales: np.ndarray, grid: BaseGrid, name: str) -> None:
    """Raise IntegrityError unless the leaves tile the grid exactly, each aligned to its own size.

    Rows read from a store are untrusted: a wrong scale would silently shift every later token.
    """
    if scales.size and int(levels(scales).max()) >= grid.num_scales:
        raise IntegrityError(
            f"{name}: a leaf of scale {int(levels(scales).max())} in a quadtree of "
            f"{grid.num_scales} scales; the store is damaged, preprocess it again"
        )
    lengths, first = run_lengths(scales), starts(scales)
    if int(lengths.sum()) != grid.num_cells or np.any(first % lengths):
        raise IntegrityError(
            f"{name}: {scales.size} leaves cover {int(lengths.sum())} cells where the frame has "
            f"{grid.num_cells}, or lie off their own grid; the store is damaged, preprocess it again"
        )


def check_frames(
    scales: np.ndarray, counts: np.ndarray, grid: BaseGrid, name: Callable[[int], str]
) -> None:
    """`check` of many frames at once: `scales` [leaf] frame after frame, `counts` int64 [frame].

    `name(i)` names the frame in the message of the error.
    """
    lengths, misfits = _tables(grid.num_scales)
    longest = int(lengths.max())
    # Sums that wrap around would hide what is wrong.
    total = np.int32 if scales.size * longest < 2**31 else np.int64
    ends = np.cumsum(lengths.take(scales), dtype=total)
    # A leaf that begins at a multiple of its length ends at one, and every frame has whole roots.
    aligned = not np.bitwise_and(ends, misfits.take(scales)).any()
    of_frames = np.diff(np.append(0, ends).take(np.append(0, np.cumsum(counts))))
    if not aligned or (of_frames != grid.num_cells).any():
        for i, leaves in enumerate(np.split(scales, np.cumsum(counts)[:-1])):
            check(leaves, grid, name(i))
        raise AssertionError("frames that are right one by one are right together")


@lru_cache(maxsize=8)
def _tables(num_scales: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [byte]: by a leaf's byte its run length, and the bits that must be 0 where it ends."""
    levels = np.arange(256) & int(SCALE_MASK)
    known = levels < num_scales
    lengths = np.where(known, 4 ** np.minimum(levels, num_scales), 1)
    # No leaf of an unknown scale ends where all bits are 0.
    misfits = np.where(known, lengths - 1, -1)
    return lengths.astype(np.int32), misfits.astype(np.int32)


def leaf_scores(scales: np.ndarray, grid: BaseGrid, score_maps: list[np.ndarray]) -> np.ndarray:
    """float32 [leaf]: the score of each leaf, read from the maps [cell_y, cell_x].

    NaN for missing leaves, and for all where there are no maps.
    """
    yx = grid.cell_yx[starts(scales)]
    level = levels(scales)
    scores = np.full(scales.size, np.nan, np.float32)
    for s, level_map in enumerate(score_maps):
        here = level == s
        scores[here] = level_map[yx[here, 0] >> s, yx[here, 1] >> s]
    return scores


def descriptors(
    scales: np.ndarray, grid: BaseGrid, score_maps: list[np.ndarray], timestep: int = 0
) -> np.ndarray:
    """Structured array `DESCRIPTOR` [leaf], in storage order, missing leaves included.

    `y`, `x` are in base cells, `size` in px, `score` as the maps have it (NaN for missing leaves).
    """
    table = np.empty(scales.size, DESCRIPTOR)
    yx = grid.cell_yx[starts(scales)]
    table["y"], table["x"] = yx[:, 0], yx[:, 1]
    table["scale"] = levels(scales)
    table["size"] = grid.base_patch_size << levels(scales).astype(np.int32)
    table["score"] = leaf_scores(scales, grid, score_maps)
    table["timestep"] = timestep
    table["missing"] = is_missing(scales)
    return table
