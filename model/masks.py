"""Who sees which token: masks of tokens, and how those of cells become masks of tokens.

The rule: a token's mask is the highest of those of its cells that are not `MISSING`, in the order `ONLINE`,
`TARGET_ONLY`, `DECODER`; it is `MISSING` if all of them are. A hidden cell so hides the whole token, and
nothing that was to be hidden reaches those who may not see it; a missing cell takes no token away from the
others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.batch import MISSING, TokenBatch
from pipeline.errors import ConfigError

_NUM_MASKS = MISSING + 1


def with_token_masks(batch: TokenBatch, mask: Tensor) -> TokenBatch:
    """The same batch with a mask uint8 [N] of `ONLINE`, `TARGET_ONLY`, `DECODER`, `MISSING` per token.

    Raises ConfigError for another type or shape, or (on CPU) other numbers.
    """
    _check("mask", mask, (batch.num_tokens,))
    return batch.with_mask(mask)


def with_cell_masks(batch: TokenBatch, masks: Mapping[str, Tensor]) -> TokenBatch:
    """The same batch, with the masks of modalities by name, uint8 [F, rows, cols], in place of their own.

    They are masks of base cells, the same in all band sets. Modalities not named keep their tokens' masks.
    Raises ConfigError for a name the batch does not have, another type or shape, or (on CPU) other numbers.
    """
    mask = batch.mask
    for name, of_cells in masks.items():
        number = batch.modality_number(name)
        frames = batch.modalities[number]
        _check(f"mask of {name}", of_cells, (frames.num_frames, frames.grid.rows, frames.grid.cols))
        of_tokens = _of_tokens(batch, number, of_cells)
        for b in range(len(frames.band_sets)):
            mask = mask.index_copy(0, batch.tokens_by_scale(number, b), of_tokens)
    return batch.with_mask(mask)


def _of_tokens(batch: TokenBatch, modality: int, of_cells: Tensor) -> Tensor:
    """uint8 [n]: the masks of a band set's tokens in merging order."""
    of_rows = of_cells.flatten().index_select(0, batch.cell_places(modality))
    # MISSING becomes the lowest, the others keep their order.
    ranks = (of_rows + 1) % _NUM_MASKS
    per_scale = batch.modalities[modality].tokens_per_scale
    pieces = ranks.split([n * 4**scale for scale, n in enumerate(per_scale)])
    highest = [piece.view(-1, 4**scale).amax(1) for scale, piece in enumerate(pieces)]
    return (torch.cat(highest) + MISSING) % _NUM_MASKS


def _check(what: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.uint8 or mask.shape != shape:
        raise ConfigError(
            f"{what} is {mask.dtype} of shape {list(mask.shape)}; expected torch.uint8 of {list(shape)}"
        )
    # A GPU would have to be waited for.
    if mask.device.type == "cpu" and mask.numel() and int(mask.max()) >= _NUM_MASKS:
        raise ConfigError(f"{what} holds {int(mask.max())}; expected numbers from 0 to {MISSING}")
