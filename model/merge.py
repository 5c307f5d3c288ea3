"""Merging base tokens into coarse ones: contiguous runs, one matmul per level.

In storage order the four children of a node are consecutive rows, so a 2x2 stride-2 convolution is a
reshape from [4 n, D] to [n, 4 D] and one matrix product. One convolution serves all levels.
"""

import torch
from torch import Tensor, nn

from model.batch import MergePlan, TokenBatch


class RunMerge(nn.Module):
    """Base tokens [M, D] to tokens [N, D], in token order.

    At initialisation a coarse token is the mean of its base tokens (`average`).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.combine = nn.Linear(4 * width, width)
        with torch.no_grad():
            self.combine.weight.copy_(torch.eye(width).repeat(1, 4) / 4)
            self.combine.bias.zero_()

    def forward(self, base_MD: Tensor, batch: TokenBatch) -> Tensor:
        return merge_runs(base_MD, batch.merge, self.combine)


def merge_runs(rows_MD: Tensor, plan: MergePlan, combine: nn.Module) -> Tensor:
    """Apply `combine` ([n, 4 D] to [n, D]) level by level; tokens [N, D] in token order."""
    # index_select: the backward of indexing with [] is several times slower.
    rows_MD = rows_MD.index_select(0, plan.rows)
    finished = []
    for num_finished in plan.finished:
        finished.append(rows_MD[:num_finished])
        rows_MD = combine(rows_MD[num_finished:].reshape(-1, 4 * rows_MD.shape[1]))
    return torch.cat(finished).index_select(0, plan.token_order)


def average_runs(rows_MD: Tensor, batch: TokenBatch) -> Tensor:
    """The mean of every token's base rows, [N, D]."""
    return merge_runs(rows_MD, batch.merge, _MeanOfFour(rows_MD.shape[1]))


class _MeanOfFour(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, children: Tensor) -> Tensor:
        return children.reshape(-1, 4, self.width).mean(1)
