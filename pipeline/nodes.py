"""Score maps as quadtree nodes: one row per frame, every level in storage order.

Level `s` of a row is a slice, fine to coarse, and node `i` of a level has the children `4 i ... 4 i + 3`
of the level below:

    base cells 0 1 2 3 | 4 5 6 7 | ...      level 1: 0 | 1 | ...      level 2: 0 ...

NaN marks a node without a valid pixel; a node is NaN exactly if all its children are.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid

Shared = Literal["max", "mean"]


@lru_cache(maxsize=32)
def level_offsets(grid: BaseGrid) -> np.ndarray:
    """int64 [level + 1]: first node of each level in a row; the last entry is the row's length."""
    sizes = [grid.num_cells >> (2 * s) for s in range(grid.num_scales)]
    offsets = np.cumsum([0, *sizes])
    offsets.setflags(write=False)
    return offsets


@lru_cache(maxsize=32)
def _node_order(grid: BaseGrid) -> np.ndarray:
    """int64 [node]: where in the row-major levels, laid side by side, each node comes from."""
    return np.concatenate(
        [
            BaseGrid(*grid.level_shape(s), size, grid.num_scales - s).storage_order + offset
            for s, (size, offset) in enumerate(
                zip(grid.patch_sizes, level_offsets(grid)[:-1], strict=True)
            )
        ]
    )


def node_scores(maps: Sequence[np.ndarray], grid: BaseGrid) -> np.ndarray:
    """float32 [frame, node] from score maps [frame, cell_y, cell_x], fine to coarse.

    Raises ConfigError if the maps are not those of the grid.
    """
    shapes = [(len(maps[0]), *grid.level_shape(s)) for s in range(grid.num_scales)]
    if [m.shape for m in maps] != shapes:
        raise ConfigError(
            f"score maps have shapes {[m.shape for m in maps]}; the grid has {shapes}"
        )
    flat = [
        np.asarray(m, np.float32).reshape(len(m), y * x)
        for m, (_, y, x) in zip(maps, shapes, strict=True)
    ]
    return np.concatenate(flat, axis=1).take(_node_order(grid), axis=1)


def shared_nodes(nodes: np.ndarray, tile_starts: np.ndarray, how: Shared) -> np.ndarray:
    """float32 [tile, ...]: the scores all frames of a tile share, from those of each [frame, ...].

    Tile `t` has the frames from `tile_starts[t]` to the next start. NaN frames do not count; NaN where
    all are.
    """
    if how == "max":
        return np.fmax.reduceat(nodes, tile_starts, axis=0)
    known = ~np.isnan(nodes)
    number = np.add.reduceat(known, tile_starts, axis=0, dtype=np.int64)
    total = np.add.reduceat(np.where(known, nodes, 0), tile_starts, axis=0, dtype=np.float64)
    mean = np.full(total.shape, np.nan)
    np.divide(total, number, out=mean, where=number > 0)
    return mean.astype(np.float32)


def shared_maps(maps: Sequence[np.ndarray], how: Shared) -> list[np.ndarray]:
    """Score maps [cell_y, cell_x] that all frames share, from maps [frame, cell_y, cell_x]."""
    return [shared_nodes(level, np.zeros(1, np.int64), how)[0] for level in maps]
