"""Scattering tokens back to the base grid: every cell gets the token that covers it."""

import torch
from torch import Tensor

from model.packing import TokenBatch


def run_lengths(batch: TokenBatch) -> Tensor:
    """int64 [N]: base cells each token covers."""
    return torch.ones_like(batch.scales, dtype=torch.int64) << (2 * batch.scales.to(torch.int64))


def scatter_to_grid(tokens_ND: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Tokens on the grids of their frames: [F, rows, cols, D], and bool [F, rows, cols].

    The mask is True where a token covers the cell; cells of missing leaves are zero and False.
    """
    grid, cells = batch.grid, batch.grid.num_cells
    rows_MD = tokens_ND.repeat_interleave(
        run_lengths(batch), dim=0, output_size=batch.cell_index.numel()
    )
    order = torch.from_numpy(grid.storage_order).to(tokens_ND.device)
    frame, position = batch.cell_index // cells, batch.cell_index % cells
    at = frame * cells + order[position]
    on_grid = tokens_ND.new_zeros(batch.num_frames * cells, tokens_ND.shape[1])
    covered = torch.zeros(batch.num_frames * cells, dtype=torch.bool, device=tokens_ND.device)
    shape = (batch.num_frames, grid.rows, grid.cols)
    return on_grid.index_copy(0, at, rows_MD).view(*shape, -1), covered.index_fill(
        0, at, True
    ).view(shape)


def read_at_leaves(on_grid: Tensor, batch: TokenBatch) -> Tensor:
    """[N, D]: the value of [F, rows, cols, D] at each token's top-left base cell."""
    lengths = run_lengths(batch)
    first = batch.cell_index[lengths.cumsum(0) - lengths]
    frame = first // batch.grid.num_cells
    y, x = batch.positions[:, 0].long(), batch.positions[:, 1].long()
    return on_grid[frame, y, x]
