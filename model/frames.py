"""Whole frames of a batch: what its tokens are cut from.

Shape suffixes are those of `model.batch`.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.grid import BaseGrid


@dataclass(frozen=True, eq=False)
class BandSetPixels:
    """Bands of one native resolution of all frames of a modality.

    - `name` ("" for a modality's first set) and `bands`: as in the store.
    - `pixels` [F, C, y, x]: in the archive's own numbers and type, or as the dataset was asked to give
      them; `y`, `x` are px of this set. A pixel that is not valid means nothing (0 if normalised).
    - `valid` bool [F, y, x]: which pixels are data.
    - `band_present` bool [F, C]: False where augmentation dropped a band; its pixels are 0.
    """

    name: str
    bands: tuple[str, ...]
    pixels: Tensor
    valid: Tensor
    band_present: Tensor


@dataclass(frozen=True, eq=False)
class ModalityFrames:
    """All frames of one modality in a batch, tile after tile, each tile's in the order of time.

    - `grid`: base cells of a frame.
    - `band_sets`: those read, in the dataset's order.
    - `tile` int64 [F]: position of the frame's tile in the batch, 0 ... B - 1, ascending.
    - `timestep` int64 [F]: which of its tile's dates; 0 for the one frame of a static modality.
    - `timestamps` int32 [F, 3]: (day 1 ... 31, month 0 ... 11, year) of that date, UTC; -1 where the date
      is unknown, and for static modalities, whose frame belongs to no date.
    - `tokens_per_scale`: tokens of every scale, fine to coarse, in each band set.
    - `num_timesteps`: one more than the largest `timestep`; 1 if there is no frame.
    - `static`: whether the one frame of a tile belongs to all its dates.
    """

    name: str
    grid: BaseGrid
    band_sets: tuple[BandSetPixels, ...]
    tile: Tensor
    timestep: Tensor
    timestamps: Tensor
    tokens_per_scale: tuple[int, ...]
    num_timesteps: int
    static: bool = False

    @property
    def num_frames(self) -> int:
        return self.tile.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens in each band set."""
        return sum(self.tokens_per_scale)

    @property
    def num_covered(self) -> int:
        """M: base cells of the tokens of one band set."""
        return sum(n * 4**scale for scale, n in enumerate(self.tokens_per_scale))

    def tokens_below(self, scale: int) -> int:
        """Tokens of smaller scales, in each band set."""
        return sum(self.tokens_per_scale[:scale])


@dataclass(frozen=True, eq=False)
class LabelFrames:
    """Label rasters of a batch: `pixels` [F, C, y, x] of class numbers, `valid` bool [F, y, x].

    `tile` and `timestep` int64 [F] as in `ModalityFrames`; `ignore_index` is the class that means
    "no label", None where the store names none. A tile without a label raster has no frame.
    """

    name: str
    pixels: Tensor
    valid: Tensor
    tile: Tensor
    timestep: Tensor
    ignore_index: int | None
