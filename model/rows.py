"""The order in which base cells become tokens.

Rows of base cells are in *merging order*: those of tokens of scale 0 first, then those of scale 1, and so
on; within a scale in frame and storage order. The `4**s` rows of a token of scale `s` are neighbours, four
children of a node follow each other at every level, and all that merges at a level is one piece of memory:
no row is looked up by its number, which costs nothing forward and backward.

Shape suffixes are those of `model.batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MergePlan:
    """How rows of base cells become tokens, level by level, all groups at once.

    A group is a band set of a modality; groups come as in the batch: modality by modality.

    - `tokens_per_scale`: of every group, how many tokens of each scale it has, fine to coarse; as many
      scales for all, those of the modality with the most.
    - `token_order` int64 [N]: the merged tokens of scale 0 of all groups, then those of scale 1, and so on,
      indexed by it, are in the batch's order. None where they are already.
    """

    tokens_per_scale: tuple[tuple[int, ...], ...]
    token_order: Tensor | None

    @property
    def num_scales(self) -> int:
        return len(self.finished)

    @property
    def finished(self) -> tuple[int, ...]:
        """Tokens of every scale, fine to coarse, all groups together."""
        return tuple(map(sum, zip(*self.tokens_per_scale, strict=True)))

    @property
    def rows_per_scale(self) -> list[list[int]]:
        """Of every group, base rows of its tokens of each scale."""
        return [
            [n * 4**scale for scale, n in enumerate(per_scale)]
            for per_scale in self.tokens_per_scale
        ]


def merge_plan(tokens_per_scale: Sequence[Sequence[int]], order: Tensor) -> MergePlan:
    """The plan of groups with that many tokens of every scale.

    `order` int64 [N]: positions in the batch of the tokens by scale, group, frame and storage position.
    """
    same_length = tuple(zip(*zip_longest(*tokens_per_scale, fillvalue=0), strict=True))
    # Tokens of one scale of one group are in the batch's order; asking `order` would wait for a GPU.
    pieces = sum(n > 0 for per_scale in same_length for n in per_scale)
    return MergePlan(same_length, inverse(order) if pieces > 1 else None)


def inverse(permutation: Tensor) -> Tensor:
    """int64 [n]: where each number 0 ... n - 1 stands in a permutation of them."""
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).index_copy(0, permutation, places)


def repeated(values: Tensor, per_scale: Sequence[int]) -> Tensor:
    """[M]: values [n] of tokens, by scale, for each of the token's `4**scale` rows."""
    pieces = enumerate(values.split(list(per_scale)))
    return torch.cat([piece.repeat_interleave(4**scale) for scale, piece in pieces])


def runs(first: Tensor, per_scale: Sequence[int]) -> Tensor:
    """int64 [M]: the numbers `first ... first + 4**scale - 1` of tokens [n], by scale, run after run."""
    within = [torch.arange(4**scale, device=first.device) for scale in range(len(per_scale))]
    pieces = zip(first.split(list(per_scale)), within, strict=True)
    return torch.cat([(piece[:, None] + numbers).flatten() for piece, numbers in pieces])
