"""Tiles made in memory, each with a slow, obvious description of its quadtree beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from model.batch import TokenBatch
from model.packing import BandSetArrays, FrameArrays, TileArrays, pack
from pipeline.grid import BaseGrid
from pipeline.segments import MISSING_BIT
from pipeline.storage.tiles import Frames

NUM_BANDS = 3
HIGHEST = 1000


@dataclass(frozen=True)
class Leaf:
    """A square of `2**scale` base cells a side; `y`, `x` is its top-left cell."""

    y: int
    x: int
    scale: int
    missing: bool = False

    def children(self) -> list["Leaf"]:
        half = 2 ** (self.scale - 1)
        return [
            Leaf(self.y + dy, self.x + dx, self.scale - 1) for dy in (0, half) for dx in (0, half)
        ]

    def cells(self) -> list[tuple[int, int]]:
        """(y, x) of the base cells, quarter by quarter: TL, TR, BL, BR."""
        if self.scale == 0:
            return [(self.y, self.x)]
        return [cell for child in self.children() for cell in child.cells()]

    def window(self, p: int) -> tuple[slice, slice]:
        """The leaf's pixels of an image [..., y, x]."""
        side = 2**self.scale * p
        return (
            slice(self.y * p, self.y * p + side),
            slice(self.x * p, self.x * p + side),
        )


def roots(grid: BaseGrid) -> list[Leaf]:
    side = grid.root_cells
    return [
        Leaf(y, x, grid.num_scales - 1)
        for y in range(0, grid.rows, side)
        for x in range(0, grid.cols, side)
    ]


@dataclass(frozen=True)
class Tiles:
    """Frames of some tiles, and the leaves of every frame as squares."""

    made_from: str
    grid: BaseGrid
    frames_per_tile: np.ndarray
    frames: Frames
    leaves: list[list[Leaf]]

    def __repr__(self) -> str:
        return f"Tiles({self.made_from})"

    @property
    def num_tiles(self) -> int:
        return len(self.frames_per_tile)

    @property
    def tile_and_timestep(self) -> list[tuple[int, int]]:
        """Of every frame."""
        return [(tile, t) for tile, n in enumerate(self.frames_per_tile) for t in range(n)]

    def present(self) -> list[tuple[int, Leaf]]:
        """(frame, leaf) of every token, in token order."""
        return [
            (f, leaf) for f, leaves in enumerate(self.leaves) for leaf in leaves if not leaf.missing
        ]

    def merging_order(self) -> list[tuple[int, Leaf]]:
        """(frame, leaf) of every token, scale by scale."""
        return sorted(self.present(), key=lambda token: token[1].scale)

    def rows(self) -> list[tuple[int, int, int]]:
        """(frame, y, x) of every base cell below a token, in merging order."""
        return [(f, y, x) for f, leaf in self.merging_order() for y, x in leaf.cells()]

    def pack(self) -> TokenBatch:
        return pack(TileArrays(np.arange(self.num_tiles), [self.arrays()]))

    def arrays(self) -> FrameArrays:
        """The frames as they are read from a store, of modality "image"."""
        frames, owner = self.frames, np.array(self.tile_and_timestep, np.int64).reshape(-1, 2)
        present = np.ones(frames.pixels.shape[:2], np.bool_)
        bands = tuple(f"B{band}" for band in range(present.shape[1]))
        return FrameArrays(
            name="image",
            grid=self.grid,
            band_sets=[BandSetArrays("", bands, frames.pixels, frames.valid, present)],
            scales=np.concatenate([np.empty(0, np.uint8), *frames.scales]),
            counts=np.array([len(scales) for scales in frames.scales], np.int64),
            tile=owner[:, 0].copy(),
            timestep=owner[:, 1].copy(),
            timestamps=np.full((len(owner), 3), -1, np.int32),
        )

    def select(self, tiles: Sequence[int]) -> Self:
        """The same tiles in another order, or some of them."""
        chosen = [
            f
            for tile in tiles
            for f, (owner, _) in enumerate(self.tile_and_timestep)
            if owner == tile
        ]
        frames = Frames(
            self.frames.pixels[chosen],
            self.frames.valid[chosen],
            [self.frames.scales[f] for f in chosen],
        )
        return replace(
            self,
            frames_per_tile=self.frames_per_tile[list(tiles)],
            frames=frames,
            leaves=[self.leaves[f] for f in chosen],
        )

    def with_pixels(self, pixels: np.ndarray) -> Self:
        return replace(self, frames=replace(self.frames, pixels=pixels))

    def with_leaves(self, leaves: list[list[Leaf]]) -> Self:
        scales = [_scales(of_frame) for of_frame in leaves]
        return replace(self, leaves=leaves, frames=replace(self.frames, scales=scales))


def _scales(leaves: list[Leaf]) -> np.ndarray:
    return np.array(
        [leaf.scale | (MISSING_BIT if leaf.missing else 0) for leaf in leaves], np.uint8
    )


def _quadtree(
    rng: np.random.Generator, node: Leaf, split_share: float, missing_share: float
) -> list[Leaf]:
    if node.scale and rng.random() < split_share:
        return [
            leaf
            for child in node.children()
            for leaf in _quadtree(rng, child, split_share, missing_share)
        ]
    return [replace(node, missing=bool(rng.random() < missing_share))]


def _valid(rng: np.random.Generator, grid: BaseGrid, leaves: list[Leaf]) -> np.ndarray:
    """Some pixels invalid; none valid in a missing leaf, at least one in any other."""
    valid = rng.random(grid.shape_px) < 0.7
    for leaf in leaves:
        window = leaf.window(grid.base_patch_size)
        valid[window] &= not leaf.missing
        if not leaf.missing and not valid[window].any():
            valid[window] = True
    return valid


def build_tiles(
    seed: int = 0,
    tiles: Sequence[tuple[int, float]] = ((2, 0.2), (1, 0.2), (3, 0.2)),
    num_roots: tuple[int, int] = (2, 1),
    base_patch_size: int = 2,
    num_scales: int = 3,
    split_share: float = 0.6,
) -> Tiles:
    """Random tiles; `tiles` gives the number of frames and the share of missing leaves of each."""
    rng = np.random.default_rng(seed)
    side = 2 ** (num_scales - 1)
    grid = BaseGrid(num_roots[0] * side, num_roots[1] * side, base_patch_size, num_scales)
    leaves = [
        [leaf for root in roots(grid) for leaf in _quadtree(rng, root, split_share, missing)]
        for num_frames, missing in tiles
        for _ in range(num_frames)
    ]
    shape = (len(leaves), NUM_BANDS, *grid.shape_px)
    return Tiles(
        made_from=f"{seed=}, {tiles=}, {num_roots=}, {base_patch_size=}, {num_scales=}, {split_share=}",
        grid=grid,
        frames_per_tile=np.array([num_frames for num_frames, _ in tiles]),
        frames=Frames(
            rng.integers(0, HIGHEST, shape, np.uint16),
            np.array([_valid(rng, grid, of_frame) for of_frame in leaves], bool).reshape(
                len(leaves), *grid.shape_px
            ),
            [_scales(of_frame) for of_frame in leaves],
        ),
        leaves=leaves,
    )
