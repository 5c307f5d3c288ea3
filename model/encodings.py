"""What tokens know of themselves besides their pixels: band set, time, season, place, size.

A patch's position is that of its centre, in units of 10 m from the tile's top-left corner: patches of any
modality and size that lie on the same ground have the same position. Shape suffixes are those of
`model.batch`; Q = D / 4.
"""

import math
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.batch import TokenBatch
from model.config import EncoderConfig, group_name
from model.frames import ModalityFrames
from model.places import (
    node_centres,
    node_of_token,
    per_modality,
    sample_grid,
    select_once,
    starts,
    token_centres,
    units_per_cell,
)
from pipeline.grid import BaseGrid

# Of a head's 32 pairs of numbers, how many turn with y, with x and with the timestep.
_ROTARY_PAIRS = (12, 12, 8)
# The slowest pair turns once in 2 pi times as many units of 10 m, and as many timesteps.
_SLOWEST_POSITION, _SLOWEST_TIMESTEP = 1_000.0, 100.0
_SINCOS_BASE = 10_000.0
_MONTHS, _DAYS = 12.0, 365.25
_DAYS_BEFORE_MONTH = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
# Waves of the location token around the globe: 1, 2, 4 ... 512, the last one 80 km long.
_LOCATION_WAVES = 10
# Sine and cosine of every wave, of three coordinates.
LOCATION_FEATURES = 2 * 3 * _LOCATION_WAVES
_INIT_STD = 0.02


class CompositeEncodings(nn.Module):
    """What is added to tokens besides their pixels, in quarters of the width.

    1. the band set (learned, one vector for each), 2. the number of the timestep (sine-cosine), 3. the
    season (`season_encoding`), 4. the position (2-D sine-cosine: half for y, half for x).

    - position "rotary": quarters 2 and 4 are zero; `rotary_tables` tells the attention instead.
    - position "learned": quarter 4 is zero; a learned grid [D, rows, cols] laid over the tile, of
      `position_cells`, is added over the whole width, between its cells bilinearly.

    The learned vectors of band sets are apart, `band_set_vector`: they can be added with the bias of the
    patch embedding.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.band_sets = nn.ParameterDict(
            {
                group_name(modality.name, band_set.name): _small(config.width // 4)
                for modality in config.modalities
                for band_set in modality.band_sets
            }
        )
        self.grid: nn.Parameter | None = None
        if config.position_cells is not None:
            self.grid = _small(config.width, *config.position_cells)

    def band_set_vector(self, modality: str, band_set: str) -> Tensor:
        """[D]: the learned vector of a band set, in the first quarter."""
        return functional.pad(
            self.band_sets[group_name(modality, band_set)], (0, 3 * self.config.width // 4)
        )

    def base_rows(self, batch: TokenBatch, modality: int) -> Tensor:
        """[M, D]: time, season and position of every base row, in the order of `cell_index`.

        Memory of its own, which the caller may write to. Everything but the band set.
        """
        frames, index = batch.modalities[modality], batch.cell_index(modality)
        cells, of_frame = frames.grid.num_cells, self._of_frames(frames)
        if self.grid is not None:
            whole = of_frame[:, None] + sample_grid(self.grid, frames.grid, 0)
            return select_once(whole.flatten(0, 1), index)
        rows = of_frame.index_select(0, index // cells)
        if self.config.position == "sincos":
            # Only a quarter is written twice, and only a quarter of a table kept.
            table = self._of_nodes(frames)
            rows[:, -table.shape[1] :] = table.index_select(0, index % cells)
        return rows

    def tokens(self, batch: TokenBatch) -> Tensor:
        """[N, D]: the whole encoding, band set included, at the centre of every token."""
        of_frames = torch.cat([self._of_frames(frames) for frames in batch.modalities])
        frame = _first_frames(batch)[batch.modality.long()] + batch.frame
        rows = self._band_set_of_tokens(batch) + of_frames.index_select(0, frame)
        if self.config.position == "rotary":
            return rows
        of_nodes = torch.cat([self._of_nodes(frames) for frames in batch.modalities])
        rows[:, -of_nodes.shape[1] :] += of_nodes.index_select(0, node_of_token(batch))
        return rows

    def _of_frames(self, frames: ModalityFrames) -> Tensor:
        """[F, D]: what all cells of a frame share, without the band set: quarters 2 and 3."""
        quarter = self.config.width // 4
        steps = sincos(frames.timestep.float(), quarter)
        if self.config.position == "rotary":
            steps = torch.zeros_like(steps)
        season = season_encoding(frames.timestamps, quarter, self.config.season)
        time = torch.cat([steps, season], dim=1).to(self._kind)
        return functional.pad(time, (quarter, quarter))

    def _of_nodes(self, frames: ModalityFrames) -> Tensor:
        """Position of all possible leaves, as in `node_centres`.

        [nodes, D] of a learned grid, else the last quarter only, [nodes, Q].
        """
        grid = frames.grid
        if self.grid is not None:
            return torch.cat([sample_grid(self.grid, grid, s) for s in range(grid.num_scales)])
        units = units_per_cell(grid, self.config.modality(frames.name).metres_per_px)
        return _position_table(grid, units, self.config.width, self._kind, frames.tile.device)

    def _band_set_of_tokens(self, batch: TokenBatch) -> Tensor:
        """[N, D]"""
        names = [(m.name, s.name) for m in batch.modalities for s in m.band_sets]
        vectors = torch.stack([self.band_set_vector(*name) for name in names])
        first = starts(tuple(len(m.band_sets) for m in batch.modalities), batch.device)
        group = first[batch.modality.long()] + batch.band_set
        # A product, because the gradient of a look-up adds row by row.
        chosen = group[:, None] == torch.arange(len(names), device=group.device)
        return chosen.to(vectors.dtype) @ vectors

    @property
    def _kind(self) -> torch.dtype:
        return next(iter(self.band_sets.values())).dtype


class SizePosition(nn.Module):
    """An MLP of (y, x, size) of every token, relative to the tile: centre and side in 0 ... 1.

    Its last layer begins at zero: at initialisation it adds nothing.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: TokenBatch) -> Tensor:
        """[N, D]"""
        sides = per_modality(
            tuple((float(m.grid.rows), float(m.grid.cols)) for m in batch.modalities), batch.device
        )[batch.modality.long()]
        size = torch.exp2(batch.scales.float())[:, None] / sides[:, :1]
        features = torch.cat([token_centres(batch) / sides, size], dim=1)
        return self.out(functional.gelu(self.hidden(features.to(self.hidden.weight.dtype))))


