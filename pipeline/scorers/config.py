"""What each scorer can be told; free of kernels, so that reading a store stays light.

Every scorer has a model of its own: a setting that would have no effect is unknown to it, and refused.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]
# ITU-R BT.601 luma, the weights that public implementations of entropy patching use.
LUMA = (0.2989, 0.5870, 0.1140)
# Joint histograms beyond this have more bins than a large patch has pixels.
_MAX_JOINT_BINS = 4096
_MAX_JOINT_BANDS = 3


class Frozen(BaseModel):
    """Base of every configuration model: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class ScorerConfig(Frozen):
    """What all scorers have in common."""

    scorer: str
    min_valid_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Base cells with a smaller share of valid pixels count as missing; one without "
        "any always does.",
    )

    def attainable(self, patch_size_px: int, num_bands: int) -> float | None:
        """The largest score a patch of that size can have, or None where there is no bound."""
        del patch_size_px, num_bands
        return None

    def check_bands(self, num_bands: int) -> None:
        """Raise ValueError unless that many scored bands make sense."""
        del num_bands


class BandScorerConfig(ScorerConfig):
    """A scorer that looks at bands of the scene."""

    bands: tuple[Identifier, ...] | None = Field(
        None, min_length=1, description="Bands that are scored; every band when not given."
    )


class CombiningConfig(BandScorerConfig):
    """A scorer that looks at one plane at a time."""

    combine: Literal["mean", "max", "gray"] = Field(
        "mean",
        description="Several bands: the mean or the largest of their scores, or the score of one gray "
        "plane.",
    )
    gray_weights: tuple[float, ...] | None = Field(
        None,
        description="Weights of the bands in the gray plane, in the order of `bands`; luma of red, "
        "green, blue when not given.",
    )

    @model_validator(mode="after")
    def _weights_have_an_effect(self) -> Self:
        if self.gray_weights is not None and self.combine != "gray":
            raise ValueError(f"gray_weights has no effect with combine {self.combine!r}")
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the gray plane."""
        return LUMA if self.gray_weights is None else self.gray_weights

    def check_bands(self, num_bands: int) -> None:
        if self.combine == "gray" and num_bands != len(self.weights):
            raise ValueError(
                f"combine gray has {len(self.weights)} weights and {num_bands} bands are scored; give "
                "scoring.bands and scoring.gray_weights of the same length"
            )


class EntropyConfig(CombiningConfig):
    """Shannon entropy of the histogram of the pixels, in bits."""

    scorer: Literal["entropy"] = "entropy"
    num_bins: int = Field(32, ge=2, le=4096, description="Histogram bins over the value range.")
    combine: Literal["mean", "max", "gray", "joint"] = Field(  # type: ignore[assignment]
        "mean",
        description="Several bands: the mean or the largest of their entropies, the entropy of one "
        "gray plane, or of the joint histogram of up to three bands.",
    )
    normalize: bool = Field(
        False, description="Divide by the attainable maximum, so that scores lie in 0..1."
    )

    def check_bands(self, num_bands: int) -> None:
        super().check_bands(num_bands)
        if self.combine == "joint" and (
            num_bands > _MAX_JOINT_BANDS or self.num_bins**num_bands > _MAX_JOINT_BINS
        ):
            raise ValueError(
                f"a joint histogram of {num_bands} bands with {self.num_bins} bins each is too fine; "
                f"at most {_MAX_JOINT_BANDS} bands and {_MAX_JOINT_BINS} bins in all, for example 3 "
                "bands with num_bins 16"
            )

    def attainable(self, patch_size_px: int, num_bands: int) -> float | None:
        if self.normalize:
            return 1.0
        bins = self.num_bins**num_bands if self.combine == "joint" else self.num_bins
        return math.log2(min(bins, patch_size_px**2))


class LaplacianConfig(CombiningConfig):
    """Absolute Laplacian response, in value ranges per px squared."""

    scorer: Literal["laplacian"] = "laplacian"
    neighbours: Literal[4, 8] = Field(8, description="Neighbours in the stencil.")
    statistic: Literal["mean", "max", "std"] = Field(
        "mean", description="Of the absolute responses inside the cell."
    )


class VarianceConfig(CombiningConfig):
    """Variance of the pixels, in value ranges squared, or its square root."""

    scorer: Literal["variance"] = "variance"
    statistic: Literal["variance", "std"] = Field(
        "variance", description="The variance, or the standard deviation."
    )


class GradientConfig(CombiningConfig):
    """Sobel gradient magnitude, in value ranges per px."""

    scorer: Literal["gradient"] = "gradient"
    statistic: Literal["mean", "max", "std"] = Field(
        "mean", description="Of the magnitudes inside the cell."
    )


class CannyConfig(CombiningConfig):
    """Share of the cell's valid pixels that the Canny detector marks as edges."""

    scorer: Literal["canny"] = "canny"
    sigma_px: float = Field(1.0, ge=0.2, description="Width of the smoothing before the gradient.")
    low: float = Field(
        0.02, gt=0, description="Gradient, in value ranges per px, below which there is no edge."
    )
    high: float = Field(0.06, gt=0, description="Gradient from which on an edge begins.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high, {self.high}; give low <= high")
        return self

    def attainable(self, patch_size_px: int, num_bands: int) -> float | None:
        return 1.0


