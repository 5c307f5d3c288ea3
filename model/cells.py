"""Cutting frames into the base cells of their grid, by a fixed number of tensor operations.

Shape suffixes are those of `model.batch`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from pipeline.grid import BaseGrid

# What torch can only do in part with unsigned numbers it does with signed ones of the same bits.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# Types by size, to move several small numbers as one.
_OF_BYTES = {
    1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128,
}  # fmt: skip


@lru_cache(maxsize=32)
def cell_tables(grid: BaseGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [cell] each: row-major index of every storage position, and the other way round."""
    # Tables made in inference mode could not be used for training later.
    with torch.inference_mode(False):
        order = torch.from_numpy(grid.storage_order).to(device)
        return order, order.argsort()


def cut(frames: Tensor, grid: BaseGrid, places: Tensor) -> Tensor:
    """[M, C, P, P]: some cells of frames [F, C, y, x], by frame * cells per frame + row-major index."""
    kind = frames.dtype
    if kind in SIGNED:
        frames = frames.view(SIGNED[kind])
    frames = _whole_cells(frames, grid)
    p = frames.shape[-1] // grid.cols
    # A row of a cell moves as one number, and a cell as one row of memory: both several times faster
    # than indexing px by px. Neither gradients nor empty arrays can be seen as another type.
    as_they_are = frames.requires_grad or not frames.numel()
    wide = None if as_they_are else _OF_BYTES.get(p * frames.itemsize)
    moved = frames if wide is None else frames.contiguous().view(wide)
    across = (grid.cols, moved.shape[-1] // grid.cols)
    blocks = moved.unflatten(3, across).unflatten(2, (grid.rows, p)).permute(0, 2, 4, 1, 3, 5)
    cells = blocks.flatten(0, 2).flatten(1).index_select(0, places)
    cells = cells if cells.dtype == kind else cells.view(kind)
    return cells.view(-1, frames.shape[1], p, p)


def shrink(pixels: Tensor, valid: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Patches [n, C, P, P] and validity [n, P, P] of nodes, from their base cells shrunk by `2**scale`.

    `pixels` [4**scale n, C, P, P] and `valid` [4**scale n, P, P] are base cells in storage order. A px
    becomes the mean of the valid ones of its `2**scale x 2**scale`, in float32 or wider; it is valid if one
    of them is, else 0.
    """
    there = _whole_nodes(valid[:, None], scale)
    if pixels.dtype != torch.float64:
        pixels = pixels.float()
    values = torch.where(there, _whole_nodes(pixels, scale), 0)
    count_n1PP = there.sum((3, 5))
    mean = values.sum((3, 5)) / count_n1PP.clamp(min=1)
    return mean, count_n1PP[:, 0] > 0


def _whole_nodes(cells: Tensor, scale: int) -> Tensor:
    """[n, C, P, 2**scale, P, 2**scale]: the squares of px that shrink to one, of base cells in Z-order."""
    p, side = cells.shape[-1], 2**scale
    # Bits of the Z-order: (y, x) of the coarsest level first.
    halves = cells.unflatten(0, (-1, *([2] * 2 * scale)))
    y_bits, x_bits = range(1, 2 * scale + 1, 2), range(2, 2 * scale + 1, 2)
    bands, y, x = range(2 * scale + 1, 2 * scale + 4)
    whole = halves.permute(0, bands, *y_bits, y, *x_bits, x)
    return whole.reshape(-1, cells.shape[1], p, side, p, side)


def _whole_cells(frames: Tensor, grid: BaseGrid) -> Tensor:
    """Frames [F, C, y, x] with a whole number of px per cell: as they are, or by nearest neighbour."""
    for axis, cells in ((2, grid.rows), (3, grid.cols)):
        size = frames.shape[axis]
        if size % cells:
            wanted = -(-size // cells) * cells
            centres = 2 * torch.arange(wanted, device=frames.device) + 1
            frames = frames.index_select(axis, centres * size // (2 * wanted))
    return frames
