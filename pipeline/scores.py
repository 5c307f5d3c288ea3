"""The way in to scoring: scorers by name, and score maps of a single image."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid, covering_grid, pad_to_grid
from pipeline.scorers.config import ScorerConfig, Scoring
from pipeline.scorers.entropy import EntropyScorer
from pipeline.scorers.filters import (
    CannyScorer,
    GradientScorer,
    LaplacianScorer,
    SaliencyScorer,
    VarianceScorer,
)
from pipeline.scorers.patches import ExternalScorer, SpectralAngleScorer, UpsampleErrorScorer

ValueRanges = tuple[tuple[float, float], ...]


class Scorer(Protocol):
    """Turns a frame into one score map per level."""

    def maps(self, image: np.ndarray, valid: np.ndarray, grid: BaseGrid) -> list[np.ndarray]:
        """Float32 [cell_y, cell_x] per level, fine to coarse; NaN without a valid pixel.

        `image` [band, y, x] holds the scored bands in the archive's own numbers, `valid` is bool
        [y, x]; both are contiguous and have exactly the grid's size.
        """
        ...


def make_scorer(config: ScorerConfig, value_ranges: ValueRanges) -> Scorer:
    """The scorer of a configuration; `value_ranges` are (low, high) of the scored bands.

    Raises ConfigError for ranges or a number of bands the scorer cannot use.
    """
    for band, (low, high) in enumerate(value_ranges):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(
                f"value range of band {band} is ({low}, {high}); give two finite numbers, low < high"
            )
    try:
        config.check_bands(len(value_ranges))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if getattr(config, "combine", None) == "gray" and len(set(value_ranges)) != 1:
        raise ConfigError(
            f"combine gray needs one value range for all bands, not {list(value_ranges)}; give "
            "modality.value_range as one pair"
        )
    return SCORERS[config.scorer](config, value_ranges)


def score_maps(
    image: np.ndarray,
    *,
    base_patch_size: int,
    num_scales: int,
    bands: Sequence[int] | None = None,
    num_bins: int | None = None,
    value_range: tuple[float, float] | ValueRanges | None = None,
    valid: np.ndarray | None = None,
    scorer: str | ScorerConfig = "entropy",
) -> list[np.ndarray]:
    """Score maps of an image [band, y, x] of any size, float32 [cell_y, cell_x], fine to coarse.

    The image is padded with invalid pixels to whole roots. Pixels are invalid where `valid`
    (bool [y, x]) is False or a scored band is NaN or infinite. `bands` are indices into the first
    axis (all by default). `value_range` is one (low, high) or one per scored band; (0, 1) unless
    given, but an integer image must name it. `scorer` is a name or a configuration of
    `pipeline.scorers.config`; `num_bins` is for entropy by name. Raises ConfigError for settings that
    cannot be used.
    """
    config = scorer_config(scorer, num_bins)
    image, valid, grid = _as_frame(image, valid, bands, base_patch_size, num_scales)
    # Scores that are given have no range to be scaled by.
    external = config.scorer == "external"
    ranges = ((0.0, 1.0),) * len(image) if external else _ranges_per_band(value_range, image)
    made = make_scorer(config, ranges)
    return made.maps(image, countable(valid, grid, config.min_valid_fraction), grid)


def scorer_config(scorer: str | ScorerConfig, num_bins: int | None = None) -> ScorerConfig:
    """The configuration of a scorer given by name, with its default settings."""
    if isinstance(scorer, ScorerConfig):
        if num_bins is not None:
            raise ConfigError("num_bins has no effect beside a scorer configuration; set it there")
        return scorer
    if scorer not in SCORERS:
        raise ConfigError(f"scorer is {scorer!r}; expected one of {sorted(SCORERS)}")
    content: dict[str, Any] = {"scorer": scorer}
    if num_bins is not None:
        content["num_bins"] = num_bins
    try:
        config: ScorerConfig = TypeAdapter(Scoring).validate_python(content)
    except ValidationError as error:
        item = error.errors()[0]
        raise ConfigError(
            f"{item['loc'][-1]} is {item['input']!r} for {scorer}: {item['msg']}"
        ) from None
    return config


def countable(valid: np.ndarray, grid: BaseGrid, min_valid_fraction: float) -> np.ndarray:
    """`valid` bool [y, x] without the pixels of base cells that have too small a share of valid ones."""
    if min_valid_fraction == 0:
        return valid
    p = grid.base_patch_size
    cells = valid.reshape(grid.rows, p, grid.cols, p)
    enough = cells.sum(axis=(1, 3)) >= min_valid_fraction * p * p
    return (cells & enough[:, None, :, None]).reshape(valid.shape)


def _as_frame(
    image: np.ndarray,
    valid: np.ndarray | None,
    bands: Sequence[int] | None,
    base_patch_size: int,
    num_scales: int,
) -> tuple[np.ndarray, np.ndarray, BaseGrid]:
    """The scored bands [band, y, x], their validity bool [y, x], both padded, and the grid."""
    if image.ndim != 3 or image.dtype.kind not in "iuf":
        raise ConfigError(
            f"image has shape {image.shape} and type {image.dtype}; expected real numbers [band, y, x]"
        )
    if valid is not None and (valid.shape != image.shape[1:] or valid.dtype != np.bool_):
        raise ConfigError(
            f"valid has shape {valid.shape} and type {valid.dtype}; expected bool {image.shape[1:]}"
        )
    image = np.ascontiguousarray(image if bands is None else image[list(bands)])
    inside = np.ones(image.shape[1:], np.bool_) if valid is None else valid
    if image.dtype.kind == "f":
        inside = inside & np.isfinite(image).all(axis=0)
    height, width = image.shape[1:]
    grid = covering_grid(height, width, base_patch_size, num_scales)
    return pad_to_grid(image, grid), np.ascontiguousarray(pad_to_grid(inside, grid)), grid


def _ranges_per_band(value_range: object, image: np.ndarray) -> ValueRanges:
    if value_range is None:
        if image.dtype.kind in "iu":
            raise ConfigError(
                f"the image holds {image.dtype} numbers and no value_range was given; name the range "
                "of its values, for example value_range=(0, 10000)"
            )
        value_range = (0.0, 1.0)
    ranges = np.asarray(value_range, np.float64)
    if ranges.shape not in {(2,), (len(image), 2)}:
        raise ConfigError(
            f"value_range is {value_range}; expected (low, high), or one per scored band ({len(image)})"
        )
    return tuple(
        (float(low), float(high)) for low, high in np.broadcast_to(ranges, (len(image), 2))
    )


SCORERS: dict[str, Any] = {
    "entropy": EntropyScorer,
    "laplacian": LaplacianScorer,
    "variance": VarianceScorer,
    "gradient": GradientScorer,
    "canny": CannyScorer,
    "saliency": SaliencyScorer,
    "upsample_error": UpsampleErrorScorer,
    "spectral_angle": SpectralAngleScorer,
    "external": ExternalScorer,
}
