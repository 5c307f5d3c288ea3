"""Configuration: frozen models, one YAML file, every field overridable from the command line.

`DataConfig` fixes the bytes of a store; its digest names the result. `RunConfig` says where and how
a job runs; a job that is resumed must come to the same choice of scenes.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.grid import MAX_SCALES, MAX_TILE_PX
from pipeline.presets import PRESETS
from pipeline.rules import PartitionRule, check_thresholds, check_uniform
from pipeline.scorers.config import (
    SCORER_NAMES,
    EntropyConfig,
    ExternalConfig,
    Frozen,
    Identifier,
    Scoring,
)

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class ModalityConfig(Frozen):
    """What the scenes of the archive are."""

    name: Identifier = Field("image", description="Name of the modality; its group in the store.")
    bands: tuple[Identifier, ...] | None = Field(
        None, description="Band names in file order; band_1, band_2 ... when not given."
    )
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = Field(
        None,
        description="(low, high) in the archive's own numbers, or one pair per band; estimated "
        "from a sample of the pixels when not given.",
    )
    nodata: float | None = Field(
        None, description="Overrides the nodata tag of the files; the tag counts when not given."
    )
    ground_sample_distance_m: float | None = Field(
        None, gt=0, description="Pixel size in metres; from the scenes' transform when not given."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bands is not None and len(set(self.bands)) != len(self.bands):
            raise ValueError("a band name occurs twice; give every band its own name")
        for low, high in self.value_ranges() or ():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"value_range ({low}, {high}) is empty; give low < high")
        return self

    def value_ranges(self) -> tuple[tuple[float, float], ...] | None:
        """The configured ranges as a tuple of pairs (one, or one per band)."""
        match self.value_range:
            case None:
                return None
            case (float() as low, float() as high):
                return ((low, high),)
            case pairs:
                return tuple(pairs)


class PartitionConfig(PartitionRule):
    """How a frame is cut into patches."""

    base_patch_size: int = Field(4, ge=1, le=64, description="Smallest patch in px.")
    num_scales: int = Field(
        3, ge=1, le=MAX_SCALES, description="Patch sizes; each is twice the one before."
    )

    @property
    def root_size_px(self) -> int:
        """Largest patch in px."""
        return self.base_patch_size * int(2 ** (self.num_scales - 1))


class StoreConfig(Frozen):
    """How the result is laid out."""

    tile_size_px: int = Field(128, ge=1, le=MAX_TILE_PX, description="Side of a tile in px.")
    shard_tiles: int = Field(512, ge=1, le=65536, description="Most tiles one shard holds.")
    codec: Literal["lz4", "zstd"] = Field(
        "lz4", description="lz4 for stores one trains from, zstd for stores one keeps."
    )


class DataConfig(Frozen):
    """Everything that fixes the bytes of a store."""

    modality: ModalityConfig = ModalityConfig()
    scoring: Scoring = EntropyConfig()
    partition: PartitionConfig = PartitionConfig()
    store: StoreConfig = StoreConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rule, tile = self.partition, self.store.tile_size_px
        if tile % rule.root_size_px:
            raise ValueError(
                f"store.tile_size_px is {tile}; it must be a multiple of the largest patch, "
                f"{rule.root_size_px} px (partition.base_patch_size {rule.base_patch_size} with "
                f"{rule.num_scales} scales)"
            )
        if rule.thresholds is not None:
            check_thresholds(
                rule.thresholds, rule.base_patch_size, self._attainable, num_scales=rule.num_scales
            )
        if rule.uniform_px is not None:
            check_uniform(rule.uniform_px, rule.base_patch_size, rule.num_scales)
        self._check_scored_bands()
        return self

    def scored_band_names(self) -> tuple[str, ...] | None:
        """The bands that are scored; None for all of a modality that does not name its bands."""
        return getattr(self.scoring, "bands", None) or self.modality.bands

    def _attainable(self, patch_size_px: int) -> float | None:
        scored = self.scored_band_names()
        return self.scoring.attainable(patch_size_px, len(scored) if scored else 1)

    def _check_scored_bands(self) -> None:
        if isinstance(self.scoring, ExternalConfig):
            if self.scoring.folder is None:
                raise ValueError(
                    "scoring.folder is not given; name the folder of the score rasters"
                )
            return
        scored, bands = self.scored_band_names(), self.modality.bands
        unknown = [band for band in scored or () if bands is not None and band not in bands]
        if unknown:
            raise ValueError(
                f"scoring.bands names {unknown}; modality.bands has {list(bands or ())}"
            )
        if scored is not None:
            self.scoring.check_bands(len(scored))

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of every field."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="python"))).hexdigest()


class RunConfig(Frozen):
    """Where and how a job runs; of this, only max_block_bytes can change which scenes are in."""

    workers: int | None = Field(
        None, ge=1, description="Worker processes; one per CPU core when not given."
    )
    scheduler: str | None = Field(
        None, description="Address of a running Dask scheduler, instead of local workers."
    )
    max_block_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="Scenes whose compressed blocks decode to more bytes than this are refused.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("run.workers has no effect beside run.scheduler; give one of them")
        return self


class PreprocessConfig(DataConfig):
    """The whole configuration of `aptile preprocess`."""

    run: RunConfig = RunConfig()

    def data(self) -> DataConfig:
        """The part that fixes the bytes of the store."""
        return DataConfig(**{name: getattr(self, name) for name in DataConfig.model_fields})


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, infinities as text."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def plain(value: Any) -> Any:
    """`value` in types JSON has: tuples as lists, infinities and NaN as "inf", "-inf", "nan"."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value


