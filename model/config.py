"""What fixes an encoder's weights and how it reads pixels. A setting without effect is refused."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from model.data.choices import ModalityChoice, band_sets_of
from pipeline.errors import ConfigError
from pipeline.scorers.config import Frozen, Identifier
from pipeline.storage.layout import BandSet
from pipeline.store import Store

Size = Literal["nano", "tiny", "small", "base", "large"]
# Width and number of blocks.
SIZES: dict[str, tuple[int, int]] = {
    "nano": (128, 4),
    "tiny": (192, 12),
    "small": (384, 12),
    "base": (768, 12),
    "large": (1024, 24),
}
HEAD_WIDTH = 64
# Of every LayerNorm, as in public ViTs, whose weights can be loaded.
NORM_EPS = 1e-6
# One unit of all encodings of position.
REFERENCE_DISTANCE_M = 10.0
_FIRST = "first"

SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]*$", max_length=16)]


def group_name(modality: str, band_set: str) -> str:
    """The name of a band set in messages and weights: "s2_l2a/20m", or "s2_l2a/first"."""
    return f"{modality}/{band_set or _FIRST}"


class EncoderChoices(Frozen):
    """How the encoder is built, whatever modalities it reads and however large it is."""

    kernel_px: int = Field(
        8,
        ge=1,
        le=32,
        description="Side in px of the stored patch kernel; resized to the batch's cells.",
    )
    position: Literal["sincos", "rotary", "learned"] = Field(
        "sincos",
        description="Where and when a token is: added sine-cosines, rotations, or a table.",
    )
    position_cells: tuple[int, int] | None = Field(
        None, description="(rows, columns) of the table of position 'learned'."
    )
    season: Literal["month", "day_of_year"] = Field(
        "month", description="What a date's season is told as."
    )
    size_position: bool = Field(
        False, description="Add an MLP of every token's (y, x, size) after merging."
    )
    location_token: bool = Field(
        False, description="A token of the tile's latitude and longitude in front of its sequences."
    )
    class_token: bool = Field(False, description="A learned token in front of every sequence.")
    register_tokens: int = Field(
        0, ge=0, description="Learned tokens in front of every sequence that nobody reads."
    )
    sequences: Literal["tile", "date"] = Field(
        "tile", description="Who sees whom: all tokens of a tile, or those of one of its dates."
    )
    windows: int | None = Field(
        None, ge=2, description="Windows along a tile's side; tokens see those of their window."
    )
    global_every: int | None = Field(
        None, ge=2, description="With windows, every so manieth block sees the whole sequence."
    )
    merge: Literal["shared", "per_level"] = Field(
        "shared", description="One merging convolution for all levels, or stacks for each scale."
    )
    merge_levels: int | None = Field(
        None,
        ge=1,
        description="Largest scale merge 'per_level' has a stack for: scales of the quadtree less one.",
    )
    merge_init: Literal["average", "kaiming", "zero"] = Field(
        "average",
        description="A fresh coarse token: the mean of its base tokens, random, or the embedding of "
        "its shrunk patch.",
    )
    mlp: Literal["gelu", "swiglu"] = Field("gelu", description="Kind of the blocks' MLP.")
    mlp_ratio: float = Field(
        4, gt=0, allow_inf_nan=False, description="Hidden width of the MLP over the token's width."
    )
    qk_norm: bool = Field(False, description="Normalise queries and keys in every head.")
    layer_scale: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Initial scale of every block's branches; none when not given.",
    )
    drop_path: float = Field(
        0,
        ge=0,
        lt=1,
        description="Share of sequences that skip the last block's branches in training.",
    )
    checkpointing: bool = Field(
        False,
        description="Compute blocks again in the backward pass instead of keeping activations.",
    )

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        self._check_companion("position_cells", "position", "learned")
        self._check_companion("merge_levels", "merge", "per_level")
        if self.position_cells is not None and min(self.position_cells) < 1:
            raise ValueError(
                f"position_cells is {self.position_cells}; it must be (rows, columns), at least 1 each"
            )
        self._check_windows()
        return self

    @property
    def num_prefix(self) -> int:
        """Tokens put in front of every sequence: class, registers, location, in this order."""
        return self.class_token + self.register_tokens + self.location_token

    def _check_companion(self, key: str, of: str, value: str) -> None:
        """`key` is needed by, and only with, `of: value`."""
        chosen, given = getattr(self, of), getattr(self, key)
        if chosen == value and given is None:
            raise ValueError(f"{of} is {value!r}, which needs {key}; give {key}, or another {of}")
        if chosen != value and given is not None:
            raise ValueError(
                f"{key} is {given}, which has no effect with {of} {chosen!r}; leave {key} out, or give "
                f"{of}: {value}"
            )

    def _check_windows(self) -> None:
        every, windows = self.global_every, self.windows
        if windows is None and every is not None:
            raise ValueError(
                f"global_every is {every}, which has no effect without windows; leave it out, or give "
                "windows"
            )
        if windows is not None and every is None and self.num_prefix:
            raise ValueError(
                f"windows is {windows}, and without a global block class, register and location tokens "
                "would see no token of the tile; give global_every, or leave those tokens out"
            )


class EncoderOptions(EncoderChoices):
    """How the encoder is built, whatever modalities it reads."""

    width: int = Field(128, ge=HEAD_WIDTH, multiple_of=HEAD_WIDTH, description="Width of a token.")
    depth: int = Field(4, ge=1, description="Transformer blocks.")

    @model_validator(mode="after")
    def _size_suits_choices(self) -> Self:
        every = self.global_every
        if every is not None and every > self.depth:
            raise ValueError(
                f"global_every is {every}, and no block of {self.depth} would be global; it must "
                f"be at most depth, {self.depth}"
            )
        if self.drop_path and self.depth == 1:
            raise ValueError(
                f"drop_path is {self.drop_path}, which has no effect with depth 1, as it grows from 0 at "
                "the first block; leave it out, or give a larger depth"
            )
        if self.mlp_ratio * self.width < 1:
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio}, which leaves an MLP of width {self.width} nothing; it "
                f"must be at least {1 / self.width}"
            )
        return self

    @property
    def num_heads(self) -> int:
        return self.width // HEAD_WIDTH


class BandSetConfig(Frozen):
    """A band set the encoder can read."""

    name: SetName = Field("", description="Name in the store; empty for a modality's first set.")
    bands: tuple[Identifier, ...] = Field(min_length=1, description="Bands in the store's order.")
    value_range: tuple[tuple[float, float], ...] = Field(
        description="(low, high) of every band in the archive's own numbers; becomes -1 to 1."
    )

    @model_validator(mode="after")
    def _a_range_per_band(self) -> Self:
        if len(self.value_range) != len(self.bands):
            raise ValueError(
                f"value_range has {len(self.value_range)} pairs for {len(self.bands)} bands "
                f"({', '.join(self.bands)}); give one (low, high) per band"
            )
        if len(set(self.bands)) < len(self.bands):
            raise ValueError(f"bands are {', '.join(self.bands)}; name each once")
        for band, (low, high) in zip(self.bands, self.value_range, strict=True):
            if not -float("inf") < low < high < float("inf"):
                raise ValueError(
                    f"value_range of {band} is ({low}, {high}); it must be (low, high), finite, with "
                    "low below high"
                )
        return self


class ModalityConfig(Frozen):
    """A modality the encoder can read."""

    name: Identifier = Field(description="Name in the store.")
    band_sets: tuple[BandSetConfig, ...] = Field(min_length=1, description="Its band sets.")
    ground_sample_distance_m: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Pixel size of the first band set in metres; positions count pixels as 10 m "
        "without it.",
    )

    @field_validator("band_sets")
    @classmethod
    def _named_once(cls, band_sets: tuple[BandSetConfig, ...]) -> tuple[BandSetConfig, ...]:
        _check_names("band_sets", [s.name or _FIRST for s in band_sets])
        return band_sets

    @property
    def metres_per_px(self) -> float:
        """Of the first band set, in whose px base cells are counted."""
        return self.ground_sample_distance_m or REFERENCE_DISTANCE_M


class EncoderConfig(EncoderOptions):
    """What fixes the encoder's weights and how it reads pixels.

    Patch size, grid and number of scales are no part of it: they come with every batch.
    """

    modalities: tuple[ModalityConfig, ...] = Field(
        min_length=1, description="Modalities the encoder can read; a batch may lack some."
    )
    data_digest: str | None = Field(
        None, description="Digest of the configuration of the store the encoder was made for."
    )

    @field_validator("modalities")
    @classmethod
    def _named_once(cls, modalities: tuple[ModalityConfig, ...]) -> tuple[ModalityConfig, ...]:
        _check_names("modalities", [m.name for m in modalities])
        return modalities

    @classmethod
    def for_store(
        cls,
        store: Store,
        modalities: ModalityChoice = None,
        size: Size = "nano",
        **options: Any,
    ) -> Self:
        """The configuration of an encoder of that size for a store's modalities.

        `modalities` as in `TileDataset`: names, or names of band sets by modality; all that have tokens,
        with all their band sets, when not given. `options` are fields of `EncoderOptions`; a `width` or
        `depth` among them counts instead of the size's.

        Raises ConfigError for another size, names the store has not, and bands without a value range.
        """
        if size not in SIZES:
            raise ConfigError(f"size is {size!r}; it must be one of {', '.join(SIZES)}")
        width, depth = SIZES[size]
        return cls(
            **{"width": width, "depth": depth, **options},
            modalities=tuple(
                _modality_of(store, name, sets)
                for name, sets in band_sets_of(store, modalities).items()
            ),
            data_digest=store.header["config_digest"],
        )

    def modality(self, name: str) -> ModalityConfig:
        """ConfigError if the encoder knows no modality of that name."""
        for modality in self.modalities:
            if modality.name == name:
                return modality
        known = ", ".join(m.name for m in self.modalities)
        raise ConfigError(
            f"the batch has modality {name!r}, which this encoder cannot read; it was made for {known}: "
            "give TileDataset those modalities, or make an encoder for all of the store's"
        )

    def band_set(self, modality: str, name: str, bands: tuple[str, ...]) -> BandSetConfig:
        """The band set of that name; ConfigError if there is none, or if it is of other bands."""
        sets = self.modality(modality).band_sets
        for band_set in sets:
            if band_set.name == name:
                if band_set.bands != bands:
                    raise ConfigError(
                        f"{group_name(modality, name)} of the batch has bands {', '.join(bands)}; this "
                        f"encoder was made for {', '.join(band_set.bands)}, in this order"
                    )
                return band_set
        known = ", ".join(group_name(modality, s.name) for s in sets)
        raise ConfigError(
            f"the batch has band set {group_name(modality, name)}, which this encoder cannot read; it was "
            f"made for {known}: give TileDataset those band sets, or make an encoder for all of the store's"
        )


def _check_names(key: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{key} are {', '.join(names)}; name each once")


def _modality_of(store: Store, name: str, sets: tuple[BandSet, ...]) -> ModalityConfig:
    entry, layout = store.header["modalities"][name], store.layouts[name]
    ranges = entry["value_range"]
    if len(ranges) != len(layout.all_bands):
        raise ConfigError(
            f"{store.location}: modality {name!r} has no value ranges, which an encoder needs to scale "
            "pixels; set modality.value_range and preprocess the archive again"
        )
    of_band = dict(zip(layout.all_bands, ranges, strict=True))
    return ModalityConfig(
        name=name,
        band_sets=tuple(
            BandSetConfig(
                name=s.name,
                bands=s.bands,
                value_range=tuple((of_band[b][0], of_band[b][1]) for b in s.bands),
            )
            for s in sets
        ),
        ground_sample_distance_m=entry["ground_sample_distance_m"],
    )
