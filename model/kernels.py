"""Patch kernels of any size from one set of weights: the pseudo-inverse resize.

A kernel learned at one patch size is brought to another so that it answers a resized patch as the old one
answered the patch (Beyer et al. 2023, "FlexiViT", section 3.4). Shape suffixes are those of `model.batch`;
K = side of the stored kernel in px, S = the wanted side.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def resize_kernel(weight_DCKK: Tensor, size: int) -> Tensor:
    """The kernel for patches of `size` px a side, [D, C, S, S]; the weight itself if it has that size.

    With B the bilinear resize of a patch x from K to S px, the new kernel w' minimises the mean square of
    <B x, w'> - <x, w> over patches of independent pixels. For S >= K it is 0: the answers are equal.
    """
    if size == weight_DCKK.shape[-1]:
        return weight_DCKK
    side, kind, device = weight_DCKK.shape[-1], weight_DCKK.dtype, weight_DCKK.device
    # In 16 bits the new kernel would be a different one.
    with torch.autocast(device.type, enabled=False):
        flat = weight_DCKK.flatten(2) @ _answering(side, size, kind, device)
    return flat.unflatten(2, (size, size))


def bilinear_resize(before: int, after: int) -> np.ndarray:
    """float64 [after, before]: the bilinear resize of a row of pixels, each pixel's centre at its middle.

    A smaller row averages with a triangle as wide as two of its pixels, so that no pixel is passed over.
    """
    ratio = before / after
    centres = (np.arange(after) + 0.5) * ratio - 0.5
    distance = np.abs(centres[:, None] - np.arange(before)) / max(ratio, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    # Beyond the outermost centre all of the weight is on the outermost pixel.
    return weights / weights.sum(axis=1, keepdims=True)


@lru_cache(maxsize=128)
def _answering(side: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[K K, S S]: the pseudo-inverse of the resize of a patch, transposed as a kernel's px are.

    A patch is resized along its rows and then its columns, and so is the pseudo-inverse a product of both;
    one matrix, because products with many small ones are slow.
    """
    of_row = np.linalg.pinv(bilinear_resize(side, size))
    inverse = np.kron(of_row, of_row)
    # A table made in inference mode could not be used for training later.
    with torch.inference_mode(False):
        return torch.tensor(inverse, dtype=dtype, device=device)
