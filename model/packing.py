"""From frames as they were read to a packed batch: only work per token, none per base cell or pixel."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from model.batch import (
    ONLINE,
    BandSetPixels,
    LabelFrames,
    ModalityFrames,
    TokenBatch,
    cumulative_lengths,
)
from pipeline import segments
from pipeline.grid import BaseGrid


@dataclass
class BandSetArrays:
    """Bands of one resolution of some frames: `pixels` [F, C, y, x], `valid` bool [F, y, x].

    `band_present` bool [F, C] is False where a band was dropped; its pixels are 0 then.
    """

    name: str
    bands: tuple[str, ...]
    pixels: np.ndarray
    valid: np.ndarray
    band_present: np.ndarray


@dataclass
class FrameArrays:
    """Frames of one modality, tile after tile, each tile's in the order of time.

    `scales` uint8 [leaf] holds the leaves frame after frame, `counts` int64 [F] of each; every frame's
    cover its whole `grid`, missing ones included. `tile` int64 [F] is the frame's tile in the batch,
    ascending; `timestep` int64 [F]; `timestamps` int32 [F, 3] as in `ModalityFrames`.
    """

    name: str
    grid: BaseGrid
    band_sets: list[BandSetArrays]
    scales: np.ndarray
    counts: np.ndarray
    tile: np.ndarray
    timestep: np.ndarray
    timestamps: np.ndarray


@dataclass
class LabelArrays:
    """Label rasters: `pixels` [F, C, y, x], `valid` [F, y, x]; `tile`, `timestep` int64 [F]."""

    name: str
    pixels: np.ndarray
    valid: np.ndarray
    tile: np.ndarray
    timestep: np.ndarray
    ignore_index: int | None


@dataclass
class TileArrays:
    """Everything read of the tiles of a batch; what augments it changes it in place.

    `tile_indices` int64 [B] are rows of the dataset. `labels` holds label rasters, or arrays [B, ...].
    """

    tile_indices: np.ndarray
    modalities: list[FrameArrays]
    labels: dict[str, LabelArrays | np.ndarray] = field(default_factory=dict)
    normalized: bool = False
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Leaves:
    """The leaves of a modality that become tokens, in frame and storage order; [n] each."""

    scales: np.ndarray
    yx: np.ndarray
    frame: np.ndarray
    tile: np.ndarray
    timestep: np.ndarray


def pack(read: TileArrays) -> TokenBatch:
    """The batch of some tiles, in their order. Arrays of pixels are taken over, not copied."""
    num_tiles = len(read.tile_indices)
    leaves = [_present(frames) for frames in read.modalities]
    groups = [
        (m, b) for m, frames in enumerate(read.modalities) for b in range(len(frames.band_sets))
    ]
    per_group = [np.bincount(leaves[m].tile, minlength=num_tiles) for m, _ in groups]
    tokens_per_tile = np.stack(per_group).sum(0)
    num_tokens = int(tokens_per_tile.sum())
    scales, frame = np.empty(num_tokens, np.uint8), np.empty(num_tokens, np.int64)
    modality, band_set = np.empty(num_tokens, np.uint8), np.empty(num_tokens, np.uint8)
    positions = np.empty((num_tokens, 4), np.int32)
    for (m, b), at in zip(groups, _places(per_group, tokens_per_tile, leaves, groups), strict=True):
        of = leaves[m]
        scales[at], frame[at], modality[at], band_set[at] = of.scales, of.frame, m, b
        positions[at, :2], positions[at, 2], positions[at, 3] = of.yx, of.scales, of.timestep
    return TokenBatch(
        modalities=tuple(map(_modality, read.modalities, leaves)),
        labels={name: _label(label) for name, label in read.labels.items()},
        scales=torch.from_numpy(scales),
        positions=torch.from_numpy(positions),
        frame=torch.from_numpy(frame),
        modality=torch.from_numpy(modality),
        band_set=torch.from_numpy(band_set),
        mask=torch.full((num_tokens,), ONLINE, dtype=torch.uint8),
        cu_seqlens=cumulative_lengths(torch.from_numpy(tokens_per_tile)),
        max_seqlen=int(tokens_per_tile.max(initial=0)),
        tile_indices=torch.from_numpy(np.asarray(read.tile_indices, np.int64)),
        normalized=read.normalized,
        skipped=read.skipped,
    )


def _present(frames: FrameArrays) -> _Leaves:
    keep = np.flatnonzero(~segments.is_missing(frames.scales))
    frame = np.repeat(np.arange(len(frames.counts)), frames.counts)[keep]
    # Every frame's leaves cover all its cells: one running sum serves all frames.
    start = segments.starts(frames.scales)[keep] - frame * frames.grid.num_cells
    return _Leaves(
        scales=frames.scales[keep],
        yx=frames.grid.cell_yx[start],
        frame=frame,
        tile=frames.tile[frame],
        timestep=frames.timestep[frame],
    )


def _places(
    per_group: Sequence[np.ndarray],
    tokens_per_tile: np.ndarray,
    leaves: Sequence[_Leaves],
    groups: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
    """Where the tokens of every group go, int64 [n] each: tile after tile, in a tile group after group."""
    first_of_tile = np.cumsum(tokens_per_tile) - tokens_per_tile
    before_in_tile = accumulate(per_group, initial=np.zeros_like(tokens_per_tile))
    places = []
    for (m, _), counts, before in zip(groups, per_group, before_in_tile, strict=False):
        shift = first_of_tile + before - (np.cumsum(counts) - counts)
        places.append(np.arange(len(leaves[m].tile)) + shift[leaves[m].tile])
    return places


def _modality(frames: FrameArrays, leaves: _Leaves) -> ModalityFrames:
    per_scale = np.bincount(leaves.scales, minlength=frames.grid.num_scales)
    return ModalityFrames(
        name=frames.name,
        grid=frames.grid,
        band_sets=tuple(
            BandSetPixels(
                s.name,
                s.bands,
                torch.from_numpy(s.pixels),
                torch.from_numpy(s.valid),
                torch.from_numpy(s.band_present),
            )
            for s in frames.band_sets
        ),
        tile=torch.from_numpy(frames.tile),
        timestep=torch.from_numpy(frames.timestep),
        timestamps=torch.from_numpy(frames.timestamps),
        tokens_per_scale=tuple(per_scale.tolist()),
    )


def _label(label: LabelArrays | np.ndarray) -> LabelFrames | torch.Tensor:
    if isinstance(label, np.ndarray):
        return torch.from_numpy(label)
    return LabelFrames(
        label.name,
        torch.from_numpy(label.pixels),
        torch.from_numpy(label.valid),
        torch.from_numpy(label.tile),
        torch.from_numpy(label.timestep),
        label.ignore_index,
    )
