"""Turns and crops of frames: what they do to pixels, and to partitions without a look at the pixels.

A turn is one of the eight symmetries of the square, numbered by three bits: 4 swaps y and x, then 2
reverses y, then 1 reverses x. A turned quadtree has the same leaves in another order: a leaf of scale
`s` moves with its `4**s` cells, which stay neighbours in storage order.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from pipeline import segments
from pipeline.grid import BaseGrid

NUM_TURNS = 8
IDENTITY = 0
FLIPS = (0, 1, 2, 3)
# By 0, 90, 180 and 270 degrees, counter-clockwise.
ROTATIONS = (0, 6, 3, 5)
_SWAP, _REVERSE_Y, _REVERSE_X = 4, 2, 1
# Frames are turned so many bytes at once: more would leave the processor's cache between two copies.
_SCRATCH_BYTES = 1 << 20


def turned(array: np.ndarray, turn: int) -> np.ndarray:
    """A view of [..., y, x] after one turn."""
    if turn & _SWAP:
        array = array.swapaxes(-1, -2)
    if turn & _REVERSE_Y:
        array = array[..., ::-1, :]
    return array[..., ::-1] if turn & _REVERSE_X else array


def compose(first: int, then: int) -> int:
    """The turn that does what two turns do one after another."""
    return then ^ (_flips_swapped(first) if then & _SWAP else first)


def inverse(turn: int) -> int:
    """The turn that undoes a turn."""
    return _flips_swapped(turn) if turn & _SWAP else turn


def _flips_swapped(turn: int) -> int:
    return (turn & _SWAP) | (turn & _REVERSE_X) << 1 | (turn & _REVERSE_Y) >> 1


def turn_rasters(frames: np.ndarray, turns: np.ndarray) -> None:
    """Turn frames [F, ..., y, x], square ones, in place by `turns` int [F]."""
    assert frames.shape[-1] == frames.shape[-2], frames.shape
    for turn, some in _by_turn(turns, frames[:1].nbytes):
        if turn != IDENTITY:
            frames[some] = turned(frames[some], turn)


def crop_rasters(
    frames: np.ndarray, corners: np.ndarray, turns: np.ndarray, out: np.ndarray
) -> None:
    """Fill `out` [F, ..., size, size] with a window of each frame [..., y, x], turned by `turns` int [F].

    `corners` (y, x) int [F, 2] are the windows' top left.
    """
    windows = np.lib.stride_tricks.sliding_window_view(frames, out.shape[-2:], (-2, -1))
    for turn, some in _by_turn(turns, out[:1].nbytes):
        y, x = corners[some].T
        out[some] = turned(windows[some, ..., y, x, :, :], turn)


def _by_turn(turns: np.ndarray, frame_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Turns and some of the frames they are for, int64, until all have come."""
    at_once = max(1, _SCRATCH_BYTES // max(1, frame_bytes))
    for turn in range(NUM_TURNS):
        chosen = np.flatnonzero(turns == turn)
        for begin in range(0, chosen.size, at_once):
            yield turn, chosen[begin : begin + at_once]


def turn_scales(
    scales: np.ndarray, counts: np.ndarray, turns: np.ndarray, grid: BaseGrid
) -> np.ndarray:
    """uint8 [leaf]: the partitions of frames after `turns` int [F], missing bits with their leaves.

    `scales` uint8 [leaf] are the leaves of frame after frame, `counts` [F] each; both are those of whole
    frames on `grid`, and the counts stay what they are.
    """
    frame = np.arange(counts.size)
    starts, lengths = segments.starts(scales), segments.run_lengths(scales)
    # A frame's leaves cover all its cells: `starts` counts on over frames, as does `moved`.
    cell = starts + np.repeat((turns - frame) * grid.num_cells, counts)
    moved = moved_cells(grid).reshape(-1)[cell] & -lengths
    moved += np.repeat(frame * grid.num_cells, counts)
    # One sort of whole words is faster than finding the order and following it.
    words = (moved << 8) | scales
    words.sort()
    return words.astype(np.uint8)


@lru_cache(maxsize=8)
def moved_cells(grid: BaseGrid) -> np.ndarray:
    """int32 [turn, cell]: where a turn takes each cell, both in storage order, of a square grid."""
    assert grid.rows == grid.cols, grid
    place = np.empty(grid.num_cells, np.int32)
    place[grid.storage_order] = np.arange(grid.num_cells)
    on_grid = place.reshape(grid.rows, grid.cols)
    table = np.empty((NUM_TURNS, grid.num_cells), np.int32)
    for turn in range(NUM_TURNS):
        table[turn, turned(on_grid, turn).reshape(-1)] = place
    table.setflags(write=False)
    return table


def crop_scales(
    scales: np.ndarray, counts: np.ndarray, corners: np.ndarray, size: int, grid: BaseGrid
) -> tuple[np.ndarray, np.ndarray]:
    """The partitions of windows of `size x size` roots from `corners` (y, x) int [F, 2] on, in roots.

    Arguments and results as in `turn_scales`, with int64 [F] leaves per frame; those of a root lie one
    after another, so they are kept or left out together. The result lies on `cropped_grid`.
    """
    rows, cols = grid.rows // grid.root_cells, grid.cols // grid.root_cells
    y = np.arange(rows)[:, None] - corners[:, None, None, 0]
    x = np.arange(cols) - corners[:, None, None, 1]
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    root = segments.starts(scales) // grid.root_cells**2
    kept = inside.reshape(-1)[root]
    return scales[kept], np.bincount(root[kept] // (rows * cols), minlength=counts.size)


def cropped_grid(grid: BaseGrid, size: int) -> BaseGrid:
    """The grid of `size x size` roots of `grid`."""
    return replace(grid, rows=size * grid.root_cells, cols=size * grid.root_cells)
