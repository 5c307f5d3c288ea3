"""Cutting frames into leaves, many frames per call: which nodes are split, then what is left.

A rule decides which nodes it would split, bool [frame, node] (nodes as in `pipeline.nodes`); a node
takes part only if all its ancestors are split. Walking the cells in storage order then yields the
leaves. Nodes that are NaN, and base cells, are never split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from pipeline.grid import BaseGrid
from pipeline.nodes import level_offsets
from pipeline.segments import MISSING_BIT

# A heap key is one integer: score above, first base cell below it, scale in the lowest bits.
_SCALE_BITS = 3
_CELL_BITS = 32 - _SCALE_BITS


@dataclass(frozen=True)
class Leaves:
    """Partitions of many frames, one after another.

    `scales` uint8 [row] holds the frames' leaves without gaps, `counts` int32 [frame] each frame's
    leaves, missing ones included, and `tokens` int32 [frame, scale] those that are not missing.
    """

    scales: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray


def splits_by_thresholds(
    nodes: np.ndarray, thresholds: np.ndarray | Sequence[float], grid: BaseGrid
) -> np.ndarray:
    """bool [frame, node]: a node is split where its score reaches the threshold of its size.

    `thresholds` [level] or [frame, level] are fine to coarse; they are compared in float32.
    """
    limits = np.atleast_2d(np.asarray(thresholds, np.float32))
    offsets = level_offsets(grid)
    splits = np.zeros(nodes.shape, np.bool_)
    for level in range(1, grid.num_scales):
        here = np.s_[:, offsets[level] : offsets[level + 1]]
        # False for NaN.
        np.greater_equal(nodes[here], limits[:, level - 1, None], out=splits[here])
    return splits


def splits_by_budget(nodes: np.ndarray, num_tokens: int, grid: BaseGrid) -> np.ndarray:
    """bool [frame, node]: the splits that bring every frame to at most `num_tokens` tokens.

    From the roots on, the leaf with the highest score is split, ties in storage order, as long as the
    count stays within the budget; a leaf that does not fit is passed over. A split costs its present
    children less one: missing children are no tokens. In the end no further split fits. Where the
    roots alone are more than the budget they stay: no quadtree has fewer leaves.
    """
    assert grid.num_cells < 1 << _CELL_BITS
    splits = np.zeros(nodes.shape, np.bool_)
    _split_highest(nodes, level_offsets(grid), min(num_tokens, grid.num_cells), splits)
    return splits


def leaves(splits: np.ndarray, nodes: np.ndarray, grid: BaseGrid) -> Leaves:
    """The leaves of every frame, missing where the frame's own score in `nodes` is NaN.

    `splits` and `nodes` are [frame, node]; frames that share a partition have equal splits.
    """
    counts = np.empty(len(nodes), np.int32)
    tokens = np.zeros((len(nodes), grid.num_scales), np.int32)
    scales = np.empty(len(nodes) * grid.num_cells, np.uint8)
    used = _walk(splits, nodes, level_offsets(grid), scales, counts, tokens)
    return Leaves(scales[:used], counts, tokens)


def partition_blocks(
    group: str, slots: np.ndarray, cut: Leaves, num_slots: int
) -> dict[str, np.ndarray]:
    """The arrays of a partition, by path, of a shard's leading `num_slots` slots.

    `slots`, ascending, are those of the frames in `cut`; the others have no leaf.
    """
    counts = np.zeros(num_slots, np.int32)
    tokens = np.zeros((num_slots, cut.tokens.shape[1]), np.int32)
    counts[slots], tokens[slots] = cut.counts, cut.tokens
    return {f"{group}/scales": cut.scales, f"{group}/counts": counts, f"{group}/tokens": tokens}


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _walk(
    splits: np.ndarray,
    nodes: np.ndarray,
    offsets: np.ndarray,
    scales: np.ndarray,
    counts: np.ndarray,
    tokens: np.ndarray,
) -> int:
    """Walk the cells in storage order; at each, the largest node that starts here and is not split.

    A larger node that merely contains the cell began earlier, so it was split already.
    """
    num_cells = offsets[1]
    coarsest = offsets.size - 2
    row = 0
    for frame in range(nodes.shape[0]):
        first = row
        cell = 0
        while cell < num_cells:
            s = coarsest
            while cell & ((1 << (2 * s)) - 1):
                s -= 1
            node = offsets[s] + (cell >> (2 * s))
            while splits[frame, node]:
                s -= 1
                node = offsets[s] + (cell >> (2 * s))
            if np.isnan(nodes[frame, node]):
                scales[row] = s | MISSING_BIT
            else:
                scales[row] = s
                tokens[frame, s] += 1
            row += 1
            cell += 1 << (2 * s)
        counts[frame] = row - first
    return row


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _split_highest(nodes: np.ndarray, offsets: np.ndarray, budget: int, splits: np.ndarray) -> None:
    """Mark the splits of every frame, with a binary heap of the leaves that could be split.

    Counts never fall, so a leaf that does not fit now never will, and each is looked at once.
    """
    coarsest = offsets.size - 2
    if coarsest == 0:
        return
    bits = nodes.view(np.uint32)
    heap = np.empty(offsets[-1] - offsets[1] + 1, np.uint64)
    for frame in range(nodes.shape[0]):
        size = 0
        count = 0
        for node in range(offsets[coarsest], offsets[coarsest + 1]):
            if not np.isnan(nodes[frame, node]):
                count += 1
                key = _key(bits[frame, node], node - offsets[coarsest], coarsest)
                size = _push(heap, size, key)
        while size:
            low = ~heap[0] & np.uint64(0xFFFFFFFF)
            size = _pop(heap, size)
            s = np.int64(low & np.uint64((1 << _SCALE_BITS) - 1))
            index = np.int64(low >> np.uint64(_SCALE_BITS)) >> (2 * s)
            child = offsets[s - 1] + 4 * index
            gain = -1
            for k in range(child, child + 4):
                gain += not np.isnan(nodes[frame, k])
            if count + gain > budget:
                continue
            count += gain
            splits[frame, offsets[s] + index] = True
            if s > 1:
                for k in range(4):
                    if not np.isnan(nodes[frame, child + k]):
                        key = _key(bits[frame, child + k], 4 * index + k, s - 1)
                        size = _push(heap, size, key)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _key(score_bits: Any, index: Any, scale: Any) -> Any:
    """uint64 that sorts like (score, storage order reversed); -0.0 counts as 0.0."""
    score = np.uint32(score_bits)
    if score == np.uint32(0x80000000):
        score = np.uint32(0)
    # Float bits in ascending order of value: flip the sign bit, or everything below zero.
    score ^= np.uint32(0xFFFFFFFF if score >> np.uint32(31) else 0x80000000)
    place = (np.uint64(index) << np.uint64(2 * scale + _SCALE_BITS)) | np.uint64(scale)
    return (np.uint64(score) << np.uint64(32)) | (~place & np.uint64(0xFFFFFFFF))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _push(heap: np.ndarray, size: int, key: int) -> int:
    """Add a key to a max-heap of `size` keys; its new size."""
    at = size
    while at > 0:
        above = (at - 1) >> 1
        if heap[above] >= key:
            break
        heap[at] = heap[above]
        at = above
    heap[at] = key
    return size + 1


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _pop(heap: np.ndarray, size: int) -> int:
    """Remove the largest key of a max-heap; its new size."""
    size -= 1
    key = heap[size]
    at = 0
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and heap[below + 1] > heap[below]:
            below += 1
        if heap[below] <= key:
            break
        heap[at] = heap[below]
        at = below
    heap[at] = key
    return size
