"""Where tokens lie on the ground of their tile, and tables by place.

Shape suffixes are those of `model.batch`.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from model.batch import TokenBatch
from model.cells import cell_tables
from model.config import REFERENCE_DISTANCE_M
from pipeline.grid import BaseGrid


def units_per_cell(grid: BaseGrid, metres_per_px: float) -> float:
    """Side of a base cell in units of 10 m."""
    return grid.base_patch_size * metres_per_px / REFERENCE_DISTANCE_M


@lru_cache(maxsize=32)
def node_centres(grid: BaseGrid, device: torch.device) -> Tensor:
    """float64 [nodes, 2]: (y, x) in base cells of the centres of all possible leaves.

    Scale after scale, fine to coarse, each in storage order: four neighbours have the next scale's node as
    parent.
    """
    with torch.inference_mode(False):
        levels = [torch.tensor(grid.cell_yx, dtype=torch.float64) + 0.5]
        while len(levels) < grid.num_scales:
            levels.append(levels[-1].view(-1, 4, 2).mean(1))
        return torch.cat(levels).to(device)


def node_of_token(batch: TokenBatch) -> Tensor:
    """int64 [N]: the row of every token in the tables of `node_centres` of all modalities in turn."""
    grids = [m.grid for m in batch.modalities]
    counts = [[grid.num_cells >> 2 * s for s in range(grid.num_scales)] for grid in grids]
    scales = batch.scales.long()
    deepest = max(map(len, counts))
    first = starts(tuple(n for of in counts for n in of + [0] * (deepest - len(of))), batch.device)
    modality = batch.modality.long()
    cells = starts(tuple(grid.num_cells for grid in grids), batch.device)[modality]
    cols = per_modality(tuple((grid.cols,) for grid in grids), batch.device)[modality, 0].long()
    position = torch.cat([cell_tables(grid, batch.device)[1] for grid in grids])
    y, x = batch.positions[:, :2].long().unbind(1)
    return first[modality * deepest + scales] + (position[cells + y * cols + x] >> 2 * scales)


def token_centres(batch: TokenBatch) -> Tensor:
    """float32 [N, 2]: (y, x) of every token's centre in base cells of its modality."""
    half = torch.exp2(batch.scales.float() - 1)
    return batch.positions[:, :2] + half[:, None]


def sample_grid(grid_DHW: Tensor, base: BaseGrid, scale: int) -> Tensor:
    """[nodes, D]: a learned grid laid over the tile, at the centres of its nodes of a scale, storage order.

    Bilinear between the centres of the grid's cells, constant beyond the outermost. Where grid and nodes
    are the same cells, a node has exactly the cell's numbers.
    """
    nodes = BaseGrid(
        base.rows >> scale, base.cols >> scale, base.patch_sizes[scale], base.num_scales - scale
    )
    if (nodes.rows, nodes.cols) != tuple(grid_DHW.shape[1:]):
        at = grid_DHW.dtype, grid_DHW.device
        with torch.autocast(grid_DHW.device.type, enabled=False):
            grid_DHW = (
                _between(grid_DHW.shape[1], nodes.rows, *at)
                @ grid_DHW
                @ _between(grid_DHW.shape[2], nodes.cols, *at).T
            )
    return select_once(grid_DHW.flatten(1).T, cell_tables(nodes, grid_DHW.device)[0])


def select_once(rows: Tensor, index: Tensor) -> Tensor:
    """`rows.index_select(0, index)` for an index that names no row twice.

    The gradient of a row is then written, not added up: many times as fast on a CPU, and on a GPU the same
    in every run.
    """
    selected: Tensor = _SelectOnce.apply(rows, index)  # type: ignore[no-untyped-call]
    return selected


@lru_cache(maxsize=32)
def per_modality(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """float32 [modality, ...] of numbers known on the host, on the device."""
    with torch.inference_mode(False):
        # Of one type whatever is asked: to the cache 4 and 4.0 are the same.
        return torch.tensor(rows, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def starts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [n]: 0 and the running sum of all counts but the last."""
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(counts[:-1])], device=device)


@lru_cache(maxsize=32)
def _between(size: int, wanted: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """[wanted, size]: what each of a row's cells counts at the centres of `wanted` equal parts of it."""
    with torch.inference_mode(False):
        # In this order nothing is rounded where sizes are equal.
        at = (torch.arange(wanted, dtype=torch.float64) + 0.5) * size / wanted - 0.5
        distance = at.clamp(0, size - 1)[:, None] - torch.arange(size)
        return (1 - distance.abs()).clamp(min=0).to(device, kind)


class _SelectOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])
        return whole.index_copy(0, index, gradient), None
