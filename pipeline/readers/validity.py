"""Which pixels are valid: nodata, NaN and quality masks.

Pure NumPy. What is unknown never becomes nodata: a mask says something only about the pixels it covers.
"""

import numpy as np

from pipeline.scenes import Plane
from pipeline.settings.modality import MaskConfig

# Tags of this size stand for the end of a type's range, and are often written with six digits only.
_HUGE_TAG = 1e37
_HUGE_TAG_TOLERANCE = 1e-5


def valid_pixels(
    pixels: np.ndarray, planes: tuple[Plane, ...], readable: np.ndarray | None
) -> np.ndarray:
    """bool [y, x]: pixels [plane, y, x] that hold in no plane its nodata, NaN or an infinity.

    `readable`, bool [y, x] or None for everywhere, is what the reader lets through.
    """
    valid = np.ones(pixels.shape[1:], np.bool_) if readable is None else readable.copy()
    for plane, numbers in zip(planes, pixels, strict=True):
        valid &= holds_data(numbers, plane.nodata)
    return valid


def holds_data(numbers: np.ndarray, nodata: float | None) -> np.ndarray:
    """bool, as `numbers` in shape: where they are finite and not the nodata tag.

    The tag is compared in the numbers' own type. One that the type cannot hold (-9999 or NaN in uint16)
    matches nothing; one rounded in print (3.4028235e+38, 0.1) matches the float it was printed from.
    """
    if numbers.dtype.kind != "f":
        value = _as_integer(nodata, numbers.dtype)
        return np.ones(numbers.shape, np.bool_) if value is None else np.not_equal(numbers, value)
    data = np.isfinite(numbers)
    if nodata is None or not np.isfinite(nodata):
        return data
    if abs(nodata) > _HUGE_TAG:
        ends = sorted((nodata * (1 - _HUGE_TAG_TOLERANCE), nodata * (1 + _HUGE_TAG_TOLERANCE)))
        limit = float(np.finfo(numbers.dtype).max)
        low, high = np.clip(ends, -limit, limit).astype(numbers.dtype)
        return data & ~((numbers >= low) & (numbers <= high))
    return data & (numbers != numbers.dtype.type(nodata))


def mask_flags(
    values: np.ndarray,
    mask: MaskConfig,
    nodata: float | None = None,
    covered: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(cloud, invalid), each bool [y, x], of a quality mask's numbers [y, x].

    `covered`, bool [y, x] or None for everywhere, is where the mask has data at all: elsewhere, and where
    it holds NaN, a pixel is neither. `nodata`, the mask's tag, counts for probabilities only: codes and
    bits named in the configuration count even where the tag calls them nodata, as Landsat's fill bit.
    Bit flags may come as floats; a number that is not whole, or not of an unsigned type, has no flags.
    """
    if mask.kind == "probability":
        known = holds_data(values, nodata)
        cloud = known & (values > mask.cloud_above)
        invalid = np.zeros(values.shape, np.bool_)
    elif mask.kind == "classes":
        cloud, invalid = (np.isin(values, codes) for codes in (mask.cloud, mask.invalid))
    else:
        flags = _bit_flags(values)
        cloud, invalid = ((flags & _bits(bits)) != 0 for bits in (mask.cloud, mask.invalid))
    if covered is not None:
        cloud, invalid = cloud & covered, invalid & covered
    return cloud, invalid


def onto_finer(mask: np.ndarray, factor_y: int, factor_x: int) -> np.ndarray:
    """A mask [y, x] on pixels smaller by whole factors: each pixel is repeated."""
    return np.repeat(np.repeat(mask, factor_y, axis=0), factor_x, axis=1)


def onto_coarser(mask: np.ndarray, factor_y: int, factor_x: int) -> np.ndarray:
    """A bool mask [y, x] on pixels larger by whole factors: True where any pixel inside is.

    The last row and column of larger pixels may be filled in part only.
    """
    height, width = mask.shape
    rows, cols = -(-height // factor_y), -(-width // factor_x)
    padded = np.zeros((rows * factor_y, cols * factor_x), np.bool_)
    padded[:height, :width] = mask
    blocks: np.ndarray = padded.reshape(rows, factor_y, cols, factor_x)
    return np.asarray(blocks.any(axis=(1, 3)))


def _as_integer(nodata: float | None, dtype: np.dtype) -> int | None:
    """The tag as a number of an integer type; None where it is none."""
    if nodata is None or not np.isfinite(nodata) or nodata != int(nodata):
        return None
    limits = np.iinfo(dtype)
    # A tag passes through float64, where the largest 64-bit integers round to one above.
    if nodata == float(limits.max):
        return int(limits.max)
    return int(nodata) if limits.min <= int(nodata) <= limits.max else None


def _bit_flags(values: np.ndarray) -> np.ndarray:
    """Numbers as uint64 patterns of their own type's bits; 0 where a float holds no such pattern."""
    if values.dtype.kind != "f":
        return values.view(f"u{values.dtype.itemsize}").astype(np.uint64)
    wide = values.astype(np.float64)
    whole = (wide >= 0) & (wide < 2.0**64) & (wide == np.floor(wide))
    return np.where(whole, wide, 0).astype(np.uint64)


def _bits(positions: tuple[int, ...]) -> np.uint64:
    return np.uint64(sum(1 << position for position in set(positions)))