def load_config(
    model: type[ConfigT],
    file: Path | None,
    overrides: Iterable[str] = (),
    preset: str | None = None,
) -> ConfigT:
    """Configuration from a preset, then a YAML file, then `key.path=value` overrides.

    A file may name its preset with a top-level key `preset`. Raises ConfigError, which names the
    file, the key, what was given and what is expected.
    """
    content = _read_yaml(file) if file else {}
    label = str(file) if file else "configuration"
    named = content.pop("preset", None)
    if preset is not None and named is not None and preset != named:
        raise ConfigError(
            f"{label}: preset is {named!r} but --preset says {preset!r}; give one of them"
        )
    merged = _merge(_preset(preset if preset is not None else named), content)
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return validated(model, merged, label)


def validated(model: type[ConfigT], content: Mapping[str, Any], label: str) -> ConfigT:
    """`content` as a model; ConfigError, which begins with `label`, for what does not fit."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_in_words(error, model, label)) from None


def _preset(name: Any) -> dict[str, Any]:
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; expected one of {sorted(PRESETS)}")
    return PRESETS[name]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the configuration: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{file}: not a YAML file: {where}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{file}: expected `key: value` lines at the top level, got {content!r:.80}"
        )
    return content


def _parse_override(text: str) -> dict[str, Any]:
    """`partition.num_scales=2` as a nested mapping; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text!r}: expected key=value, for example partition.num_scales=2")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value is not YAML") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _in_words(error: ValidationError, model: type[BaseModel], label: str) -> str:
    """Every problem in one line: file, key, what is wrong, and the nearest known key."""
    return "; ".join(_problem(dict(item), model, label) for item in error.errors())


def _problem(item: dict[str, Any], model: type[BaseModel], label: str) -> str:
    # The tag of the chosen scorer is no key the user wrote.
    path = [str(part) for part in item["loc"] if str(part) not in SCORER_NAMES]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{label}: unknown key {key!r}; {advice}"
    if item["type"] == "value_error":
        return f"{label}: {key + ': ' if key else ''}{item['ctx']['error']}"
    return f"{label}: {key} is {item['input']!r:.80}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
