"""From the bands of an image to planes in units of the value range, and back to one score map."""

import numpy as np

from pipeline.scorers.config import CombiningConfig

ValueRanges = tuple[tuple[float, float], ...]
# Beyond so many value ranges a number is a defect; squares of what is left fit into float32.
_FARTHEST = 1e18


def planes_in_ranges(
    image: np.ndarray, valid: np.ndarray, value_ranges: ValueRanges, config: CombiningConfig
) -> np.ndarray:
    """float64 [plane, y, x]: 0 at the low, 1 at the high end of the value range; 0 where invalid.

    One plane per band of `image` [band, y, x], or one gray plane, the weighted sum of the archive's
    own numbers. Not clipped to the range, only to 1e18 times its width.
    """
    numbers = np.where(valid, image, 0).astype(np.float64)
    if config.combine == "gray":
        gray = sum(w * band for w, band in zip(config.weights, numbers, strict=True))
        numbers = np.asarray(gray)[None]
        value_ranges = value_ranges[:1]
    low, high = np.array(value_ranges).T[:, :, None, None]
    return np.where(valid, in_widths(numbers - low, high - low), 0.0)


def in_widths(numbers: np.ndarray, width: np.ndarray) -> np.ndarray:
    """`numbers / width`, kept so small that squares stay finite."""
    with np.errstate(over="ignore"):
        scaled: np.ndarray = numbers / width
    return np.clip(scaled, -_FARTHEST, _FARTHEST, out=scaled)


def combined(levels: list[np.ndarray], config: CombiningConfig) -> list[np.ndarray]:
    """Float32 [cell_y, cell_x] per level from [plane, cell_y, cell_x]: mean or largest of the planes."""
    merge = np.max if config.combine == "max" else np.mean
    return [merge(level, axis=0).astype(np.float32) for level in levels]
