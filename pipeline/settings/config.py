"""Configuration: the frozen models of what a job is told; `pipeline.settings.loading` fills them.

`DataConfig` fixes the bytes of a store; its digest names the result. `RunConfig` says where and how
a job runs; a job that is resumed must come to the same choice of scenes.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.grid import MAX_TILE_PX
from pipeline.rules import PartitionConfig, check_thresholds, check_uniform
from pipeline.scorers.config import (
    EntropyConfig,
    ExternalConfig,
    Frozen,
    Identifier,
    ScorerConfig,
    Scoring,
)
from pipeline.settings.canonical import canonical_json
from pipeline.settings.modality import ModalityConfig
from pipeline.settings.run import RunConfig


class StoreConfig(Frozen):
    """How the result is laid out."""

    tile_size_px: int = Field(
        128,
        ge=1,
        le=MAX_TILE_PX,
        description="Side of a tile in px of the first modality's finest bands.",
    )
    shard_tiles: int = Field(
        512,
        ge=1,
        le=65536,
        description="Most tiles one shard holds; fewer where tiles have many frames, to bound its memory.",
    )
    codec: Literal["lz4", "zstd"] = Field(
        "lz4", description="lz4 for stores one trains from, zstd for stores one keeps."
    )


class GridConfig(Frozen):
    """The grid that scenes lie on, where that is not simply their own."""

    warp: bool = Field(
        False,
        description="Resample scenes of a place onto one grid, the named one or that of the place's first "
        "scene, instead of refusing those on another.",
    )
    crs: str | None = Field(
        None, description="CRS of the named grid; it needs origin, pixel_size, shape."
    )
    origin: tuple[float, float] | None = Field(
        None, description="x, y of the named grid's top left corner, in its CRS."
    )
    pixel_size: float | None = Field(
        None, gt=0, description="Pixel size of the named grid, in its CRS."
    )
    shape: tuple[int, int] | None = Field(None, description="Rows and columns of the named grid.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = {name: getattr(self, name) for name in ("crs", "origin", "pixel_size", "shape")}
        absent = [name for name, value in named.items() if value is None]
        if absent and len(absent) < len(named):
            raise ValueError(
                f"a named grid needs crs, origin, pixel_size and shape; {absent} not given"
            )
        if self.shape is not None and min(self.shape) < 1:
            raise ValueError(f"shape is {list(self.shape)}; expected positive rows and columns")
        return self


class PairingConfig(Frozen):
    """Which scenes of several modalities belong to one timestep."""

    tolerance_days: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="The first modality's dates are the timesteps; each takes the nearest scene of every "
        "other modality within so many days. When not given, every date is a timestep.",
    )


class ValidityConfig(Frozen):
    """Which frames and tiles are worth keeping."""

    min_frame_valid_fraction: float = Field(
        0.0, ge=0, le=1, description="Frames with a smaller share of valid pixels are left out."
    )
    min_tile_valid_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Tiles with a smaller share, the mean over their frames of the first modality, are "
        "left out.",
    )


class LabelsConfig(Frozen):
    """Class labels of tiles."""

    folder: bool = Field(False, description="The scene's parent folder is its class.")
    csv: str | None = Field(
        None, description="CSV file below the archive with columns scene and label."
    )
    vector: str | None = Field(
        None,
        description="GeoParquet file of points or polygons below the archive; see column.",
    )
    column: str = Field("label", description="Column of the class in csv or vector.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("folder", "csv", "vector") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"labels need exactly one of folder, csv, vector; {given or 'none'} given"
            )
        if self.folder and self.column != "label":
            raise ValueError("column has no effect with folder")
        return self


class SplitsConfig(Frozen):
    """Which split a tile belongs to."""

    by: Literal["blocks", "place", "csv", "pattern"] = Field(
        "blocks",
        description="Square blocks on the ground, whole places, a table, or {split} in the pattern.",
    )
    shares: dict[Identifier, float] | None = Field(
        None, description="Share of the blocks or places of each split, such as train 0.8; sum 1."
    )
    block_km: float | None = Field(None, gt=0, le=5000, description="Side of a block in km.")
    buffer_km: float = Field(
        0.0,
        ge=0,
        description="How far tiles of different splits are apart at least; those between are in none.",
    )
    seed: int = Field(0, ge=0, description="Decides which block is in which split.")
    csv: str | None = Field(
        None, description="CSV file below the archive with columns scene and split."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        drawn = self.by in ("blocks", "place")
        if drawn != (self.shares is not None):
            raise ValueError(
                f"by {self.by} needs shares"
                if drawn
                else f"shares have no effect with by {self.by}"
            )
        if (self.by == "blocks") != (self.block_km is not None):
            raise ValueError(
                "by blocks needs block_km"
                if self.by == "blocks"
                else f"block_km has no effect with by {self.by}"
            )
        if self.buffer_km and self.by != "blocks":
            raise ValueError(f"buffer_km has no effect with by {self.by}")
        if (self.by == "csv") != (self.csv is not None):
            raise ValueError(
                "by csv needs csv" if self.by == "csv" else f"csv has no effect with by {self.by}"
            )
        if "none" in (self.shares or {}):
            raise ValueError(
                "shares: none is what tiles in no split are counted as; give another name"
            )
        shares = (self.shares or {"all": 1.0}).values()
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"shares are {dict(self.shares or {})}; expected positive numbers that sum to 1"
            )
        return self


@dataclass(frozen=True)
class ModalitySettings:
    """A modality with the scorer and partition that hold for it; `scoring` is None if nothing is scored."""

    config: ModalityConfig
    scoring: ScorerConfig | None
    partition: PartitionConfig

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_label(self) -> bool:
        return self.config.kind == "label"

    def scored_band_names(self) -> tuple[str, ...] | None:
        """The bands that are scored; None for all of a modality that does not name its bands."""
        return getattr(self.scoring, "bands", None) or self.config.bands

    def attainable(self, patch_size_px: int) -> float | None:
        """The largest score of a patch of that size; None without a bound."""
        assert self.scoring is not None
        scored = self.scored_band_names()
        return self.scoring.attainable(patch_size_px, len(scored) if scored else 1)

    def check(self) -> None:
        """Raise ValueError where scorer, bands and partition contradict each other."""
        rule = self.partition
        if self.scoring is None:
            return
        if rule.thresholds is not None:
            check_thresholds(
                rule.thresholds, rule.base_patch_size, self.attainable, num_scales=rule.num_scales
            )
        if rule.uniform_px is not None:
            check_uniform(rule.uniform_px, rule.base_patch_size, rule.num_scales)
        if isinstance(self.scoring, ExternalConfig):
            if self.scoring.folder is None:
                raise ValueError(
                    "scoring.folder is not given; name the folder of the score rasters"
                )
            return
        scored, bands = self.scored_band_names(), self.config.bands
        unknown = [band for band in scored or () if bands is not None and band not in bands]
        if unknown:
            raise ValueError(
                f"scoring.bands names {unknown}; modality.bands has {list(bands or ())}"
            )
        if scored is not None:
            self.scoring.check_bands(len(scored))


class DataConfig(Frozen):
    """Everything that fixes the bytes of a store."""

    modality: ModalityConfig | None = Field(None, description="The only modality of the archive.")
    modalities: dict[Identifier, ModalityConfig] = Field(
        {}, description="Several modalities by name; the first one's grids and dates lead."
    )
    scoring: Scoring = EntropyConfig()
    partition: PartitionConfig = PartitionConfig()
    store: StoreConfig = StoreConfig()
    grid: GridConfig = GridConfig()
    pairing: PairingConfig = PairingConfig()
    validity: ValidityConfig = ValidityConfig()
    labels: LabelsConfig | None = None
    splits: SplitsConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_from_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("modalities"), dict):
            return given
        named = {
            name: {**entry, "name": name} if isinstance(entry, dict) else entry
            for name, entry in given["modalities"].items()
        }
        return {**given, "modalities": named}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.modality is not None and self.modalities:
            raise ValueError("modality has no effect beside modalities; give one of them")
        for settings in self.all_modalities():
            settings.check()
        first = self.all_modalities()[0]
        if first.is_label:
            raise ValueError(
                f"the first modality, {first.name}, is a label; name one of images first"
            )
        self._check_useful()
        if len(self.all_modalities()) == 1 and self.pairing.tolerance_days is not None:
            raise ValueError("pairing.tolerance_days has no effect with a single modality")
        tile, rule = self.store.tile_size_px, first.partition
        if first.config.band_sets is None and tile % rule.root_size_px:
            raise ValueError(
                f"store.tile_size_px is {tile}; it must be a multiple of the largest patch, "
                f"{rule.root_size_px} px (partition.base_patch_size {rule.base_patch_size} with "
                f"{rule.num_scales} scales)"
            )
        return self

    def _check_useful(self) -> None:
        """Raise ValueError for settings of a modality that have no effect in this configuration."""
        for modality in (settings.config for settings in self.all_modalities()):
            given = modality.resampling if modality.kind == "image" else "bilinear"
            if given != "bilinear" and not self.grid.warp:
                raise ValueError(
                    f"resampling {given} of modality {modality.name} has no effect without grid.warp; "
                    "set it, or leave resampling out"
                )

    def all_modalities(self) -> tuple[ModalitySettings, ...]:
        """Every modality with its own settings or the shared ones, the leading one first."""
        return tuple(self._by_name.values())

    def settings_of(self, modality: str) -> ModalitySettings:
        """The settings of one modality."""
        return self._by_name[modality]

    @cached_property
    def _by_name(self) -> dict[str, ModalitySettings]:
        listed = tuple(self.modalities.values()) or (self.modality or ModalityConfig(),)
        return {modality.name: self._settings(modality) for modality in listed}

    def _settings(self, modality: ModalityConfig) -> ModalitySettings:
        if modality.adaptive:
            scoring = modality.scoring or self.scoring
            return ModalitySettings(modality, scoring, modality.partition or self.partition)
        patch = modality.partition or PartitionConfig(
            base_patch_size=self.partition.root_size_px, num_scales=1
        )
        return ModalitySettings(modality, None, patch)

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of every field."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="python"))).hexdigest()


class PreprocessConfig(DataConfig):
    """The whole configuration of `aptile preprocess`."""

    run: RunConfig = RunConfig()

    def data(self) -> DataConfig:
        """The part that fixes the bytes of the store."""
        return DataConfig(**{name: getattr(self, name) for name in DataConfig.model_fields})
