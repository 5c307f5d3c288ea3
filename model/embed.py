"""From pixels to base tokens: normalisation, patch embedding, composite encodings.

Shape suffixes are those of `model.batch`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from model.config import REFERENCE_DISTANCE_M

_SINCOS_BASE = 10_000.0


class PixelNormalization(nn.Module):
    """The archive's numbers to [-1, 1] over each band's value range; invalid pixels become 0."""

    low_C11: Tensor
    span_C11: Tensor

    def __init__(self, value_range: tuple[tuple[float, float], ...]) -> None:
        super().__init__()
        ranges = torch.tensor(value_range, dtype=torch.float32)
        self.register_buffer("low_C11", ranges[:, 0, None, None], persistent=False)
        self.register_buffer(
            "span_C11", (ranges[:, 1] - ranges[:, 0])[:, None, None], persistent=False
        )

    def forward(self, values_MCPP: Tensor, valid_MCPP: Tensor) -> Tensor:
        unit = (values_MCPP.to(self.low_C11.dtype) - self.low_C11) / self.span_C11
        # where(), not a product: an invalid NaN times 0 would stay NaN.
        return torch.where(valid_MCPP, 2 * unit - 1, 0)


class PatchEmbedding(nn.Module):
    """Every base cell to one token by a linear map of its normalised pixels and their validity."""

    def __init__(self, num_bands: int, kernel_px: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(num_bands + 1, width, kernel_px)

    def forward(self, pixels_MCPP: Tensor, valid_MPP: Tensor) -> Tensor:
        channels = torch.cat([pixels_MCPP, valid_MPP[:, None].to(pixels_MCPP.dtype)], dim=1)
        weight, size = self.projection.weight, valid_MPP.shape[1]
        if size != weight.shape[-1]:
            weight = interpolate(weight, (size, size), mode="bilinear", align_corners=False)
        return linear(channels.flatten(1), weight.flatten(1), self.projection.bias)


class CompositeEncoding(nn.Module):
    """What is added to a token besides its pixels, in four quarters of the width.

    Quarters: modality (learned), index of the timestep (sine-cosine), month, and position (2-D
    sine-cosine of the distance from the tile's corner in units of 10 m). The month's quarter stays
    zero: stores hold no dates yet.
    """

    def __init__(self, width: int, metres_per_cell: float) -> None:
        super().__init__()
        if width % 16:
            raise ValueError(f"width is {width}; the encoding needs a multiple of 16")
        self.quarter = width // 4
        self.units_per_cell = metres_per_cell / REFERENCE_DISTANCE_M
        self.modality = nn.Parameter(torch.empty(self.quarter).normal_(std=0.02))

    def forward(self, y: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """[n, D] for positions `y`, `x` in base cells (fractions allowed) and timesteps, each [n]."""
        half = self.quarter // 2
        return torch.cat(
            [
                self.modality.expand(len(y), -1),
                sincos(timestep.float(), self.quarter),
                self.modality.new_zeros(len(y), self.quarter),
                sincos(y.float() * self.units_per_cell, half),
                sincos(x.float() * self.units_per_cell, half),
            ],
            dim=1,
        )


def sincos(positions: Tensor, width: int) -> Tensor:
    """[n, width]: sines, then cosines, of positions [n] at geometrically spaced frequencies.

    Frequencies run from 1 down to 1 / 10000, as in Vaswani et al. (2017), section 3.5.
    """
    exponents = torch.arange(width // 2, device=positions.device, dtype=torch.float32) * 2 / width
    angles = positions[:, None] * _SINCOS_BASE**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)