class SaliencyConfig(CannyConfig):
    """Edge saliency: the density of Canny edges, smoothed over the neighbourhood."""

    scorer: Literal["saliency"] = "saliency"  # type: ignore[assignment]
    blur_px: float = Field(2.6, gt=0, description="Width of the Gaussian that spreads the edges.")


class UpsampleErrorConfig(CombiningConfig):
    """Mean squared difference, in value ranges squared, after shrinking a patch to the base size."""

    scorer: Literal["upsample_error"] = "upsample_error"
    interpolation: Literal["bilinear", "nearest"] = Field(
        "bilinear", description="How the shrunken patch is enlarged again."
    )


class SpectralAngleConfig(BandScorerConfig):
    """Mean angle in radians between the pixels' spectra and the cell's mean spectrum."""

    scorer: Literal["spectral_angle"] = "spectral_angle"

    def check_bands(self, num_bands: int) -> None:
        if num_bands < 2:
            raise ValueError("spectral_angle compares spectra; give at least two scoring.bands")

    def attainable(self, patch_size_px: int, num_bands: int) -> float | None:
        return math.pi


class ExternalConfig(ScorerConfig):
    """Scores the user supplies as rasters, for example of a learned model."""

    scorer: Literal["external"] = "external"
    folder: str | None = Field(
        None,
        description="Folder of one-band GeoTIFFs, one per scene, of its name and size; each pixel a "
        "score, NaN where it is unknown.",
    )
    statistic: Literal["mean", "max"] = Field(
        "mean", description="Of the pixels' scores in a cell."
    )

    def check_bands(self, num_bands: int) -> None:
        if num_bands != 1:
            raise ValueError(f"external scores are one plane, not {num_bands}")


SCORER_NAMES = (
    "entropy", "laplacian", "variance", "gradient", "canny", "saliency", "upsample_error",
    "spectral_angle", "external",
)  # fmt: skip


def _scorer_name(value: Any) -> str:
    """The tag of a scoring section; entropy unless another scorer is named."""
    if isinstance(value, dict):
        return str(value.get("scorer", "entropy"))
    return str(getattr(value, "scorer", "entropy"))


SCORER_CONFIGS: tuple[type[ScorerConfig], ...] = (
    EntropyConfig, LaplacianConfig, VarianceConfig, GradientConfig, CannyConfig, SaliencyConfig,
    UpsampleErrorConfig, SpectralAngleConfig, ExternalConfig,
)  # fmt: skip

Scoring = Annotated[
    Annotated[EntropyConfig, Tag("entropy")]
    | Annotated[LaplacianConfig, Tag("laplacian")]
    | Annotated[VarianceConfig, Tag("variance")]
    | Annotated[GradientConfig, Tag("gradient")]
    | Annotated[CannyConfig, Tag("canny")]
    | Annotated[SaliencyConfig, Tag("saliency")]
    | Annotated[UpsampleErrorConfig, Tag("upsample_error")]
    | Annotated[SpectralAngleConfig, Tag("spectral_angle")]
    | Annotated[ExternalConfig, Tag("external")],
    Discriminator(_scorer_name),
]
