"""Augmentation of whole tiles: turns, crops, left-out dates and bands, for pixels and scales alike.

What happens to a tile is a pure function of (seed, epoch, tile): the batch it comes in plays no part.
All its frames, modalities and labels turn and are cropped together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from model.data import draws
from model.data.symmetry import (
    FLIPS,
    IDENTITY,
    NUM_TURNS,
    ROTATIONS,
    crop_rasters,
    crop_scales,
    cropped_grid,
    turn_rasters,
    turn_scales,
)
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.scorers.config import Frozen
from pipeline.storage.layout import StoreLayout

# Seed and epoch of random numbers; without one nothing is random (see `Augmenter`).
Draw = tuple[int, int] | None


class Augmentation(Frozen):
    """What is done to tiles at random while training."""

    flips: bool = Field(False, description="Mirror tiles, top to bottom and left to right.")
    rotations: bool = Field(False, description="Turn tiles by 0, 90, 180 or 270 degrees.")
    crop_px: int | None = Field(
        None,
        ge=1,
        description="Side of the window kept of a tile, in px of the base grid of the dataset's first "
        "modality; whole roots.",
    )
    drop_dates: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of leaving out each timestep of a tile; one always stays.",
    )
    drop_bands: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of leaving out each band of a tile; one of each band set always stays.",
    )

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self == type(self).model_construct():
            raise ValueError("everything is off, which has no effect; leave the augmentation out")
        return self

    @property
    def turns(self) -> tuple[int, ...]:
        """The turns a tile may undergo, all equally likely (see `model.data.symmetry`)."""
        if self.flips and self.rotations:
            return tuple(range(NUM_TURNS))
        if self.flips:
            return FLIPS
        return ROTATIONS if self.rotations else (IDENTITY,)


@dataclass(frozen=True)
class Crop:
    """Windows of `size` of the `parts` equal parts along a tile's side.

    The borders of the parts are borders of roots in every modality.
    """

    parts: int
    size: int


@dataclass(frozen=True)
class BandSetRead:
    """One band set of some frames: `pixels` [F, C, y, x], `valid` bool [F, y, x].

    `band_present` bool [F, C] is False where a band was left out; its pixels are 0.
    """

    name: str
    pixels: np.ndarray
    valid: np.ndarray
    band_present: np.ndarray


@dataclass(frozen=True)
class FramesRead:
    """Frames of one modality of a batch.

    `scales` uint8 [leaf] of frame after frame on `grid`, `counts` int64 [F] leaves of each; `tile`
    int64 [F] is each frame's place in the batch.
    """

    modality: str
    grid: BaseGrid
    scales: np.ndarray
    counts: np.ndarray
    tile: np.ndarray
    band_sets: tuple[BandSetRead, ...]


@dataclass(frozen=True)
class Augmenter:
    """An augmentation for the modalities of one dataset; `prepared` makes it.

    Every method takes `draw`, seed and epoch. Without one nothing is random: no turn, every date and
    band, and of a crop the window in the middle. Keys are int64 and name tiles.
    """

    settings: Augmentation
    crop: Crop | None

    def keep_frames(
        self, draw: Draw, tile_keys: np.ndarray, timesteps: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """bool [n]: which of some frames stay, given key of the tile and timestep of each, int64 [n].

        Give the frames of all modalities in one call, but no static ones: those stay. A timestep of a
        tile stays or goes in all of them. In each tile one timestep stays in any case, of those where
        `counts` (bool [n]) is True: labels do not count, they make no tokens.
        """
        share = self.settings.drop_dates
        if draw is None or not share or not tile_keys.size:
            return np.ones(tile_keys.size, bool)
        chance = draws.uniform(*draw, (tile_keys, timesteps), "dates")
        _, tile = np.unique(tile_keys, return_inverse=True)
        highest = np.full(tile_keys.size, -1.0)
        np.maximum.at(highest, tile[counts], chance[counts])
        return (chance >= share) | (chance == highest[tile])

    def apply(self, draw: Draw, tile_keys: np.ndarray, frames: FramesRead) -> FramesRead:
        """One modality of a batch, `tile_keys` int64 [B], turned, cropped and with bands left out.

        Pixels and validity are changed in place unless they are cropped.
        """
        grid, scales, counts = frames.grid, frames.scales, frames.counts
        if self.crop is not None:
            roots = (grid.rows // grid.root_cells) // self.crop.parts
            corners = self._corners(draw, tile_keys, self.crop)[frames.tile] * roots
            scales, counts = crop_scales(scales, counts, corners, self.crop.size * roots, grid)
            grid = cropped_grid(grid, self.crop.size * roots)
        turns = self._turns(draw, tile_keys)[frames.tile]
        if turns.any():
            scales = turn_scales(scales, counts, turns, grid)
        sets = tuple(
            self._band_set(draw, tile_keys, frames, band_set) for band_set in frames.band_sets
        )
        return replace(frames, grid=grid, scales=scales, counts=counts, band_sets=sets)

    def apply_raster(
        self, draw: Draw, tile_keys: np.ndarray, tile: np.ndarray, raster: np.ndarray
    ) -> np.ndarray:
        """Any raster [F, ..., y, x] that covers tiles, labels say, turned and cropped as its tiles are.

        `tile` int64 [F] is each one's place among `tile_keys`; changed in place unless it is cropped.
        """
        if self.crop is not None:
            part = raster.shape[-1] // self.crop.parts
            corners = self._corners(draw, tile_keys, self.crop)[tile] * part
            raster = crop_rasters(raster, corners, self.crop.size * part)
        turn_rasters(raster, self._turns(draw, tile_keys)[tile])
        return raster

    def _band_set(
        self, draw: Draw, tile_keys: np.ndarray, frames: FramesRead, band_set: BandSetRead
    ) -> BandSetRead:
        tile, num_bands = frames.tile, band_set.pixels.shape[1]
        pixels = self.apply_raster(draw, tile_keys, tile, band_set.pixels)
        valid = self.apply_raster(draw, tile_keys, tile, band_set.valid)
        name = f"{frames.modality}/{band_set.name}"
        present = band_set.band_present & self._bands(draw, tile_keys, num_bands, name)[tile]
        pixels[~present] = 0
        return replace(band_set, pixels=pixels, valid=valid, band_present=present)

    def _turns(self, draw: Draw, tile_keys: np.ndarray) -> np.ndarray:
        """int64 [B]: the turn of each tile."""
        turns = np.array(self.settings.turns)
        if draw is None or turns.size == 1:
            return np.full(tile_keys.size, IDENTITY)
        return turns[draws.integers(*draw, tile_keys, "turns", turns.size)]

    def _corners(self, draw: Draw, tile_keys: np.ndarray, crop: Crop) -> np.ndarray:
        """int64 [B, 2]: top and left (y, x) of the window of each tile, in parts."""
        if draw is None:
            return np.full((tile_keys.size, 2), (crop.parts - crop.size) // 2)
        bound = crop.parts - crop.size + 1
        return draws.integers(*draw, (tile_keys[:, None], np.arange(2)), "corners", bound)

    def _bands(self, draw: Draw, tile_keys: np.ndarray, num_bands: int, name: str) -> np.ndarray:
        """bool [B, C]: which bands of each tile stay."""
        share = self.settings.drop_bands
        if draw is None or not share:
            return np.ones((tile_keys.size, num_bands), bool)
        keys = (tile_keys[:, None], np.arange(num_bands))
        chance = draws.uniform(*draw, keys, f"bands of {name}")
        return (chance >= share) | (chance == chance.max(axis=1, keepdims=True))


def prepared(settings: Augmentation, layouts: Sequence[StoreLayout]) -> Augmenter:
    """The augmentation of the modalities and labels of these layouts, the first of which counts `crop_px`.

    Raises ConfigError where a setting cannot be used, or has no effect.
    """
    if settings.drop_bands and all(
        len(band_set.bands) == 1
        for layout in layouts
        for band_set in layout.band_sets
        if layout.tokenized
    ):
        raise ConfigError(
            f"drop_bands is {settings.drop_bands}, and every band set has one band only, which always "
            "stays; leave drop_bands out"
        )
    return Augmenter(settings, _crop(settings.crop_px, layouts))


def _crop(crop_px: int | None, layouts: Sequence[StoreLayout]) -> Crop | None:
    if crop_px is None:
        return None
    tokenized = [layout for layout in layouts if layout.tokenized]
    parts = math.gcd(*(layout.grid.rows // layout.grid.root_cells for layout in tokenized))
    tile_px = tokenized[0].grid.shape_px[0]
    part_px = tile_px // parts
    if crop_px % part_px or crop_px >= tile_px:
        raise ConfigError(
            f"crop_px is {crop_px}; it must be a multiple of {part_px} px, the roots of "
            f"{' and '.join(layout.modality for layout in tokenized)}, and below {tile_px} px, the tile"
        )
    for layout in layouts:
        for band_set in layout.band_sets:
            if band_set.tile_size_px % parts:
                raise ConfigError(
                    f"crop_px is {crop_px}, and tiles of {layout.modality}"
                    f"{f' band set {band_set.name}' if band_set.name else ''} have "
                    f"{band_set.tile_size_px} px, which {parts} roots do not divide; leave crop_px out, or "
                    "that band set"
                )
    return Crop(parts, crop_px // part_px)
