"""Tokens in front of every sequence: class token, registers, location, in this order.

Shape suffixes are those of `model.batch`; S = sequences, R = prefix tokens of each.
"""

import torch
from torch import Tensor, nn

from model.batch import TokenBatch
from model.config import EncoderOptions
from model.encodings import LocationToken

_INIT_STD = 0.02


class PrefixTokens(nn.Module):
    """What an encoder's options put in front of every sequence.

    Class token and registers (Darcet et al., 2023) are learned and the same in every sequence; the location
    token is that of the sequence's tile.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.sizes = (
            int(options.class_token), options.register_tokens, int(options.location_token),
        )  # fmt: skip
        learned = options.class_token + options.register_tokens
        self.learned = nn.Parameter(torch.empty(learned, options.width).normal_(std=_INIT_STD))
        self.location = LocationToken(options.width) if options.location_token else None

    def forward(self, batch: TokenBatch, tile_S: Tensor) -> Tensor:
        """[S, R, D] for sequences of these tiles."""
        learned_SRD = self.learned.expand(len(tile_S), -1, -1)
        if self.location is None:
            return learned_SRD
        location_SD = self.location(batch.location).index_select(0, tile_S)
        return torch.cat([learned_SRD, location_SD[:, None].to(learned_SRD.dtype)], dim=1)

    def parts(self, prefix_SRD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Class tokens [S, D] and registers [S, R, D] of what `forward` gave; None where there are none."""
        classes, registers, _ = prefix_SRD.split(self.sizes, dim=1)
        return (
            classes[:, 0] if self.sizes[0] else None,
            registers if self.sizes[1] else None,
        )
