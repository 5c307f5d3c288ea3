"""Merging base tokens into coarse ones: contiguous runs, one matmul per level.

In merging order (`model.rows`) the four children of a node are consecutive rows, so a 2x2 stride-2
convolution is a reshape from [4 n, D] to [n, 4 D] and one matrix product.

Shape suffixes are those of `model.batch`.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from model.batch import TokenBatch
from model.rows import MergePlan
from pipeline.errors import ConfigError

Merge = Literal["shared", "per_level"]
MergeInit = Literal["average", "kaiming", "zero"]


class RunMerge(nn.Module):
    """Base tokens of every group to tokens [N, D] in the batch's order.

    A token of scale 0 is its base token, unchanged. A token of scale `s` is what `s` 2x2 stride-2
    convolutions make of its `2**s x 2**s` base tokens.

    - `merge` "shared": one convolution serves all levels. "per_level": tokens of scale `s` have a stack of
      `s` convolutions of their own, up to scale `levels`; `levels (levels + 1) / 2` in all.
    - `init` "average": identity over channels and 1/4 over space, so that a coarse token begins as the mean
      of its base tokens. "kaiming": normal weights that keep the variance (He et al. 2015, forward mode).
      "zero": a coarse token is the embedding of its patch shrunk to base size (`resized`), plus what the
      convolutions give (they begin as "average") through a linear map that begins as zero.
    """

    def __init__(
        self,
        width: int,
        merge: Merge = "shared",
        levels: int | None = None,
        init: MergeInit = "average",
    ) -> None:
        super().__init__()
        if (merge == "per_level") != (levels is not None):
            raise ValueError(
                f"merge is {merge!r} and levels is {levels}; give levels with 'per_level' and only then"
            )
        self.levels, self.init = levels, init
        stacks = levels or 1
        convolutions = stacks * (stacks + 1) // 2
        self.combine = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(convolutions))
        # One for every stack.
        self.residual = nn.ModuleList(
            nn.Linear(width, width) for _ in range(stacks if init == "zero" else 0)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for combine in self.combine:
            assert isinstance(combine, nn.Linear)
            if self.init == "kaiming":
                nn.init.kaiming_normal_(combine.weight, nonlinearity="linear")
            else:
                combine.weight.copy_(torch.eye(combine.out_features).repeat(1, 4) / 4)
            nn.init.zeros_(combine.bias)
        for residual in self.residual:
            assert isinstance(residual, nn.Linear)
            nn.init.zeros_(residual.weight)
            nn.init.zeros_(residual.bias)

    def forward(
        self, rows: Sequence[Tensor], batch: TokenBatch, resized: Tensor | None = None
    ) -> Tensor:
        """Tokens [N, D] of base rows [M, D] of every group, in the batch's order of groups.

        `resized` [N, D], for `init` "zero" and only then: of every token above scale 0 the embedding of its
        patch shrunk to base size, with its encoding; rows of other tokens are not used.

        Raises ConfigError for a batch of larger scales than there are levels.
        """
        if (resized is None) == (self.init == "zero"):
            raise ValueError(
                f"init is {self.init!r} and resized was {'not ' if resized is None else ''}given; "
                "'zero' needs it, the others do not take it"
            )
        plan = batch.merge
        base, coarse = _base_and_coarse(rows, plan)
        finished = self._merged(coarse, plan)
        if resized is None:
            return _in_order([*base, *finished], plan)
        tokens_ND = _in_order([*base, *self._through_residual(finished)], plan)
        return torch.where(batch.scales[:, None] > 0, tokens_ND + resized, tokens_ND)

    def _merged(self, coarse: Tensor, plan: MergePlan) -> list[Tensor]:
        """[n, D] for every scale from 1 up."""
        if self.levels is None:
            return _merge_together(coarse, plan.finished[1:], self.combine[0])
        if plan.num_scales > self.levels + 1:
            raise ConfigError(
                f"merge_levels is {self.levels}, the batch has tokens of scales up to "
                f"{plan.num_scales - 1}; set merge_levels to at least that"
            )
        return self._merge_apart(coarse, plan.finished[1:], self.levels)

    def _merge_apart(self, coarse: Tensor, counts: Sequence[int], levels: int) -> list[Tensor]:
        # Scales the batch lacks have no rows; their convolutions still take part, see _merge_together.
        counts = [*counts, *[0] * (levels - len(counts))]
        stacks, finished = iter(self.combine), []
        pieces = coarse.split([n * 4**scale for scale, n in enumerate(counts, start=1)])
        for scale, rows in enumerate(pieces, start=1):
            for combine in islice(stacks, scale):
                rows = combine(_four_in_a_row(rows))
            finished.append(rows)
        return finished

    def _through_residual(self, finished: list[Tensor]) -> list[Tensor]:
        if self.levels is None:
            return [self.residual[0](torch.cat(finished))]
        return [of(rows) for of, rows in zip(self.residual, finished, strict=True)]


def average_runs(rows: Sequence[Tensor], batch: TokenBatch) -> Tensor:
    """The mean of every token's base rows, [N, D]; `rows` [M, D] of every group in the batch's order."""
    plan = batch.merge
    base, coarse = _base_and_coarse(rows, plan)
    finished = _merge_together(coarse, plan.finished[1:], _mean_of_four)
    return _in_order([*base, *finished], plan)


def _base_and_coarse(rows: Sequence[Tensor], plan: MergePlan) -> tuple[list[Tensor], Tensor]:
    """Rows of scale 0 of every group, and those of all groups from scale 1 up, scale by scale.

    What belongs to larger scales is copied once, and not at all if there is one group. Rows are split, not
    sliced: the backward of slices fills an array of all rows with zeros for each.
    """
    sizes = plan.rows_per_scale
    halves = [of.split([n[0], sum(n[1:])]) for of, n in zip(rows, sizes, strict=True)]
    base = [first for first, _ in halves]
    if len(halves) == 1 or plan.num_scales == 1:
        return base, halves[0][1]
    by_group = [above.split(n[1:]) for (_, above), n in zip(halves, sizes, strict=True)]
    return base, torch.cat([piece for scale in zip(*by_group, strict=True) for piece in scale])


def _merge_together(
    coarse: Tensor, counts: Sequence[int], combine: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """[n, D] for every scale from 1 up, `counts` being the `n`, by one map for all levels.

    The map is called even if nothing is above scale 0: its parameters then have gradients of 0, where
    data parallel training would wait for gradients that do not come.
    """
    finished = []
    for n in counts or [0]:
        coarse = combine(_four_in_a_row(coarse))
        done, coarse = coarse.split([n, len(coarse) - n])
        finished.append(done)
    return finished


def _four_in_a_row(rows: Tensor) -> Tensor:
    """[n, 4 D] of rows [4 n, D]."""
    return rows.reshape(-1, 4 * rows.shape[1])


def _mean_of_four(children: Tensor) -> Tensor:
    """[n, D] of [n, 4 D]."""
    return children.unflatten(1, (4, -1)).mean(1)


def _in_order(merged: list[Tensor], plan: MergePlan) -> Tensor:
    """Tokens [N, D] in the batch's order."""
    tokens_ND = torch.cat(merged)
    if plan.token_order is None:
        return tokens_ND
    # index_select: the backward of indexing with [] is several times slower.
    return tokens_ND.index_select(0, plan.token_order)
