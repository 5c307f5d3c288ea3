"""Self-supervised pretraining: predict the hidden tokens' pixels from the visible ones.

Visible tokens are encoded; a light predictor sees them and the places of the hidden ones; its target
is a frozen random projection of the hidden tokens' base patches. The loss is patch discrimination:
each prediction must pick its own target among those of all hidden tokens of the same tile.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from model.batch import TokenBatch, cumulative_lengths, only_group
from model.blocks import BlockStack
from model.encoder import APTEncoder
from model.merge import average_runs

PREDICTOR_DEPTH = 2
TARGET_WIDTH = 128
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Masking:
    """Token indices int64 of the visible and hidden tokens, and how many of each tile has, [B]."""

    visible: Tensor
    hidden: Tensor
    visible_per_tile: Tensor
    hidden_per_tile: Tensor


def random_masking(batch: TokenBatch, hidden_share: float, seed: tuple[int, ...]) -> Masking:
    """Hide `round(hidden_share * n)` of each tile's `n` tokens, at least one and never all.

    A tile of one token keeps it visible. The choice is a pure function of `seed`.
    """
    ends = batch.cu_seqlens.cpu().numpy().astype(np.int64)
    lengths = np.diff(ends)
    tile = np.repeat(np.arange(lengths.size), lengths)
    order = np.lexsort((np.random.default_rng(seed).random(tile.size), tile))
    rank = np.empty(tile.size, np.int64)
    rank[order] = np.arange(tile.size) - ends[:-1][tile]
    wanted = np.round(lengths * hidden_share).astype(np.int64)
    num_hidden = np.clip(wanted, np.minimum(1, lengths - 1), np.maximum(lengths - 1, 0))
    hidden = rank < num_hidden[tile]
    device = batch.scales.device
    return Masking(
        visible=torch.from_numpy(np.flatnonzero(~hidden)).to(device),
        hidden=torch.from_numpy(np.flatnonzero(hidden)).to(device),
        visible_per_tile=torch.from_numpy(lengths - num_hidden),
        hidden_per_tile=torch.from_numpy(num_hidden),
    )


class MaskedPrediction(nn.Module):
    """An encoder with the predictor and targets that train it. Returns the loss of a batch."""

    def __init__(self, encoder: APTEncoder) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        self.adapter = nn.Linear(config.width, config.width)
        self.predictor = BlockStack(config.width, PREDICTOR_DEPTH)
        self.head = nn.Linear(config.width, TARGET_WIDTH)
        pixels = len(config.modalities[0].band_sets[0].bands) * config.kernel_px**2
        self.target_projection = nn.Linear(pixels, TARGET_WIDTH, bias=False).requires_grad_(False)

    def forward(self, batch: TokenBatch, masking: Masking) -> Tensor:
        predicted = self.predict(batch, masking)
        return patch_discrimination(
            predicted, self.targets(batch)[masking.hidden], masking.hidden_per_tile.tolist()
        )

    def predict(self, batch: TokenBatch, masking: Masking) -> Tensor:
        """[hidden, TARGET_WIDTH]: predictions from the visible tokens' pixels alone."""
        visible = self.encoder.embed(batch).index_select(0, masking.visible)
        cu_visible = cumulative_lengths(masking.visible_per_tile).to(visible.device)
        encoded = self.encoder.stack(visible, cu_visible, int(masking.visible_per_tile.max()))
        full_ND = self.mask_token.expand(batch.num_tokens, -1)
        # Under autocast the adapter's output has fewer bits than the mask token.
        adapted = self.adapter(encoded).to(full_ND.dtype)
        full_ND = full_ND.index_copy(0, masking.visible, adapted)
        full_ND = full_ND + self.encoder.token_encoding(batch)
        predicted = self.predictor(full_ND, batch.cu_seqlens, batch.max_seqlen)
        return self.head(predicted.index_select(0, masking.hidden))

    @torch.no_grad()
    def targets(self, batch: TokenBatch) -> Tensor:
        """[N, TARGET_WIDTH]: random projection of each token's mean base patch.

        Centred per tile: what all tokens of a tile share says nothing about which one is which.
        """
        only_group(batch, "MaskedPrediction")
        pixels, _ = self.encoder.pixels(batch, 0, 0)
        size = self.encoder.config.kernel_px
        if pixels.shape[-1] != size:
            pixels = interpolate(pixels, (size, size), mode="bilinear")
        projected = average_runs(self.target_projection(pixels.flatten(1)), batch)
        lengths, tile = batch.cu_seqlens.diff(), batch.tile_of_token
        sums = projected.new_zeros(batch.num_tiles, TARGET_WIDTH).index_add(0, tile, projected)
        return projected - (sums / lengths.clamp(min=1)[:, None]).index_select(0, tile)


def patch_discrimination(predicted: Tensor, targets: Tensor, per_tile: list[int]) -> Tensor:
    """Mean cross-entropy of finding each prediction's own target among its tile's.

    `predicted` and `targets` are [hidden, width]; `per_tile` says how many belong to each tile.
    Chance level is the mean of log(hidden tokens of the tile). Source: the patch discrimination
    objective of latent masked image modeling (Wei, Gupta and Morgado, 2024).
    """
    similarity = zip(
        normalize(predicted, dim=1).split(per_tile),
        normalize(targets, dim=1).split(per_tile),
        strict=True,
    )
    losses = [
        cross_entropy(p @ t.T / TEMPERATURE, torch.arange(len(p), device=p.device), reduction="sum")
        for p, t in similarity
    ]
    return torch.stack(losses).sum() / max(len(predicted), 1)
