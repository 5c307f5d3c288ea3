"""Scattering tokens back to the base grid: every cell gets the token that covers it.

All of it is one look-up of tokens by their number, made from numbers alone (`TokenBatch.covering`). Its
backward adds up the gradients of a token's cells. Shape suffixes are those of `model.batch`, and

- H, W = base cells of a frame (y, x); T = timesteps; S = band sets of a modality
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.batch import TokenBatch


def to_grid(tokens_ND: Tensor, batch: TokenBatch, modality: int | str = 0) -> tuple[Tensor, Tensor]:
    """A modality's tokens on the base grid: [B, H, W, T, S, D], and bool [B, H, W, T, S].

    `modality` is a name or a position in the batch. T is the most timesteps a tile of the batch has in it,
    1 for static modalities. The mask is True where a token covers the cell; cells without one, of missing
    leaves and frames, are zero and False. Raises ConfigError for a modality the batch does not have.
    """
    number = batch.modality_number(modality)
    band_sets = range(len(batch.modalities[number].band_sets))
    covering_SFHW = torch.stack([_with_no_frame(batch, number, b) for b in band_sets])
    frame_BT = _frame_table(batch, number)
    by_frame = covering_SFHW[:, frame_BT.flatten()].unflatten(1, frame_BT.shape)
    covering_BHWTS = by_frame.permute(1, 3, 4, 2, 0)
    return _look_up(tokens_ND, covering_BHWTS)


def tokens_at(
    tokens_ND: Tensor, batch: TokenBatch, modality: int | str, band_set: int, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [k, D] over some cells, and bool [k]: what `to_grid` has there, without making the grid.

    `cells` int64 [k, 4]: (tile, y, x, timestep), `y` and `x` in base cells. Where no token covers the cell,
    and at timesteps without a frame, tokens are zero and False. Raises ConfigError for a modality the batch
    does not have, and IndexError for cells outside the grid (on a GPU, which would have to be waited for,
    that is an assertion of the device).
    """
    number = batch.modality_number(modality)
    frames = batch.modalities[number]
    _check_cells(cells, (batch.num_tiles, frames.grid.rows, frames.grid.cols))
    tile, y, x, timestep = cells.unbind(1)
    known = (timestep >= 0) & (timestep < frames.num_timesteps)
    of_tile = _frame_table(batch, number)[tile, timestep.clamp(0, frames.num_timesteps - 1)]
    frame = torch.where(known, of_tile, frames.num_frames)
    return _look_up(tokens_ND, _with_no_frame(batch, number, band_set)[frame, y, x])


def scatter_to_grid(
    tokens_ND: Tensor, batch: TokenBatch, modality: int | str = 0, band_set: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens of a band set on the grids of its frames: [F, rows, cols, D], and bool [F, rows, cols].

    The mask is True where a token covers the cell; cells of missing leaves are zero and False.
    """
    return _look_up(tokens_ND, batch.covering(batch.modality_number(modality), band_set))


def read_at_leaves(
    on_grid: Tensor, batch: TokenBatch, modality: int = 0, band_set: int = 0
) -> Tensor:
    """[n, D]: the value of [F, rows, cols, D] at the top-left base cell of each of a band set's tokens."""
    at = batch.token_index(modality, band_set)
    y, x = batch.positions[at, :2].long().unbind(1)
    return on_grid[batch.frame[at], y, x]


def _look_up(tokens_ND: Tensor, covering: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] and bool [...]: tokens by number [...]; zero and False where the number is N."""
    nothing = len(tokens_ND)
    with_zero = pad(tokens_ND, (0, 0, 0, 1))
    # index_select: the backward of indexing with [] is several times slower.
    found = with_zero.index_select(0, covering.flatten())
    return found.view(*covering.shape, tokens_ND.shape[1]), covering < nothing


def _with_no_frame(batch: TokenBatch, modality: int, band_set: int) -> Tensor:
    """int64 [F + 1, H, W]: as `TokenBatch.covering`, and a last frame that no token covers."""
    return pad(batch.covering(modality, band_set), (0, 0, 0, 0, 0, 1), value=batch.num_tokens)


def _frame_table(batch: TokenBatch, modality: int) -> Tensor:
    """int64 [B, T]: the frame of every tile and timestep; F where there is none."""
    frames = batch.modalities[modality]
    shape = (batch.num_tiles, frames.num_timesteps)
    table = torch.full(shape, frames.num_frames, device=batch.device)
    numbers = torch.arange(frames.num_frames, device=batch.device)
    return table.index_put((frames.tile, frames.timestep), numbers)


def _check_cells(cells: Tensor, limits: tuple[int, int, int]) -> None:
    if cells.device.type != "cpu":
        return
    for name, numbers, limit in zip(("tile", "y", "x"), cells.T, limits, strict=False):
        outside = numbers[(numbers < 0) | (numbers >= limit)]
        if outside.numel():
            raise IndexError(
                f"cells name {name} {outside[0]}, the batch has {limit}: give numbers from 0 to {limit - 1}"
            )
