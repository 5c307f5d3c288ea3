"""From frames as they were read to a packed batch: only work per token, none per base cell or pixel."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from model.batch import ONLINE, TokenBatch
from model.frames import BandSetPixels, LabelFrames, ModalityFrames
from pipeline import segments
from pipeline.grid import BaseGrid
from pipeline.storage.tiles import expand


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
    ascending; `timestep` int64 [F]; `timestamps` int32 [F, 3] and `static` as in
    `ModalityFrames`.
    """

    name: str
    grid: BaseGrid
    band_sets: list[BandSetArrays]
    scales: np.ndarray
    counts: np.ndarray
    tile: np.ndarray
    timestep: np.ndarray
    timestamps: np.ndarray
    static: bool = False


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
    `location` [B, 2] as in `TokenBatch`; None where no tile's is known.
    """

    tile_indices: np.ndarray
    modalities: list[FrameArrays]
    labels: dict[str, LabelArrays | np.ndarray] = field(default_factory=dict)
    normalized: bool = False
    skipped: tuple[str, ...] = ()
    location: np.ndarray | None = None


@dataclass(frozen=True)
class _Leaves:
    """The leaves of a modality that become tokens, in frame and storage order; [n] each.

    `yx` and `scale_timestep` are pairs of int32 seen as one int64, which makes them one look-up each.
    `per_tile` int64 [B] counts them.
    """

    scales: np.ndarray
    frame: np.ndarray
    yx: np.ndarray
    scale_timestep: np.ndarray
    per_tile: np.ndarray


def pack(read: TileArrays) -> TokenBatch:
    """The batch of some tiles, in their order. Arrays of pixels are taken over, not copied."""
    num_tiles = len(read.tile_indices)
    leaves = [_present(frames, num_tiles) for frames in read.modalities]
    groups = [
        (m, b) for m, frames in enumerate(read.modalities) for b in range(len(frames.band_sets))
    ]
    per_group = [leaves[m].per_tile for m, _ in groups]
    tokens_per_tile = np.stack(per_group).sum(0)
    num_tokens = int(tokens_per_tile.sum())
    scales, frame = np.empty(num_tokens, np.uint8), np.empty(num_tokens, np.int64)
    modality, band_set = np.empty(num_tokens, np.uint8), np.empty(num_tokens, np.uint8)
    positions = np.empty((num_tokens, 2), np.int64)
    for (m, b), at in zip(groups, _places(per_group, tokens_per_tile), strict=True):
        of = leaves[m]
        scales[at], frame[at], modality[at], band_set[at] = of.scales, of.frame, m, b
        positions[at, 0], positions[at, 1] = of.yx, of.scale_timestep
    return TokenBatch(
        modalities=tuple(map(_modality, read.modalities, leaves)),
        labels={name: _label(label) for name, label in read.labels.items()},
        scales=torch.from_numpy(scales),
        positions=torch.from_numpy(positions.view(np.int32)),
        frame=torch.from_numpy(frame),
        modality=torch.from_numpy(modality),
        band_set=torch.from_numpy(band_set),
        mask=torch.from_numpy(np.full(num_tokens, ONLINE, np.uint8)),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(tokens_per_tile)).astype(np.int32)),
        max_seqlen=int(tokens_per_tile.max(initial=0)),
        tile_indices=torch.from_numpy(np.asarray(read.tile_indices, np.int64)),
        location=_location(read.location, num_tiles),
        normalized=read.normalized,
        skipped=read.skipped,
    )


def _present(frames: FrameArrays, num_tiles: int) -> _Leaves:
    grid, scales = frames.grid, frames.scales
    frame = np.repeat(np.arange(len(frames.counts)), frames.counts)
    lengths = segments.run_lengths(scales)
    # Every frame's leaves cover all its cells: one running sum serves all frames.
    start = np.cumsum(lengths) - lengths - frame * grid.num_cells
    missing = segments.is_missing(scales)
    if missing.any():
        keep = np.flatnonzero(~missing)
        scales, frame, start = scales[keep], frame[keep], start[keep]
        per_frame = np.bincount(frame, minlength=len(frames.counts))
    else:
        per_frame = frames.counts
    first_of_tile = np.searchsorted(frames.tile, np.arange(num_tiles + 1))
    before = np.append(0, np.cumsum(per_frame))
    timesteps = _pairs(np.zeros_like(frames.timestep), frames.timestep)
    return _Leaves(
        scales=scales,
        frame=frame,
        yx=grid.cell_yx.view(np.int64).ravel().take(start),
        scale_timestep=_SCALE_PAIRS.take(scales) + timesteps.take(frame),
        per_tile=np.diff(before[first_of_tile]),
    )


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 [n]: pairs of int32 side by side in memory; pairs that are 0 where others are not add up."""
    return np.column_stack([first, second]).astype(np.int32).view(np.int64).ravel()


_SCALE_PAIRS = _pairs(np.arange(256), np.zeros(256))


def _places(
    per_group: Sequence[np.ndarray], tokens_per_tile: np.ndarray
) -> list[np.ndarray | slice]:
    """Where the tokens of every group go, [n] each: tile after tile, in a tile group after group."""
    if len(per_group) == 1:
        return [slice(None)]
    first_of_tile = np.cumsum(tokens_per_tile) - tokens_per_tile
    before_in_tile = accumulate(per_group, initial=np.zeros_like(tokens_per_tile))
    return [
        expand(first_of_tile + before, counts)
        for counts, before in zip(per_group, before_in_tile, strict=False)
    ]


def _modality(frames: FrameArrays, leaves: _Leaves) -> ModalityFrames:
    per_scale = [np.count_nonzero(leaves.scales == s) for s in range(frames.grid.num_scales)]
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
        tokens_per_scale=tuple(map(int, per_scale)),
        num_timesteps=int(frames.timestep.max(initial=0)) + 1,
        static=frames.static,
    )


def _location(location: np.ndarray | None, num_tiles: int) -> torch.Tensor:
    if location is None:
        location = np.full((num_tiles, 2), np.nan)
    return torch.from_numpy(location.astype(np.float32))


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
