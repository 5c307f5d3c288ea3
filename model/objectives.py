"""Self-supervised pretraining: predict the hidden tokens' pixels from the visible ones.

Tokens a batch's mask marks `ONLINE` are encoded; a light predictor sees them and the places of those marked
`DECODER`; its target is a frozen random projection of the hidden tokens' base patches. The loss is patch
discrimination: each prediction must pick its own target among those of the hidden tokens of the same tile,
modality and band set, of any date.

Shape suffixes are those of `model.batch`; T = width of a target.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from model.batch import DECODER, ONLINE, TokenBatch
from model.blocks import BlockStack
from model.config import EncoderConfig, EncoderOptions, group_name
from model.encoder import APTEncoder
from model.kernels import resize_kernel
from model.masks import with_token_masks
from model.merge import average_runs
from model.sequences import plan

PREDICTOR_DEPTH = 2
TARGET_WIDTH = 128
TEMPERATURE = 0.1
_NOBODY = -1


def random_masking(batch: TokenBatch, hidden_share: float, seed: tuple[int, ...]) -> TokenBatch:
    """The batch with `round(hidden_share * n)` of each tile's `n` visible tokens hidden (`DECODER`).

    At least one and never all; a tile of one token keeps it visible. Visible are those marked `ONLINE`;
    other marks stay. The choice is a pure function of `seed` and of which tokens are visible.
    """
    mask = batch.mask.cpu().numpy().copy()
    visible = np.flatnonzero(mask == ONLINE)
    tile = batch.tile_of_token.cpu().numpy()[visible]
    lengths = np.bincount(tile, minlength=batch.num_tiles)
    order = np.lexsort((np.random.default_rng(seed).random(tile.size), tile))
    rank = np.empty(tile.size, np.int64)
    rank[order] = np.arange(tile.size) - (lengths.cumsum() - lengths)[tile]
    wanted = np.round(lengths * hidden_share).astype(np.int64)
    num_hidden = np.clip(wanted, np.minimum(1, lengths - 1), np.maximum(lengths - 1, 0))
    mask[visible[rank < num_hidden[tile]]] = DECODER
    return with_token_masks(batch, torch.from_numpy(mask).to(batch.device))


class MaskedPrediction(nn.Module):
    """An encoder with the predictor and targets that train it. Returns the loss of a masked batch."""

    def __init__(self, encoder: APTEncoder) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        self.adapter = nn.Linear(config.width, config.width)
        self.predictor = BlockStack(_predictor_options(config), PREDICTOR_DEPTH)
        self.head = nn.Linear(config.width, TARGET_WIDTH)
        self.targets_of = nn.ModuleDict(_projections(config))

    def forward(self, batch: TokenBatch) -> Tensor:
        """The loss of the tokens marked `DECODER`, a scalar; 0 if there are none."""
        hidden = hidden_tokens(batch)
        return patch_discrimination(
            self.predict(batch, hidden),
            self.targets(batch).index_select(0, hidden),
            _sizes(_sets(batch).index_select(0, hidden)),
        )

    def predict(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """[hidden, T]: predictions for tokens `hidden` int64 [hidden] from the visible tokens' pixels."""
        encoded = self.encoder(batch)
        full_ND = self.mask_token.expand(batch.num_tokens, -1)
        # Under autocast the adapter's output has fewer bits than the mask token.
        adapted = self.adapter(encoded.tokens).to(full_ND.dtype)
        if encoded.visible is not None:
            adapted = full_ND.index_copy(0, encoded.visible, adapted)
        adapted = adapted + self.encoder.token_encoding(batch)
        return self.head(self._predictor(adapted, batch).index_select(0, hidden))

    def _predictor(self, tokens_ND: Tensor, batch: TokenBatch) -> Tensor:
        """[N, D]: visible and hidden tokens of each tile after the predictor; zeros for all others."""
        taking_part = torch.where(batch.mask == DECODER, ONLINE, batch.mask)
        sequences = plan(with_token_masks(batch, taking_part), "tile")
        rotary = self.encoder.rotary(batch)
        predicted = self.predictor(
            sequences.put(sequences.see(tokens_ND)),
            sequences.packed,
            None if rotary is None else sequences.put_rotary(*rotary),
        )
        tokens_VD, _ = sequences.take(predicted)
        if sequences.visible is None:
            return tokens_VD
        rows_ND = tokens_VD.new_zeros(batch.num_tokens, tokens_VD.shape[1])
        return rows_ND.index_copy(0, sequences.visible, tokens_VD)

    def compile_blocks(self) -> None:
        """Have the transformer blocks compiled when they are first used, for sequences of any length."""
        for stack in (self.encoder.stack, self.predictor):
            stack.compile(dynamic=True)

    @torch.no_grad()
    def targets(self, batch: TokenBatch) -> Tensor:
        """[N, T]: random projection of each token's mean base patch, every band set having its own.

        Centred over the tokens of a tile and band set: what all of them share says nothing about which one
        is which.
        """
        # In 16 bits patches that are nearly alike would have the same target.
        with torch.autocast(batch.device.type, enabled=False):
            rows = [
                self.targets_of[group_name(frames.name, band_set.name)](
                    self.encoder.pixels(batch, m, b)[0]
                )
                for m, frames in enumerate(batch.modalities)
                for b, band_set in enumerate(frames.band_sets)
            ]
            return _centred(average_runs(rows, batch), _sets(batch), _num_sets(batch))