class LocationToken(nn.Module):
    """One token per tile of its place on Earth; a learned one where the place is unknown.

    Latitude and longitude become the point on the unit sphere, which knows neither date line nor pole, and
    its three coordinates sines and cosines of 1, 2, 4 ... times themselves.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(LOCATION_FEATURES, width)
        self.unknown = _small(width)

    def forward(self, location_B2: Tensor) -> Tensor:
        """[B, D] of (latitude, longitude) in degrees; NaN in either is an unknown place."""
        known = location_B2.isfinite().all(1, keepdim=True)
        # Replaced before it is used: a NaN would still reach the gradient of the projection.
        lat, lon = torch.where(known, location_B2, 0).double().deg2rad().unbind(1)
        point = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=1)
        waves = 2.0 ** torch.arange(_LOCATION_WAVES, device=point.device, dtype=point.dtype)
        angles = (point[:, :, None] * waves).flatten(1)
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        return torch.where(known, self.projection(features.to(self.unknown.dtype)), self.unknown)


def rotary_tables(batch: TokenBatch, config: EncoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [N, 32] of the angles by which pairs of every head turn, for `apply_rotary`.

    12 pairs turn with y, 12 with x (of the token's centre, in units of 10 m) and 8 with the timestep, at
    geometrically spaced frequencies from 1 radian per unit down. A token that is to be left as it is, as
    those in front of a sequence, has cos 1 and sin 0. Source: Su et al. (2021), in two dimensions as by Heo
    et al. (2024), "Rotary Position Embedding for Vision Transformer".
    """
    units = per_modality(
        tuple(
            (units_per_cell(m.grid, config.modality(m.name).metres_per_px),)
            for m in batch.modalities
        ),
        batch.device,
    )[batch.modality.long()]
    places = torch.cat([token_centres(batch) * units, batch.positions[:, 3:].float()], dim=1)
    slowest = (_SLOWEST_POSITION, _SLOWEST_POSITION, _SLOWEST_TIMESTEP)
    angles = torch.cat(
        [
            places[:, axis, None] * _frequencies(pairs, base, places.dtype, places.device)
            for axis, (pairs, base) in enumerate(zip(_ROTARY_PAIRS, slowest, strict=True))
        ],
        dim=1,
    )
    return angles.cos(), angles.sin()


