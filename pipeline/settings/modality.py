"""What a modality is and where its scenes are: the configuration of one modality."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.rules import PartitionConfig
from pipeline.scorers.config import Frozen, Identifier, Scoring

ValueRange = tuple[float, float] | tuple[tuple[float, float], ...]


class MaskConfig(Frozen):
    """A quality band or file that says which pixels are clouds and which are not to be used."""

    band: str | None = Field(
        None, description="Band of the scene's own files that holds the mask; it is not stored."
    )
    source: str | None = Field(
        None,
        description="Folder, file or glob of mask rasters below the archive; one per scene, named like it.",
    )
    kind: Literal["classes", "bits", "probability"] = Field(
        "classes", description="What its numbers are: class codes, bit flags, or a probability."
    )
    cloud: tuple[int, ...] = Field(
        (), description="Class codes, or bit positions, that mean cloud."
    )
    invalid: tuple[int, ...] = Field(
        (), description="Class codes, or bit positions, of pixels that are not to be used."
    )
    cloud_above: float | None = Field(
        None, description="With kind probability: larger numbers mean cloud."
    )
    remove_clouds: bool = Field(
        True, description="Whether cloud pixels become invalid, or are only counted."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.band is None) == (self.source is None):
            raise ValueError("a mask needs either band or source; give one of them")
        if self.kind == "probability":
            if self.cloud or self.invalid:
                raise ValueError(
                    "cloud and invalid have no effect with kind probability; give cloud_above"
                )
            if self.cloud_above is None:
                raise ValueError(
                    "kind probability needs cloud_above, the probability from which a pixel is cloud"
                )
        elif self.cloud_above is not None:
            raise ValueError(f"cloud_above has no effect with kind {self.kind}; give cloud")
        elif not (self.cloud or self.invalid):
            raise ValueError(
                "a mask without cloud and invalid has no effect; give the codes that count"
            )
        if self.kind == "bits" and any(not 0 <= bit < 64 for bit in (*self.cloud, *self.invalid)):
            raise ValueError("bit positions lie in 0 ... 63")
        return self


class DatesConfig(Frozen):
    """Where the dates of scenes stand, if not in their names or catalogue."""

    tag: str | None = Field(None, description="Metadata tag of the file that holds the date.")
    csv: str | None = Field(
        None, description="CSV file below the archive with columns scene and datetime."
    )
    format: str | None = Field(
        None, description="strptime format of the dates; ISO 8601 or YYYYMMDD when not given."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tag is not None and self.csv is not None:
            raise ValueError("dates.csv has no effect beside dates.tag; give one of them")
        if self.tag is None and self.csv is None and self.format is None:
            raise ValueError("dates without tag, csv and format has no effect; give one of them")
        return self


class BaselineConfig(Frozen):
    """Processing baselines that add an offset to the numbers, as Sentinel-2's does since 04.00."""

    since: str = Field(description="First processing baseline with the offset, such as 04.00.")
    offset: float = Field(description="Physical offset of the numbers since then, such as -0.1.")
    unknown: Literal["before", "since", "refuse"] = Field(
        "before",
        description="What a scene is taken for whose metadata does not state its baseline.",
    )
    low_percentile: float = Field(
        1.0,
        ge=0,
        le=50,
        description="Percentile of a scene's valid pixels that is compared with the offset.",
    )
    on_disagreement: Literal["report", "refuse"] = Field(
        "report",
        description="What becomes of a scene whose pixels contradict its baseline.",
    )