class FrozenProjection(nn.Module):
    """A random projection of patches [M, C, P, P] to [M, T], with one kernel for all patch sizes."""

    def __init__(self, num_bands: int, kernel_px: int) -> None:
        super().__init__()
        shape = (TARGET_WIDTH, num_bands, kernel_px, kernel_px)
        self.kernel = nn.Parameter(torch.empty(shape).normal_(), requires_grad=False)

    def forward(self, patches_MCPP: Tensor) -> Tensor:
        kernel = resize_kernel(self.kernel, patches_MCPP.shape[-1])
        return patches_MCPP.flatten(1) @ kernel.flatten(1).T


def hidden_tokens(batch: TokenBatch) -> Tensor:
    """int64 [hidden]: the tokens to predict, ascending."""
    return (batch.mask == DECODER).nonzero()[:, 0]


def patch_discrimination(predicted: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean cross-entropy of finding each prediction's own target among those of its set.

    `predicted` and `targets` are [hidden, T]; `sizes` says how many neighbours form each set. Chance level
    is the mean of log(size of the set). Source: the patch discrimination objective of latent masked image
    modeling (Wei, Gupta and Morgado, 2024).
    """
    of_sets = np.array([size for size in sizes if size], np.int64)
    starts = of_sets.cumsum() - of_sets
    predicted, targets = normalize(predicted, dim=1), normalize(targets, dim=1)
    # Sets of about equal size at once, so that padding at most doubles a side.
    octaves = np.ceil(np.log2(of_sets))
    total = predicted.sum() * 0
    for octave in np.unique(octaves):
        chosen = octaves == octave
        total = total + _padded_loss(predicted, targets, starts[chosen], of_sets[chosen])
    return total / max(len(predicted), 1)


def _padded_loss(
    predicted: Tensor, targets: Tensor, starts: np.ndarray, sizes: np.ndarray
) -> Tensor:
    """The sum of cross-entropies of sets, int64 [sets], padded to the largest one."""
    place = np.arange(sizes.max())
    inside = place < sizes[:, None]
    at = torch.from_numpy(np.where(inside, starts[:, None] + place, 0)).to(predicted.device)
    own = torch.from_numpy(np.where(inside, place, _NOBODY)).to(predicted.device)
    similarity = _rows(predicted, at) @ _rows(targets, at).mT / TEMPERATURE
    similarity = similarity.masked_fill(own[:, None] == _NOBODY, -torch.inf)
    return cross_entropy(
        similarity.flatten(0, 1), own.flatten(), ignore_index=_NOBODY, reduction="sum"
    )


def _rows(values: Tensor, at: Tensor) -> Tensor:
    """[sets, places, T] of [hidden, T]. index_select: the backward of indexing with [] is slow."""
    return values.index_select(0, at.flatten()).unflatten(0, at.shape)


def _predictor_options(config: EncoderConfig) -> EncoderOptions:
    """Blocks as the encoder's, but for what is about its depth or its sequences."""
    alike = {"width", "mlp", "mlp_ratio", "qk_norm", "layer_scale"}
    return EncoderOptions(**config.model_dump(include=alike))


def _projections(config: EncoderConfig) -> dict[str, nn.Module]:
    """By the name of every band set the encoder reads."""
    return {
        group_name(modality.name, band_set.name): FrozenProjection(
            len(band_set.bands), config.kernel_px
        )
        for modality in config.modalities
        for band_set in modality.band_sets
    }


def _num_sets(batch: TokenBatch) -> int:
    return batch.num_tiles * len(batch.modalities) * _most_band_sets(batch)


def _sets(batch: TokenBatch) -> Tensor:
    """int64 [N], ascending: a number for each tile, modality and band set together."""
    of_modality = batch.tile_of_token * len(batch.modalities) + batch.modality
    return of_modality * _most_band_sets(batch) + batch.band_set


def _sizes(sets: Tensor) -> list[int]:
    """How many neighbours have the same number."""
    return torch.unique_consecutive(sets, return_counts=True)[1].tolist()


def _most_band_sets(batch: TokenBatch) -> int:
    return max(len(frames.band_sets) for frames in batch.modalities)


def _centred(values: Tensor, sets: Tensor, num_sets: int) -> Tensor:
    """[N, T] less the mean of each set."""
    sums = values.new_zeros(num_sets, values.shape[1]).index_add(0, sets, values)
    counts = torch.bincount(sets, minlength=num_sets).clamp(min=1)
    return values - (sums / counts[:, None]).index_select(0, sets)