def apply_rotary(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [N, H, 64], each pair (i, i + 32) turned by the angles of `cos` and `sin` [N, 32].

    Products of a query and a key so turned depend on the difference of their angles only.
    """
    first, second = x_NHK.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_NHK.dtype)


def sincos(positions: Tensor, width: int) -> Tensor:
    """[n, width]: sines, then cosines, of positions [n] at geometrically spaced frequencies.

    Frequencies run from 1 down to 1 / 10000, as in Vaswani et al. (2017), section 3.5.
    """
    angles = positions[:, None] * _frequencies(
        width // 2, _SINCOS_BASE, positions.dtype, positions.device
    )
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def season_encoding(
    timestamps: Tensor, width: int, season: Literal["month", "day_of_year"]
) -> Tensor:
    """float32 [n, width]: sine (first half) and cosine of the time of year of (day, month, year) [n, 3].

    "month": month 0 ... 11 of 12. "day_of_year": day 0 ... 365 of 365.25. Zeros where any of the numbers
    needed is below 0: the date is unknown.
    """
    day, month, year = timestamps.long().unbind(1)
    if season == "month":
        known, turn = month >= 0, month.float() / _MONTHS
    else:
        known, turn = (timestamps >= 0).all(1), day_of_year(day, month, year).float() / _DAYS
    angle = (2 * math.pi * turn)[:, None]
    halves = [wave.expand(-1, width // 2) for wave in (angle.sin(), angle.cos())]
    return torch.where(known[:, None], torch.cat(halves, dim=1), 0)


def day_of_year(day: Tensor, month: Tensor, year: Tensor) -> Tensor:
    """int64 [n]: days since January 1st, 0 ... 365, of days 1 ... 31, months 0 ... 11 and years."""
    before = _days_before_month(day.device)[month.clamp(min=0)]
    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    return before + day - 1 + (leap & (month > 1))


@lru_cache(maxsize=32)
def _position_table(
    grid: BaseGrid, units: float, width: int, kind: torch.dtype, device: torch.device
) -> Tensor:
    """[nodes, Q]: 2-D sine-cosine of `node_centres`."""
    with torch.inference_mode(False):
        centres = node_centres(grid, device) * units
        halves = [sincos(centres[:, axis], width // 8) for axis in (0, 1)]
        return torch.cat(halves, dim=1).to(kind)


@lru_cache(maxsize=32)
def _frequencies(number: int, base: float, kind: torch.dtype, device: torch.device) -> Tensor:
    """[number]: 1, and geometrically down towards 1 / base."""
    with torch.inference_mode(False):
        exponents = torch.arange(number, dtype=torch.float64) / number
        return (base**-exponents).to(device, kind)


def _first_frames(batch: TokenBatch) -> Tensor:
    """int64 [modality]: frames of all modalities before it."""
    before = accumulate((m.num_frames for m in batch.modalities), initial=0)
    # Filled there rather than copied there: a copy would wait for a GPU, in every batch.
    return torch.cat(
        [m.tile.new_full((1,), number) for m, number in zip(batch.modalities, before, strict=False)]
    )


@lru_cache(maxsize=8)
def _days_before_month(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_DAYS_BEFORE_MONTH, device=device)


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=_INIT_STD))
