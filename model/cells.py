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


def runs(first: Tensor, scales: Tensor, total: int) -> Tensor:
    """int64 [total]: the numbers `first[i] ... first[i] + 4**scales[i] - 1`, run after run."""
    lengths = 1 << 2 * scales
    offset = first - (lengths.cumsum(0) - lengths)
    # Told the size, a GPU need not be waited for.
    offset = offset.repeat_interleave(lengths, output_size=total)
    return offset + torch.arange(total, device=first.device)


@lru_cache(maxsize=32)
def cell_tables(grid: BaseGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [cell] each: row-major index of every storage position, and the other way round."""
    order = torch.from_numpy(grid.storage_order).to(device)
    return order, order.argsort()


def cut(frames: Tensor, grid: BaseGrid, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[M, C, P, P]: cells `at` (frame, row, column) of frames [F, C, y, x]."""
    kind = frames.dtype
    if kind in SIGNED:
        frames = frames.view(SIGNED[kind])
    frames = _whole_cells(frames, grid)
    p = frames.shape[-1] // grid.cols
    wide = None if frames.requires_grad else _OF_BYTES.get(p * frames.itemsize)
    frame, row, column = at
    if wide is None:
        blocks = frames.unflatten(3, (grid.cols, p)).unflatten(2, (grid.rows, p))
        cells = blocks[frame, :, row, :, column]
        return cells.view(kind) if kind in SIGNED else cells
    # A row of a cell moves as one number: four times as fast as px by px.
    blocks = frames.contiguous().view(wide).unflatten(2, (grid.rows, p))
    return blocks[frame, :, row, :, column].view(kind).unflatten(2, (p, p))


def _whole_cells(frames: Tensor, grid: BaseGrid) -> Tensor:
    """Frames [F, C, y, x] with a whole number of px per cell: as they are, or by nearest neighbour."""
    for axis, cells in ((2, grid.rows), (3, grid.cols)):
        size = frames.shape[axis]
        if size % cells:
            wanted = -(-size // cells) * cells
            centres = 2 * torch.arange(wanted, device=frames.device) + 1
            frames = frames.index_select(axis, centres * size // (2 * wanted))
    return frames
