"""One vector per tile from the encoder's tokens: their mean, learned queries, or the class token.

Tokens that the encoder did not see take no part. Nothing is padded, and no operation runs per tile.
Shape suffixes are those of `model.batch`; V = visible tokens, S = sequences, Q = queries.
"""

import torch
from torch import Tensor, nn

from model.batch import TokenBatch
from model.config import HEAD_WIDTH
from model.encoded import Encoded
from pipeline.errors import ConfigError


def tile_of_visible(encoded: Encoded, batch: TokenBatch) -> Tensor:
    """int64 [V]: position in the batch of each visible token's tile, ascending."""
    tile_N = batch.tile_of_token
    return tile_N if encoded.visible is None else tile_N.index_select(0, encoded.visible)


def mean_pool(encoded: Encoded, batch: TokenBatch) -> Tensor:
    """[B, D]: the mean of each tile's visible tokens, summed in float32; 0 for a tile without any.

    Every token counts alike, whatever area it covers.
    """
    return _mean_by_tile(encoded.tokens, tile_of_visible(encoded, batch), batch.num_tiles)


def class_pool(encoded: Encoded, batch: TokenBatch) -> Tensor:
    """[B, D]: the class token of each tile; the mean of its class tokens where each date has one.

    Raises ConfigError for an encoder without class tokens.
    """
    if encoded.class_tokens is None:
        raise ConfigError(
            "class_pool: the encoder has no class token; set class_token: true, or use mean_pool"
        )
    return _mean_by_tile(encoded.class_tokens, encoded.sequence_tile, batch.num_tiles)


class AttentionPool(nn.Module):
    """Learned queries that look at each tile's visible tokens: `pool(encoded, batch)` gives [B, Q, D].

    A tile without visible tokens gets 0. Heads are 64 wide. Source: pooling by multi-head attention
    (Lee et al., Set Transformer, 2019), without its feed-forward part.
    """

    def __init__(self, width: int, num_queries: int = 1) -> None:
        super().__init__()
        if width < HEAD_WIDTH or width % HEAD_WIDTH:
            raise ConfigError(
                f"AttentionPool: width is {width}; expected a multiple of {HEAD_WIDTH}"
            )
        if num_queries < 1:
            raise ConfigError(f"AttentionPool: num_queries is {num_queries}; expected 1 or more")
        self.query = nn.Parameter(torch.empty(num_queries, width).normal_(std=width**-0.5))
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, encoded: Encoded, batch: TokenBatch) -> Tensor:
        tile_V, num_tiles = tile_of_visible(encoded, batch), batch.num_tiles
        key_value = self.key_value(encoded.tokens).unflatten(1, (2, -1, HEAD_WIDTH))
        k_VHK, v_VHK = key_value.unbind(1)
        q_QHK = self.query.unflatten(1, (-1, HEAD_WIDTH)).to(k_VHK.dtype)
        scores_VQH = torch.einsum("qhk,vhk->vqh", q_QHK, k_VHK) * HEAD_WIDTH**-0.5
        weights_VQH = _softmax_by_tile(_precise(scores_VQH), tile_V, num_tiles)
        weighted_VQD = (weights_VQH[..., None] * v_VHK[:, None]).flatten(2)
        pooled_BQD = _sum_by_tile(weighted_VQD, tile_V, num_tiles)
        # Without this a tile without tokens would get the projection's bias.
        has_token_B = _sum_by_tile(torch.ones_like(tile_V), tile_V, num_tiles) > 0
        projected_BQD = self.projection(pooled_BQD.to(v_VHK.dtype))
        return torch.where(has_token_B[:, None, None], projected_BQD, 0)


def _precise(values: Tensor) -> Tensor:
    """In float32, or more bits if they have more: sums over many tokens lose what is small."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _sum_by_tile(values: Tensor, tile: Tensor, num_tiles: int) -> Tensor:
    """Sums [B, ...] of values [V, ...] with the same `tile` [V]."""
    return values.new_zeros(num_tiles, *values.shape[1:]).index_add(0, tile, values)


def _mean_by_tile(values_VD: Tensor, tile_V: Tensor, num_tiles: int) -> Tensor:
    sums_BD = _sum_by_tile(_precise(values_VD), tile_V, num_tiles)
    counts_B = _sum_by_tile(torch.ones_like(tile_V), tile_V, num_tiles)
    return (sums_BD / counts_B.clamp(min=1)[:, None]).to(values_VD.dtype)


def _softmax_by_tile(scores: Tensor, tile_V: Tensor, num_tiles: int) -> Tensor:
    """Of scores [V, ...], over the tokens of each tile."""
    # Its gradient is zero: subtracting any number changes no softmax.
    fixed = scores.detach()
    largest = fixed.new_full((num_tiles, *fixed.shape[1:]), -torch.inf)
    index = tile_V.view(-1, *[1] * (fixed.ndim - 1)).expand_as(fixed)
    largest = largest.scatter_reduce(0, index, fixed, "amax")
    exponentials = (scores - largest.index_select(0, tile_V)).exp()
    sums = _sum_by_tile(exponentials, tile_V, num_tiles)
    return exponentials / sums.index_select(0, tile_V)
