"""Tiles of several modalities, resolutions, dates and band sets, made in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from model.batch import TokenBatch
from model.packing import BandSetArrays, FrameArrays, TileArrays, pack
from tile_makers import HIGHEST, Leaf, Tiles, build_tiles


@dataclass(frozen=True)
class Layer:
    """A modality of a scene: its tiles, further band sets of them, and the date of every frame.

    `more` maps names of band sets to (pixels [F, C, y, x], valid [F, y, x]). `timestamps` int32 [F, 3].
    """

    name: str
    tiles: Tiles
    more: dict[str, tuple[np.ndarray, np.ndarray]]
    timestamps: np.ndarray

    def arrays(self) -> FrameArrays:
        first = self.tiles.arrays()
        further = [
            BandSetArrays(
                name,
                tuple(f"C{band}" for band in range(pixels.shape[1])),
                pixels,
                valid,
                np.ones(pixels.shape[:2], np.bool_),
            )
            for name, (pixels, valid) in self.more.items()
        ]
        return replace(
            first,
            name=self.name,
            band_sets=[*first.band_sets, *further],
            timestamps=self.timestamps,
            static=self.name == "dem",
        )

    def select(self, tiles: Sequence[int]) -> Self:
        owners = [tile for tile, _ in self.tiles.tile_and_timestep]
        kept = [f for tile in tiles for f, owner in enumerate(owners) if owner == tile]
        return replace(
            self,
            tiles=self.tiles.select(tiles),
            more={name: (p[kept], v[kept]) for name, (p, v) in self.more.items()},
            timestamps=self.timestamps[kept],
        )

    def without(self, frames: set[int]) -> Self:
        """All leaves of some frames missing; their pixels stay."""
        leaves = [
            [replace(leaf, missing=leaf.missing or f in frames) for leaf in of_frame]
            for f, of_frame in enumerate(self.tiles.leaves)
        ]
        return replace(self, tiles=self.tiles.with_leaves(leaves))


@dataclass(frozen=True)
class Scene:
    """Tiles of several modalities, pixels as float32.

    - "s2": 8 x 8 cells of 2 px at 10 m, three scales, of the first band set (3 bands) and of "20m"
      (2 bands, whose cells have 1 px); as many dates as a tile has;
    - "s1": the same ground at 20 m, 4 x 4 cells of 2 px, two scales; other dates;
    - "dem": static, 2 x 2 cells of 3 px at about 26.7 m, one scale.

    `location` float32 [tile, 2]; not known of some.
    """

    made_from: str
    layers: tuple[Layer, ...]
    location: np.ndarray

    def __repr__(self) -> str:
        return f"Scene({self.made_from})"

    @property
    def num_tiles(self) -> int:
        return self.layers[0].tiles.num_tiles

    def pack(self) -> TokenBatch:
        arrays = [layer.arrays() for layer in self.layers]
        return pack(TileArrays(np.arange(self.num_tiles), arrays, location=self.location))

    def select(self, tiles: Sequence[int]) -> Self:
        return replace(
            self,
            layers=tuple(layer.select(tiles) for layer in self.layers),
            location=self.location[list(tiles)],
        )

    def with_layer(self, name: str, change: Callable[[Layer], Layer]) -> Self:
        return replace(
            self, layers=tuple(change(la) if la.name == name else la for la in self.layers)
        )

    def only(self, *names: str) -> Self:
        """The modalities of these names, in this order."""
        by_name = {layer.name: layer for layer in self.layers}
        return replace(self, layers=tuple(by_name[name] for name in names))


# (frames of s2, of s1, of dem; share of missing leaves) of every tile.
SceneTile = tuple[int, int, int, float]
SCENE_TILES: tuple[SceneTile, ...] = (
    (2, 1, 1, 0.2),
    (0, 0, 0, 0.0),
    (1, 0, 1, 0.2),
    (3, 2, 0, 0.2),
)


def build_scene(
    seed: int = 0, tiles: Sequence[SceneTile] = SCENE_TILES, split_share: float = 0.5
) -> Scene:
    """Random tiles of three modalities; some lack a modality, one has no frame at all."""
    rng = np.random.default_rng(seed)
    shapes = {
        "s2": ((2, 2), 2, 3), "s1": ((2, 2), 2, 2), "dem": ((2, 2), 3, 1),
    }  # fmt: skip
    layers = []
    for i, (name, (num_roots, px, num_scales)) in enumerate(shapes.items()):
        made = build_tiles(
            seed=int(rng.integers(2**32)),
            tiles=[(tile[i], tile[3]) for tile in tiles],
            num_roots=num_roots,
            base_patch_size=px,
            num_scales=num_scales,
            split_share=split_share,
        )
        made = made.with_pixels(made.frames.pixels.astype(np.float32))
        frames = len(made.leaves)
        more = {"20m": _coarser(rng, made)} if name == "s2" else {}
        stamps = rng.integers((1, 0, 2017), (29, 12, 2025), (frames, 3)).astype(np.int32)
        if name == "dem":
            stamps[:] = -1
        layers.append(Layer(name, made, more, stamps))
    location = rng.uniform((-90, -180), (90, 180), (len(tiles), 2)).astype(np.float32)
    location[rng.random(len(tiles)) < 0.3] = np.nan
    return Scene(f"{seed=}, {tiles=}, {split_share=}", tuple(layers), location)


def _coarser(rng: np.random.Generator, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Two bands at half the resolution, valid in about four pixels of five."""
    frames, (height, width) = len(tiles.leaves), tiles.grid.shape_px
    shape = (frames, 2, height // 2, width // 2)
    valid = rng.random((frames, *shape[2:])) < 0.8
    return rng.integers(0, HIGHEST, shape).astype(np.float32), valid


@dataclass(frozen=True)
class Groups:
    """Modalities "m0", "m1", ... of the same tiles, each with quadtrees and band sets of its own."""

    modalities: list[Tiles]
    band_sets: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Groups({self.modalities}, band_sets={self.band_sets})"

    @property
    def num_tiles(self) -> int:
        return self.modalities[0].num_tiles

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """(modality, band set) of every group."""
        return [(m, b) for m, sets in enumerate(self.band_sets) for b in range(sets)]

    def tokens(self) -> list[tuple[int, int, int, Leaf]]:
        """(modality, band set, frame, leaf) of every token, in the batch's order."""
        return [
            (m, b, f, leaf)
            for tile in range(self.num_tiles)
            for m, b in self.numbers
            for f, leaf in self.modalities[m].present()
            if self.modalities[m].tile_and_timestep[f][0] == tile
        ]

    def pack(self) -> TokenBatch:
        return pack(
            TileArrays(
                np.arange(self.num_tiles), list(map(self._arrays, range(len(self.modalities))))
            )
        )

    def _arrays(self, modality: int) -> FrameArrays:
        arrays = self.modalities[modality].arrays()
        (first,) = arrays.band_sets
        return replace(
            arrays,
            name=f"m{modality}",
            band_sets=[
                replace(first, name=f"set{b}" if b else "", pixels=first.pixels + np.uint16(b))
                for b in range(self.band_sets[modality])
            ],
        )


def build_groups(seed: int, num_tiles: int, modalities: Sequence[tuple[int, int, int]]) -> Groups:
    """Random groups; `modalities` gives (scales, band sets, most frames of a tile) of each.

    A tile may have no frame of a modality, and frames no token.
    """
    rng = np.random.default_rng(seed)
    return Groups(
        [
            build_tiles(
                seed=seed + number,
                tiles=[
                    (int(rng.integers(0, frames + 1)), float(rng.choice([0.0, 0.3, 1.0])))
                    for _ in range(num_tiles)
                ],
                num_roots=(1, 2) if num_scales < 4 else (1, 1),
                num_scales=num_scales,
                split_share=float(rng.choice([0.0, 0.5, 0.5, 1.0])),
            )
            for number, (num_scales, _, frames) in enumerate(modalities)
        ],
        tuple(band_sets for _, band_sets, _ in modalities),
    )


def change_group(batch: TokenBatch, m: int, b: int, **changes: torch.Tensor) -> TokenBatch:
    """A batch with other `pixels`, `valid` or `band_present` of one band set of one modality."""
    frames = batch.modalities[m]
    sets = [replace(s, **changes) if i == b else s for i, s in enumerate(frames.band_sets)]
    changed = replace(frames, band_sets=tuple(sets))
    return replace(
        batch,
        modalities=tuple(changed if i == m else f for i, f in enumerate(batch.modalities)),
    )
