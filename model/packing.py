"""Packed batches: tiles of any token count side by side, without padding.

Shape suffixes used in this package:

- M = base cells of present tokens, in storage order, tile after tile
- N = tokens (leaves that are not missing), in storage order, tile after tile
- B = tiles, F = frames, C = bands, P = base patch size in px
- D = model width, H = heads, K = head width
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipeline import segments
from pipeline.grid import BaseGrid
from pipeline.storage.tiles import Frames


@dataclass(frozen=True)
class MergeLevel:
    """Which rows merge on the way from one level to the next coarser one.

    `rows` int64 index the finer level's rows that belong to coarser leaves, in groups of four;
    `finished` int64 index the finer level's rows that are whole tokens.
    """

    rows: Tensor
    finished: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Tiles as one packed sequence of tokens.

    - `values` [M, C, P, P]: pixels of every base cell of every token, in the archive's own numbers.
      A token of scale `s` owns `4**s` consecutive rows. Missing leaves have none.
    - `valid` bool [M, P, P]: which of them are valid; the value of an invalid pixel means nothing.
    - `cell_index` int64 [M]: frame * cells per frame + storage position of each row.
    - `scales` uint8 [N]; `positions` int32 [N, 4]: (y, x) of the leaf's top-left base cell, scale,
      timestep.
    - `cu_seqlens` int32 [B + 1]: tile `b` owns tokens `cu_seqlens[b] ... cu_seqlens[b + 1] - 1`;
      `max_seqlen` is the largest tile's count.
    - `merge` [scale], `token_order` int64 [N]: how base rows become tokens (see `model.merge`).
    - `tile_indices` int64 [B]: rows of the store's manifest.
    - `frame_timestep` int64 [F]: the timestep of each frame inside its tile.
    """

    values: Tensor
    valid: Tensor
    cell_index: Tensor
    scales: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    merge: tuple[MergeLevel, ...]
    token_order: Tensor
    tile_indices: Tensor
    frame_timestep: Tensor
    grid: BaseGrid

    @property
    def num_tiles(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_frames(self) -> int:
        return self.frame_timestep.numel()

    @property
    def num_tokens(self) -> int:
        return self.scales.numel()

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        merge = tuple(
            MergeLevel(level.rows.to(device), level.finished.to(device)) for level in self.merge
        )
        return replace(self, merge=merge, **moved)


def pack(
    frames: Frames,
    frames_per_tile: np.ndarray,
    timestep: np.ndarray,
    tile_indices: np.ndarray,
    grid: BaseGrid,
) -> TokenBatch:
    """A batch from the frames of some tiles, tile after tile.

    `frames_per_tile` int64 [B] says how many of the frames belong to each tile, `timestep` int64 [F]
    which of its tile's timesteps each one is.
    """
    tile_of_frame = np.repeat(np.arange(len(frames_per_tile)), frames_per_tile)

    leaves_per_frame = np.array([scales.size for scales in frames.scales], np.int64)
    leaves = np.concatenate([np.empty(0, np.uint8), *frames.scales])
    frame_of_leaf = np.repeat(np.arange(len(frames.scales)), leaves_per_frame)
    present = ~segments.is_missing(leaves)
    lengths = segments.run_lengths(leaves)
    # Every frame's leaves cover all its cells, so one running sum gives frame * cells + position.
    cells = np.repeat(present, lengths)
    cell_index = np.flatnonzero(cells)
    start = (segments.starts(leaves) % grid.num_cells)[present]

    scales, frame_of_token = leaves[present], frame_of_leaf[present]
    tokens_per_tile = np.bincount(tile_of_frame[frame_of_token], minlength=len(frames_per_tile))
    positions = np.column_stack(
        [grid.cell_yx[start], scales.astype(np.int32), timestep[frame_of_token].astype(np.int32)]
    ).astype(np.int32)
    merge, token_order = merge_plan(scales, grid.num_scales)
    return TokenBatch(
        values=torch.from_numpy(_cells(frames.pixels, grid, cell_index)),
        valid=torch.from_numpy(_cells(frames.valid[:, None], grid, cell_index)[:, 0]),
        cell_index=torch.from_numpy(cell_index),
        scales=torch.from_numpy(scales),
        positions=torch.from_numpy(positions),
        cu_seqlens=cumulative_lengths(torch.from_numpy(tokens_per_tile)),
        max_seqlen=int(tokens_per_tile.max(initial=0)),
        merge=merge,
        token_order=torch.from_numpy(token_order),
        tile_indices=torch.from_numpy(np.asarray(tile_indices, np.int64)),
        frame_timestep=torch.from_numpy(timestep),
        grid=grid,
    )


def cumulative_lengths(lengths: Tensor) -> Tensor:
    """int32 [B + 1]: 0 and the running sum of `lengths` [B]."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def merge_plan(scales: np.ndarray, num_scales: int) -> tuple[tuple[MergeLevel, ...], np.ndarray]:
    """How rows of consecutive base cells become tokens, level by level.

    Returns one MergeLevel per scale (the last has no rows left to merge) and `token_order`
    int64 [N]: finished rows of all levels one after another, indexed by it, are in token order.
    """
    scales = scales.astype(np.int64)
    plan = []
    for level in range(num_scales):
        reaching = scales[scales >= level]
        scale_of_row = np.repeat(reaching, 4 ** (reaching - level))
        plan.append(
            MergeLevel(
                rows=torch.from_numpy(np.flatnonzero(scale_of_row > level)),
                finished=torch.from_numpy(np.flatnonzero(scale_of_row == level)),
            )
        )
    by_level = np.argsort(scales, kind="stable")
    return tuple(plan), np.argsort(by_level, kind="stable")


def _cells(frames: np.ndarray, grid: BaseGrid, cell_index: np.ndarray) -> np.ndarray:
    """[M, channel, P, P]: the cells `cell_index` of frames [F, channel, y, x]."""
    p = grid.base_patch_size
    blocks = frames.reshape(len(frames), -1, grid.rows, p, grid.cols, p)
    row_major = np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3, 5))
    flat = row_major.reshape(-1, frames.shape[1], p, p)
    frame, position = np.divmod(cell_index, grid.num_cells)
    return flat[frame * grid.num_cells + grid.storage_order[position]]
