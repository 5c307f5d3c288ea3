"""Scattering tokens back to the base grid: every cell gets the token that covers it."""

import torch
from torch import Tensor

from model.batch import TokenBatch


def run_lengths(scales: Tensor) -> Tensor:
    """int64 [n]: base cells each token covers."""
    return 1 << 2 * scales.long()


def scatter_to_grid(
    tokens_ND: Tensor, batch: TokenBatch, modality: int = 0, band_set: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens of a band set on the grids of its frames: [F, rows, cols, D], and bool [F, rows, cols].

    The mask is True where a token covers the cell; cells of missing leaves are zero and False.
    """
    frames, at = batch.modalities[modality], batch.token_index(modality, band_set)
    grid, index = frames.grid, batch.cell_index(modality)
    rows_MD = tokens_ND.index_select(0, at).repeat_interleave(
        run_lengths(batch.scales[at]), dim=0, output_size=frames.num_covered
    )
    order = torch.from_numpy(grid.storage_order).to(tokens_ND.device)
    place = index // grid.num_cells * grid.num_cells + order[index % grid.num_cells]
    shape = (frames.num_frames, grid.rows, grid.cols)
    num_cells = frames.num_frames * grid.num_cells
    on_grid = tokens_ND.new_zeros(num_cells, tokens_ND.shape[1]).index_copy(0, place, rows_MD)
    covered = torch.zeros(num_cells, dtype=torch.bool, device=tokens_ND.device)
    return on_grid.view(*shape, -1), covered.index_fill(0, place, True).view(shape)


def read_at_leaves(
    on_grid: Tensor, batch: TokenBatch, modality: int = 0, band_set: int = 0
) -> Tensor:
    """[n, D]: the value of [F, rows, cols, D] at the top-left base cell of each of a band set's tokens."""
    at = batch.token_index(modality, band_set)
    y, x = batch.positions[at, :2].long().unbind(1)
    return on_grid[batch.frame[at], y, x]
