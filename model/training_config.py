"""What a pretraining run is told. A setting without effect is refused."""

from typing import Literal

import pyarrow.compute as pc
import torch
from pydantic import Field, ValidationError, model_validator

from model.attention import choose_attention
from model.config import HEAD_WIDTH, SIZES, EncoderChoices, EncoderConfig, EncoderOptions, Size
from model.data import Augmentation, TileDataset
from model.encoder import APTEncoder
from pipeline.errors import ConfigError
from pipeline.scorers.config import Frozen, Identifier

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
# What attention is given in each.
_ATTENTION_DTYPE = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
_BATCH_TILES = 8


class TrainConfig(Frozen):
    """The whole configuration of `aptile train`."""

    partition: str = Field("default", description="The store's partition that becomes tokens.")
    modalities: tuple[Identifier, ...] | None = Field(
        None,
        min_length=1,
        description="Modalities that are read, with all band sets; all that have tokens if not given.",
    )
    size: Size = Field("nano", description="Encoder size: nano, tiny, small, base or large.")
    encoder: EncoderChoices = Field(
        EncoderChoices(), description="How the encoder is built, beside its size."
    )
    steps: int = Field(300, ge=1, description="Optimiser steps of the whole run.")
    batch_tokens: int | None = Field(
        None, ge=1, description="Most tokens of a step; no tile may have more."
    )
    batch_tiles: int | None = Field(
        None, ge=1, description="Tiles per step, instead of batch_tokens; 8 if neither is given."
    )
    split: str | tuple[str, ...] | None = Field(
        None, description="Train on the tiles of these splits only; on all tiles if not given."
    )
    augment: Augmentation | None = Field(
        None, description="What is done to tiles at random; nothing if not given."
    )
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warm-up before cosine decay.")
    weight_decay: float = Field(0.02, ge=0, description="Weight decay of AdamW.")
    hidden_share: float = Field(0.5, gt=0, lt=1, description="Share of a tile's tokens to predict.")
    seed: int = Field(
        0,
        ge=0,
        description="Fixes initial weights, the order of tiles, masks and all else that is drawn.",
    )
    precision: Precision | None = Field(
        None,
        description="32-true, bf16-mixed or 16-mixed (CUDA only); if not given, bf16-mixed on CUDA and "
        "32-true elsewhere.",
    )
    compile: bool = Field(False, description="Compile the transformer blocks with torch.compile.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be below steps, {self.steps}"
            )
        if self.batch_tokens is not None and self.batch_tiles is not None:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens} and batch_tiles is {self.batch_tiles}; "
                "give one of them"
            )
        return self

    @model_validator(mode="after")
    def _encoder_fits_its_size(self) -> "TrainConfig":
        width, depth = SIZES[self.size]
        try:
            EncoderOptions(width=width, depth=depth, **self.encoder.model_dump())
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"encoder: {reason}") from None
        return self

    @property
    def tiles_per_step(self) -> int | None:
        """None with a token budget."""
        return None if self.batch_tokens else self.batch_tiles or _BATCH_TILES


def chosen_precision(wanted: Precision | None) -> Precision:
    """What is computed in on this machine; ConfigError for what it cannot do."""
    if wanted is None:
        # The packed attention kernels of CUDA take 16-bit numbers only.
        return "bf16-mixed" if torch.cuda.is_available() else "32-true"
    if wanted == "16-mixed" and not torch.cuda.is_available():
        raise ConfigError(
            "precision is 16-mixed, which needs a CUDA device, and there is none; give bf16-mixed or "
            "32-true"
        )
    return wanted


def check_fits(encoder: EncoderConfig, dataset: TileDataset) -> None:
    """Raise ConfigError for options that a dataset's tiles cannot have, or on which they have no effect."""
    manifest = dataset.manifest
    most_dates = pc.max(pc.list_value_length(manifest["datetimes"])).as_py()
    dates = pc.list_flatten(manifest["datetimes"])
    if encoder.sequences == "date" and most_dates < 2 and not _some_are_static(dataset):
        raise ConfigError(
            "encoder.sequences is date, and no tile has more than one date: the same as tile; "
            "leave it out"
        )
    if encoder.season == "day_of_year" and dates.null_count == len(dates):
        raise ConfigError(
            "encoder.season is day_of_year, and no date of a tile is known; leave it out"
        )
    if encoder.location_token and manifest["geometry"].null_count == len(manifest):
        raise ConfigError(
            "encoder.location_token is true, and no tile's place on Earth is known; leave it out"
        )
    # The rest shows on a tile, whatever the encoder's width.
    options = encoder.model_dump() | {"width": HEAD_WIDTH}
    with torch.no_grad():
        APTEncoder(EncoderConfig.model_validate(options))(dataset.batch([0]))


def _some_are_static(dataset: TileDataset) -> bool:
    """Whether some of its modalities belong to no date, and others do."""
    header = dataset.store.header["modalities"]
    return len({bool(header[name]["static"]) for name in dataset.modalities}) == 2


def attention_name(precision: Precision | None = None) -> str:
    """The attention a run on this machine uses, for the log."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attend = choose_attention(device, _ATTENTION_DTYPE[chosen_precision(precision)])
    return attend.__name__.strip("_")