class ModalityConfig(Frozen):
    """What the scenes of a modality are, and where they are."""

    name: Identifier = Field("image", description="Name of the modality; its group in the store.")
    kind: Literal["image", "label"] = Field(
        "image",
        description="Pixels to learn from, or a raster of class labels, stored without tokens.",
    )
    adaptive: bool = Field(
        True,
        description="Scored and cut into patches of several sizes; otherwise patches of one size.",
    )
    source: str | None = Field(
        None,
        description="Folder, glob, file or catalogue below the archive; all of it when not given.",
    )
    pattern: str | None = Field(
        None,
        description="How file names below the source are built, with {tile}, {date}, {band}, {baseline}, "
        "{label}, {split} and *, for example {tile}_{date}_{band}_10m.tif.",
    )
    assets: dict[str, str] | None = Field(
        None,
        description="By band: the {band} in file names, the catalogue's asset key, or the array variable.",
    )
    dates: DatesConfig | None = Field(None, description="Where dates stand, if not in names.")
    static: bool = Field(
        False,
        description="One scene per grid without a date that belongs to all timesteps, such as a DEM.",
    )
    bands: tuple[Identifier, ...] | None = Field(
        None, description="Band names in file order; band_1, band_2 ... when not given."
    )
    band_sets: dict[str, tuple[Identifier, ...]] | None = Field(
        None,
        description="Bands by the name of their native resolution, such as 10m; one set when not given.",
    )
    value_range: ValueRange | None = Field(
        None,
        description="(low, high) in the archive's own numbers, or one pair per band; estimated "
        "from a sample of the pixels when not given.",
    )
    nodata: float | None = Field(
        None, description="Overrides the nodata tag of the files; the tag counts when not given."
    )
    scale: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Physical units per number, where the files and catalogue do not say.",
    )
    offset: float | None = Field(
        None,
        description="Physical value of the number 0, where the files and catalogue do not say.",
    )
    baseline: BaselineConfig | None = Field(
        None, description="Processing baselines that changed the offset; none when not given."
    )
    ground_sample_distance_m: float | None = Field(
        None, gt=0, description="Pixel size in metres; from the scenes' transform when not given."
    )
    wavelengths_nm: tuple[float, ...] | None = Field(
        None, description="Central wavelength of every band, kept in the store for users."
    )
    mask: MaskConfig | None = Field(None, description="A quality mask; none when not given.")
    zero_border: bool = Field(
        False,
        description="Pixels that are zero in all bands and connected to the scene's edge are invalid.",
    )
    ignore_index: int | None = Field(
        None, description="Label rasters: the class that means unlabelled; it stays as it is."
    )
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = Field(
        "bilinear",
        description="Used where grid.warp resamples; labels and masks are always nearest.",
    )
    scoring: Scoring | None = Field(None, description="The modality's own scorer.")
    partition: PartitionConfig | None = Field(None, description="The modality's own partition.")

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("kind") == "label":
            given = {"adaptive": False, "static": True, "resampling": "nearest", **given}
        if given.get("adaptive") is False and isinstance(given.get("partition"), dict):
            given = {**given, "partition": {"num_scales": 1, **given["partition"]}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bands == ():
            raise ValueError("bands is empty; name the bands, or leave the key out")
        if self.bands is not None and len(set(self.bands)) != len(self.bands):
            raise ValueError("a band name occurs twice; give every band its own name")
        for low, high in self.value_ranges() or ():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"value_range ({low}, {high}) is empty; give low < high")
        if self.scale == 0:
            raise ValueError("scale is 0, which makes all numbers equal; give another")
        if self.kind == "label":
            self._check_label()
        elif self.ignore_index is not None:
            raise ValueError("ignore_index has no effect with kind image")
        if not self.adaptive and self.scoring is not None:
            raise ValueError("scoring has no effect with adaptive false")
        rule = None if self.adaptive else self.partition
        if rule is not None and (rule.num_scales != 1 or rule.ways()):
            raise ValueError("with adaptive false, a partition has a base_patch_size and no more")
        self._check_band_sets()
        if self.wavelengths_nm is not None and len(self.wavelengths_nm) != len(self.bands or ()):
            raise ValueError(
                f"wavelengths_nm has {len(self.wavelengths_nm)} numbers for {len(self.bands or ())} bands"
            )
        return self

    def _check_label(self) -> None:
        for name in ("adaptive", "zero_border"):
            if getattr(self, name):
                raise ValueError(f"{name} has no effect with kind label")
        for name in ("scoring", "partition", "value_range", "mask", "baseline"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with kind label")
        if self.resampling != "nearest":
            raise ValueError(
                f"resampling {self.resampling} would mix labels; labels are always nearest"
            )

    def _check_band_sets(self) -> None:
        if self.band_sets is None:
            return
        listed = [band for bands in self.band_sets.values() for band in bands]
        if self.bands is None or sorted(listed) != sorted(self.bands):
            raise ValueError(
                f"band_sets hold {listed}; they must hold each of the bands {list(self.bands or ())} once"
            )
        for name, bands in self.band_sets.items():
            if not bands:
                raise ValueError(f"band_sets: {name} holds no band; leave it out")
            if not name.isalnum() or len(name) > 16:
                raise ValueError(
                    f"band_sets: {name!r} is no name; expected letters and digits, such as 10m"
                )

    def value_ranges(self) -> tuple[tuple[float, float], ...] | None:
        """The configured ranges as a tuple of pairs (one, or one per band)."""
        match self.value_range:
            case None:
                return None
            case (float() as low, float() as high):
                return ((low, high),)
            case pairs:
                return tuple(pairs)
