"""Untagged zero borders: pixels of zeros in every band that reach the scene's edge.

Sensors' swaths end within a scene, and many archives fill the rest with zeros without a nodata tag.
Such a region touches the edge; zeros that lie scattered inside are numbers like any other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.scenes import Window


@dataclass(frozen=True)
class BorderMask:
    """The border of a scene, one bit per pixel. `bits` is uint8 [y, ceil(width / 8)], or None where the
    scene has no border."""

    height: int
    width: int
    bits: np.ndarray | None

    def window(self, window: Window) -> np.ndarray:
        """bool [y, x]: True on the border. The window lies inside the scene."""
        top, left, height, width = window
        if self.bits is None:
            return np.zeros((height, width), np.bool_)
        first = left // 8
        rows = self.bits[top : top + height, first : -(-(left + width) // 8)]
        start = left - first * 8
        return np.unpackbits(rows, axis=1)[:, start : start + width].astype(np.bool_)


def find_border(
    read: Callable[[Window], np.ndarray], height: int, width: int, strip_rows: int
) -> BorderMask:
    """The pixels that are zero in all planes and connected, by rows and columns through such pixels, to
    the edge of a scene of `height` x `width` px.

    `read` yields pixels [plane, y, x]. The scene is read once, `strip_rows` at a time; the result does not
    depend on how many. Held at once are one strip, a bit per pixel, and tables of the strips' seams.
    """
    bits = np.zeros((height, -(-width // 8)), np.uint8)
    tops = range(0, height, strip_rows)
    seams = _Seams()
    for top in tops:
        rows = min(strip_rows, height - top)
        zero = ~(read(Window(top, 0, rows, width)) != 0).any(axis=0)
        bits[top : top + rows] = np.packbits(zero, axis=1)
        seams.add(_labels(zero), is_first=top == 0, is_last=top + rows == height)
    outer = seams.reaching_the_edge()
    if not any(len(labels) for labels in outer):
        return BorderMask(height, width, None)
    for top, labels in zip(tops, outer, strict=True):
        part = bits[top : top + strip_rows]
        zero = np.unpackbits(part, axis=1, count=width).astype(np.bool_)
        part[...] = np.packbits(_kept(_labels(zero), labels), axis=1)
    return BorderMask(height, width, bits)


class _Seams:
    """The regions of zeros that touch a strip's first or last row or the scene's sides, as the nodes of
    a graph whose edges join regions across seams; all others lie inside a strip and are no border."""

    def __init__(self) -> None:
        self._labels: list[np.ndarray] = []  # of the nodes of each strip, ascending
        self._outer: list[np.ndarray] = []  # whether each node touches the scene's edge
        self._joined: list[np.ndarray] = []  # pairs [n, 2] of numbers of nodes
        self._num_nodes = 0
        self._last_row = np.empty(0, np.intp)  # node per pixel of the row above, -1 for none

    def add(self, labels: np.ndarray, is_first: bool, is_last: bool) -> None:
        """Add the next strip's regions, int [y, x] numbered from 1, 0 between them."""
        edges = [labels[:, 0], labels[:, -1]]
        edges += [labels[0]] * is_first + [labels[-1]] * is_last
        outer = np.unique(np.concatenate(edges))
        nodes = np.unique(np.concatenate([outer, labels[0], labels[-1]]))
        nodes = nodes[nodes > 0]
        first, last = (self._nodes(nodes, row) for row in (labels[0], labels[-1]))
        if not is_first:
            both = (first >= 0) & (self._last_row >= 0)
            pairs = np.stack([self._last_row[both], first[both]], axis=1)
            self._joined.append(np.unique(pairs, axis=0))
        self._labels.append(nodes)
        self._outer.append(np.isin(nodes, outer))
        self._num_nodes += len(nodes)
        self._last_row = last

    def reaching_the_edge(self) -> list[np.ndarray]:
        """Of every strip, the labels of the regions that are connected to the scene's edge."""
        # Imported here: it takes long, and few archives have borders to look for.
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        joined = np.concatenate([np.empty((0, 2), np.intp), *self._joined])
        size = (self._num_nodes, self._num_nodes)
        graph = coo_array((np.ones(len(joined), np.bool_), joined.T), size)
        num_parts, part = connected_components(graph, directed=False)
        outer = np.zeros(num_parts, np.bool_)
        outer[part[np.concatenate(self._outer)]] = True
        ends = np.cumsum([len(nodes) for nodes in self._labels])
        kept = np.split(outer[part], ends[:-1])
        return [nodes[keep] for nodes, keep in zip(self._labels, kept, strict=True)]

    def _nodes(self, nodes: np.ndarray, row: np.ndarray) -> np.ndarray:
        found = np.searchsorted(nodes, row) + self._num_nodes
        return np.where(row > 0, found, -1)


def _labels(zero: np.ndarray) -> np.ndarray:
    """Regions connected by rows and columns, numbered from 1; the same for the same strip."""
    from scipy.ndimage import label

    labels = np.zeros(zero.shape, np.int32)
    if zero.any():
        label(zero, output=labels)
    return labels


def _kept(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    table = np.zeros(int(labels.max(initial=0)) + 1, np.bool_)
    table[kept] = True
    return table[labels]
