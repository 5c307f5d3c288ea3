"""Base grids, roots and Z-order: where the cells of a frame are and in which order they are stored.

A frame is laid on a base grid of `Hb x Wb` cells of `p x p` px. Roots, the coarsest cells, hold
`2**(L-1) x 2**(L-1)` base cells. Storage order is root-major, Z-order inside:

        roots, row by row          cells of one root (L = 3)
        +----+----+----+            0  1  4  5
        | 0  | 1  | 2  |            2  3  6  7
        +----+----+----+            8  9 12 13
        | 3  | 4  | 5  |           10 11 14 15
        +----+----+----+

In this order a quadtree leaf of scale `s` covers exactly `4**s` consecutive cells.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.errors import ConfigError

# Bounds of what is configured and of what a store's header may claim: tables are made for a whole tile.
MAX_TILE_PX = 4096
MAX_SCALES = 6


@dataclass(frozen=True)
class BaseGrid:
    """The base cells of a frame: `rows x cols` cells of `base_patch_size` px, a whole number of roots."""

    rows: int
    cols: int
    base_patch_size: int
    num_scales: int

    def __post_init__(self) -> None:
        side = self.root_cells
        if self.rows % side or self.cols % side:
            raise ConfigError(
                f"a base grid of {self.rows} x {self.cols} cells is not a whole number of roots of "
                f"{side} x {side} cells; use a tile size that is a multiple of {self.root_size_px} px"
            )

    @property
    def root_cells(self) -> int:
        """Base cells along one side of a root."""
        return int(2 ** (self.num_scales - 1))

    @property
    def root_size_px(self) -> int:
        return self.base_patch_size * self.root_cells

    @property
    def num_cells(self) -> int:
        return self.rows * self.cols

    @property
    def shape_px(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.rows * self.base_patch_size, self.cols * self.base_patch_size

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Patch size in px of every level, fine to coarse."""
        return tuple(self.base_patch_size * 2**s for s in range(self.num_scales))

    def level_shape(self, scale: int) -> tuple[int, int]:
        """Cells (y, x) of the grid at level `scale`."""
        return self.rows >> scale, self.cols >> scale

    @property
    def cell_yx(self) -> np.ndarray:
        """int32 [cell, 2]: the (y, x) base-grid position of every cell in storage order."""
        return _cell_yx(self.rows, self.cols, self.num_scales)

    @property
    def storage_order(self) -> np.ndarray:
        """int64 [cell]: row-major index of every cell in storage order.

        `row_major[storage_order]` is in storage order; it is a permutation of `0 .. num_cells - 1`.
        """
        yx = self.cell_yx.astype(np.int64)
        return yx[:, 0] * self.cols + yx[:, 1]


def covering_grid(height_px: int, width_px: int, base_patch_size: int, num_scales: int) -> BaseGrid:
    """The smallest grid of whole roots that covers an image of any size."""
    root_cells = 2 ** (num_scales - 1)
    root_px = base_patch_size * root_cells
    return BaseGrid(
        rows=-(-height_px // root_px) * root_cells,
        cols=-(-width_px // root_px) * root_cells,
        base_patch_size=base_patch_size,
        num_scales=num_scales,
    )


def pad_to_grid(array: np.ndarray, grid: BaseGrid) -> np.ndarray:
    """Extend [..., y, x] with zeros (False) at the bottom and right to the grid's size in px."""
    height, width = grid.shape_px
    missing = (height - array.shape[-2], width - array.shape[-1])
    if missing == (0, 0):
        return array
    before_yx = [(0, 0)] * (array.ndim - 2)
    return np.pad(array, [*before_yx, (0, missing[0]), (0, missing[1])])


def morton_yx(num_levels: int) -> np.ndarray:
    """int32 [4**num_levels, 2]: (y, x) of Morton codes 0, 1, ...; x holds the even bits."""
    codes = np.arange(4**num_levels)
    yx = np.zeros((codes.size, 2), np.int32)
    for bit in range(num_levels):
        yx[:, 1] |= ((codes >> (2 * bit)) & 1) << bit
        yx[:, 0] |= ((codes >> (2 * bit + 1)) & 1) << bit
    return yx


@lru_cache(maxsize=32)
def _cell_yx(rows: int, cols: int, num_scales: int) -> np.ndarray:
    side = 2 ** (num_scales - 1)
    root_yx = np.indices((rows // side, cols // side), dtype=np.int32).reshape(2, -1).T * side
    cells = root_yx[:, None] + morton_yx(num_scales - 1)[None]
    table = np.ascontiguousarray(cells.reshape(-1, 2))
    table.setflags(write=False)
    return table
