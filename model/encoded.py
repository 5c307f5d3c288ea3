"""What comes out of the encoder. Shape suffixes are those of `model.batch`, and

- V = tokens the encoder saw, S = sequences, R = register tokens
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import TokenBatch


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens and prefix tokens after the last block, normalised.

    - `tokens` [V, D]: those the encoder saw, in the batch's order of tokens.
    - `visible` int64 [V]: which of the batch's tokens they are, ascending; None if they are all.
    - `class_tokens` [S, D], `registers` [S, R, D]: of every sequence; None where there are none.
    - `sequence_tile` int64 [S]: position of the sequence's tile in the batch, ascending.
    - `sequence_timestep` int64 [S]: which of the tile's dates; -1 for a whole tile, and for the tokens
      of static modalities where dates have sequences of their own.
    """

    tokens: Tensor
    visible: Tensor | None
    class_tokens: Tensor | None
    registers: Tensor | None
    sequence_tile: Tensor
    sequence_timestep: Tensor

    def full(self, batch: TokenBatch) -> Tensor:
        """[N, D]: a row for every token of the batch it came from; zeros where it was not seen."""
        if self.visible is None:
            return self.tokens
        rows_ND = self.tokens.new_zeros(batch.num_tokens, self.tokens.shape[1])
        return rows_ND.index_copy(0, self.visible, self.tokens)


# What wraps modules (FSDP, the compiler) looks for tensors in outputs of registered types only.
torch.export.register_dataclass(Encoded)
