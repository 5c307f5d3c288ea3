"""From pixels to base tokens: normalisation and patch embedding.

Shape suffixes are those of `model.batch`.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from model.batch import TokenBatch
from model.kernels import resize_kernel


class PixelNormalization(nn.Module):
    """The archive's numbers to [-1, 1] over each band's value range; invalid pixels become 0."""

    low_C: Tensor
    half_span_C: Tensor

    def __init__(self, value_range: tuple[tuple[float, float], ...]) -> None:
        super().__init__()
        self.value_range = value_range
        self._make_tables(torch.float32, None)

    def _make_tables(self, dtype: torch.dtype, device: torch.device | None) -> None:
        ranges = torch.tensor(self.value_range, dtype=torch.float32, device=device).to(dtype)
        low, high = ranges.unbind(1)
        self.register_buffer("low_C", low, persistent=False)
        self.register_buffer("half_span_C", (high - low) / 2, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of `to`, `half`, `to_empty` and the like.

        Tables are made anew: in 16 bits ranges and pixels would be rounded, to 8 bits at worst, and memory
        that was not filled would hold any number.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wide = torch.promote_types(self.low_C.dtype, torch.float32)
        self._make_tables(wide, self.low_C.device)
        return self

    def forward(self, values_MCPP: Tensor, valid_MCPP: Tensor) -> Tensor:
        """`valid` bool may have one channel for all, [M, 1, P, P]."""
        # In place and row by row of all its numbers: several times as fast as band by band.
        flat = values_MCPP.flatten(1).to(self.low_C.dtype, copy=True)
        low, half_span = (
            of_band[:, None, None].expand(values_MCPP.shape[1:]).flatten()
            for of_band in (self.low_C, self.half_span_C)
        )
        flat.sub_(low).div_(half_span).sub_(1)
        return zero_but(flat.view(values_MCPP.shape), valid_MCPP)


def zero_but(numbers: Tensor, where: Tensor) -> Tensor:
    """Numbers set to 0 in place but where bool `where`, broadcast to them, is True.

    A number that is not finite becomes 0 everywhere.
    """
    # A product is several times as fast as masked_fill, but NaN times 0 would stay NaN.
    return numbers.nan_to_num_(0, 0, 0).mul_(where.to(numbers.dtype))


class PatchEmbedding(nn.Module):
    """Every base cell to one row by a linear map of its normalised pixels and their validity.

    `weight` [D, C + 1, K, K] is the kernel for patches of `kernel_px` (K) a side, its last channel that of
    validity; patches of another size get a resized one (`model.kernels`). `band_absent` [C, D], zero at
    first, is added once for every band that a frame lacks.
    """

    def __init__(self, num_bands: int, kernel_px: int, width: int) -> None:
        super().__init__()
        # As torch begins a linear map of as many numbers.
        bound = ((num_bands + 1) * kernel_px**2) ** -0.5
        shape = (width, num_bands + 1, kernel_px, kernel_px)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        self.band_absent = nn.Parameter(torch.zeros(num_bands, width))

    def forward(
        self,
        pixels_MCPP: Tensor,
        valid_MPP: Tensor,
        absent_MC: Tensor | None = None,
        onto_MD: Tensor | None = None,
        vector_D: Tensor | None = None,
    ) -> Tensor:
        """[M, D], a row a function of its own patch alone.

        `pixels` are normalised, 0 where not valid or absent; `absent` bool says which bands a row's frame
        lacks. Added are the rows `onto`, whose memory is used for the result, and `vector` to every row.
        """
        constant_D = self.bias if vector_D is None else self.bias + vector_D
        kernel = resize_kernel(self.weight, valid_MPP.shape[-1]).flatten(1)
        # What is added is columns of the product too: as bias or look-up, it costs further passes.
        weight_DX = torch.cat([kernel, self.band_absent.T, constant_D[:, None]], dim=1)
        columns_MX = self._columns(pixels_MCPP, valid_MPP, absent_MC)
        if onto_MD is None:
            return columns_MX @ weight_DX.T
        if torch.is_autocast_enabled(onto_MD.device.type):
            # Which leaves operations in place as they are, in 32 bits.
            return torch.addmm(onto_MD, columns_MX, weight_DX.T)
        return onto_MD.addmm_(columns_MX, weight_DX.T)

    def _columns(self, pixels_MCPP: Tensor, valid_MPP: Tensor, absent_MC: Tensor | None) -> Tensor:
        """[M, C P P + P P + C + 1]: pixels, validity, absent bands, and a one."""
        num_rows, num_bands = pixels_MCPP.shape[:2]
        if absent_MC is None:
            absent_MC = valid_MPP.new_zeros(num_rows, num_bands)
        kind = self.weight.dtype
        parts = [
            pixels_MCPP.flatten(1).to(kind),
            valid_MPP.flatten(1).to(kind),
            absent_MC.to(kind),
            pixels_MCPP.new_ones(num_rows, 1, dtype=kind),
        ]
        return torch.cat(parts, dim=1)


def normalised_cells(
    batch: TokenBatch, modality: int, band_set: int, normalization: PixelNormalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [M, C, P, P], 0 where not valid or absent; validity [M, P, P]; bands absent [M, C].

    In the order of `cell_index`. Pixels that the dataset has normalised are left so.
    """
    frame = batch.cell_index(modality) // batch.modalities[modality].grid.num_cells
    cells = batch.cells(modality, band_set)
    present_MC = _present(batch, modality, band_set, frame)
    return _normalised(*cells, present_MC, None if batch.normalized else normalization)


def normalised_nodes(
    batch: TokenBatch, modality: int, band_set: int, scale: int, normalization: PixelNormalization
) -> tuple[Tensor, Tensor, Tensor]:
    """As `normalised_cells` for the tokens of a scale, each shrunk to the size of a base cell.

    In the order of `tokens_by_scale`.
    """
    frame = batch.frame.index_select(0, batch.tokens_by_scale(modality, band_set, scale))
    nodes = batch.cells(modality, band_set, scale)
    present_MC = _present(batch, modality, band_set, frame)
    return _normalised(*nodes, present_MC, None if batch.normalized else normalization)


def _present(batch: TokenBatch, modality: int, band_set: int, frame: Tensor) -> Tensor:
    """bool [n, C]: which bands these frames have."""
    return batch.modalities[modality].band_sets[band_set].band_present.index_select(0, frame)


def _normalised(
    pixels_MCPP: Tensor,
    valid_MPP: Tensor,
    present_MC: Tensor,
    normalization: PixelNormalization | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `normalised_cells`; without `normalization` pixels are left as they are where they are valid."""
    if normalization is None:
        pixels_MCPP = zero_but(pixels_MCPP.to(torch.float32, copy=True), valid_MPP[:, None])
    else:
        pixels_MCPP = normalization(pixels_MCPP, valid_MPP[:, None])
    return zero_but(pixels_MCPP, present_MC[:, :, None, None]), valid_MPP, ~present_MC
