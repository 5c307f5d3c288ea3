"""Augmentation of whole tiles: turns, crops, left-out dates and bands, for pixels and scales alike.

What happens to a tile is a pure function of (seed, epoch, tile): the batch it comes in plays no part.
All its frames, modalities and labels turn and are cropped together.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from model.data import draws
from model.data.frames import Buffers, ChosenFrames, LabelReader, ModalityReader
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
from model.packing import BandSetArrays, FrameArrays, LabelArrays, TileArrays
from pipeline.errors import ConfigError
from pipeline.scorers.config import Frozen
from pipeline.storage.layout import StoreLayout

# (seed, epoch): what randomness is drawn by, beside the tile.
Draw = tuple[int, int]


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
class Augmenter:
    """An augmentation for what one dataset reads; `augmenter_of` makes it.

    `dated` holds the modalities that are not static, and whether they have tokens, as labels have not.

    Methods take `draw`, seed and epoch, and keys, int64, that name tiles. Without a draw nothing is random:
    no turn, every date and band, and of a crop the window in the middle.
    """

    settings: Augmentation
    crop: Crop | None
    dated: Mapping[str, bool]

    def leave_out_dates(
        self, draw: Draw | None, tile_keys: np.ndarray, frames: dict[str, ChosenFrames]
    ) -> None:
        """Leave frames of dates that are dropped out of those to read, by modality.

        A date of a tile stays or goes in all modalities, but static ones stay. In each tile one date that
        has a frame beside labels stays in any case.
        """
        dated = [name for name in frames if name in self.dated]
        if draw is None or not self.settings.drop_dates or not dated:
            return
        sizes = [frames[name].tile.size for name in dated]
        kept = self._dates_kept(
            draw,
            tile_keys[np.concatenate([frames[name].tile for name in dated])],
            np.concatenate([frames[name].timestep for name in dated]),
            np.repeat([self.dated[name] for name in dated], sizes),
        )
        for name, of_modality in zip(dated, np.split(kept, np.cumsum(sizes)[:-1]), strict=True):
            frames[name] = frames[name].where(of_modality)

    def apply(
        self, draw: Draw | None, tile_keys: np.ndarray, read: TileArrays, buffers: Buffers
    ) -> None:
        """Turn and crop what was read of the tiles with these keys [B], labels too, and leave out bands.

        In place, but crops lie in memory taken from `buffers`.
        """
        turns, corners = self._turns(draw, tile_keys), self._corners(draw, tile_keys)
        for frames in read.modalities:
            self._scales(frames, turns[frames.tile], corners[frames.tile])
        labels = [label for label in read.labels.values() if isinstance(label, LabelArrays)]
        for raster, tile in _rasters(read.modalities, labels):
            for kind in ("pixels", "valid"):
                array = getattr(raster, kind)
                setattr(raster, kind, self._raster(array, turns[tile], corners[tile], buffers))
        for frames in read.modalities:
            for band_set in frames.band_sets:
                name = f"{frames.name}/{band_set.name}"
                kept = self._bands(draw, tile_keys, len(band_set.bands), name)
                band_set.band_present &= kept[frames.tile]
                band_set.pixels[~band_set.band_present] = 0

    def _scales(self, frames: FrameArrays, turns: np.ndarray, corners: np.ndarray) -> None:
        """Turn and crop the partitions; `turns` [F], `corners` [F, 2] in parts."""
        if self.crop is not None:
            side = frames.grid.rows // frames.grid.root_cells
            roots, size = side // self.crop.parts, self.crop.size * side // self.crop.parts
            frames.scales, frames.counts = crop_scales(
                frames.scales, frames.counts, corners * roots, size, frames.grid
            )
            frames.grid = cropped_grid(frames.grid, size)
        if turns.any():
            frames.scales = turn_scales(frames.scales, frames.counts, turns, frames.grid)

    def _raster(
        self, raster: np.ndarray, turns: np.ndarray, corners: np.ndarray, buffers: Buffers
    ) -> np.ndarray:
        if self.crop is None:
            turn_rasters(raster, turns)
            return raster
        part = raster.shape[-1] // self.crop.parts
        side = part * self.crop.size
        out = buffers.take((*raster.shape[:-2], side, side), raster.dtype)
        crop_rasters(raster, corners * part, turns, out)
        return out

    def _dates_kept(
        self,
        draw: Draw,
        tile_keys: np.ndarray,
        timesteps: np.ndarray,
        tokens: np.ndarray,
    ) -> np.ndarray:
        """bool [n]: which of some frames stay, given key of the tile and timestep of each, int64 [n].

        `tokens` bool [n] is False for labels, which cannot be what stays in any case.
        """
        share = self.settings.drop_dates
        chance = draws.uniform(*draw, (tile_keys, timesteps), "dates")
        _, tile = np.unique(tile_keys, return_inverse=True)
        highest = np.full(tile_keys.size, -1.0)
        np.maximum.at(highest, tile[tokens], chance[tokens])
        return (chance >= share) | (chance == highest[tile])

    def _turns(self, draw: Draw | None, tile_keys: np.ndarray) -> np.ndarray:
        """int64 [B]: the turn of each tile."""
        turns = np.array(self.settings.turns)
        if draw is None or turns.size == 1:
            return np.full(tile_keys.size, IDENTITY)
        return turns[draws.integers(*draw, tile_keys, "turns", turns.size)]

    def _corners(self, draw: Draw | None, tile_keys: np.ndarray) -> np.ndarray:
        """int64 [B, 2]: top and left (y, x) of the window of each tile, in parts."""
        room = 0 if self.crop is None else self.crop.parts - self.crop.size
        if draw is None or not room:
            return np.full((tile_keys.size, 2), room // 2)
        return draws.integers(*draw, (tile_keys[:, None], np.arange(2)), "corners", room + 1)

    def _bands(
        self, draw: Draw | None, tile_keys: np.ndarray, num_bands: int, name: str
    ) -> np.ndarray:
        """bool [B, C]: which bands of each tile stay, the same in all its frames."""
        share = self.settings.drop_bands
        if draw is None or not share:
            return np.ones((tile_keys.size, num_bands), bool)
        keys = (tile_keys[:, None], np.arange(num_bands))
        chance = draws.uniform(*draw, keys, f"bands of {name}")
        return (chance >= share) | (chance == chance.max(axis=1, keepdims=True))


def _rasters(
    modalities: Sequence[FrameArrays], labels: Sequence[LabelArrays]
) -> Iterator[tuple[BandSetArrays | LabelArrays, np.ndarray]]:
    """What has pixels and validity, and the tile of each of its frames."""
    for frames in modalities:
        for band_set in frames.band_sets:
            yield band_set, frames.tile
    for label in labels:
        yield label, label.tile


def augmenter_of(
    settings: Augmentation,
    rows: np.ndarray,
    images: Sequence[ModalityReader],
    labels: Mapping[str, LabelReader],
    per_tile: Mapping[str, np.ndarray],
) -> Augmenter:
    """The augmentation of the tiles in these rows of a manifest, with these modalities and labels.

    Raises ConfigError where a setting cannot be used, or has no effect.
    """
    if not isinstance(settings, Augmentation):
        raise ConfigError(
            f"augment is {settings!r:.80}; give an Augmentation, for example Augmentation(flips=True)"
        )
    most_dates = max(
        (int(np.diff(r.dates.starts)[rows].max(initial=0)) for r in images if r.dates is not None),
        default=1,
    )
    layouts = [replace(r.layout, band_sets=r.band_sets) for r in images]
    rasters = [r.layout for r in labels.values()]
    check_effect(settings, layouts, most_dates)
    crop = crop_of(settings.crop_px, layouts, rasters)
    if crop is not None or settings.flips or settings.rotations:
        _check_labels(per_tile)
    dated = {r.name: True for r in images if not r.static}
    dated |= {r.name: False for r in labels.values() if not r.static}
    return Augmenter(settings, crop, dated)


def check_effect(settings: Augmentation, images: Sequence[StoreLayout], most_dates: int) -> None:
    """Raise ConfigError where there are no dates or bands to leave out; tiles have up to `most_dates`."""
    if settings.drop_dates and most_dates < 2:
        raise ConfigError(
            f"drop_dates is {settings.drop_dates}, and no tile has more than one date, which always stays; "
            "leave drop_dates out"
        )
    if settings.drop_bands and all(len(s.bands) == 1 for image in images for s in image.band_sets):
        raise ConfigError(
            f"drop_bands is {settings.drop_bands}, and every band set has one band only, which always "
            "stays; leave drop_bands out"
        )


def crop_of(
    crop_px: int | None, images: Sequence[StoreLayout], labels: Sequence[StoreLayout]
) -> Crop | None:
    """The window of `crop_px` px of the first of some modalities; ConfigError if it does not fit all."""
    if crop_px is None:
        return None
    parts = math.gcd(*(image.grid.rows // image.grid.root_cells for image in images))
    tile_px = images[0].grid.shape_px[0]
    part_px = tile_px // parts
    if crop_px % part_px or crop_px >= tile_px:
        raise ConfigError(
            f"crop_px is {crop_px}; it must be a multiple of {part_px} px, the roots of "
            f"{' and '.join(image.modality for image in images)}, and below {tile_px} px, the tile"
        )
    for layout in (*images, *labels):
        for band_set in layout.band_sets:
            if band_set.tile_size_px % parts:
                of_set = f", band set {band_set.name}," if band_set.name else ""
                raise ConfigError(
                    f"crop_px is {crop_px}, and tiles of {layout.modality}{of_set} have "
                    f"{band_set.tile_size_px} px, which {parts} roots do not divide; leave out crop_px or "
                    "these pixels"
                )
    return Crop(parts, crop_px // part_px)


def _check_labels(per_tile: Mapping[str, np.ndarray]) -> None:
    for name, array in per_tile.items():
        if array.ndim > 2:
            raise ConfigError(
                f"labels[{name!r}] has axes {array.shape}, which would not turn with the tiles: put "
                "rasters into the store, or turn them in `transform`; give anything else as [tile, number]"
            )
