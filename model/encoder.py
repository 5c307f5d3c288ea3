"""The APT encoder: pixels of a packed batch in, one vector per token out.

Embed every base cell, add encodings, merge runs into tokens, run pre-norm transformer blocks over the
packed sequence. Shape suffixes are those of `model.batch`.
"""

import json
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.attention import choose_attention
from model.batch import TokenBatch, only_group
from model.embed import CompositeEncoding, PatchEmbedding, PixelNormalization
from model.merge import RunMerge
from model.places import REFERENCE_DISTANCE_M
from pipeline.errors import ConfigError
from pipeline.scorers.config import Frozen
from pipeline.settings.canonical import canonical_json
from pipeline.store import Store

Size = Literal["nano", "tiny", "small", "base", "large"]
# Width and number of blocks; heads are 64 wide.
SIZES: dict[str, tuple[int, int]] = {
    "nano": (128, 4),
    "tiny": (192, 12),
    "small": (384, 12),
    "base": (768, 12),
    "large": (1024, 24),
}
HEAD_WIDTH = 64
MLP_RATIO = 4
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


class EncoderConfig(Frozen):
    """What fixes the encoder's weights and how it reads pixels."""

    width: int = Field(128, ge=HEAD_WIDTH, multiple_of=HEAD_WIDTH, description="Width of a token.")
    depth: int = Field(4, ge=1, description="Transformer blocks.")
    value_range: tuple[tuple[float, float], ...] = Field(
        description="(low, high) of every band in the archive's own numbers."
    )
    base_patch_size: int = Field(ge=1, description="Side of a base cell in px.")
    ground_sample_distance_m: float | None = Field(
        None, gt=0, description="Pixel size in metres; positions count pixels as 10 m without it."
    )

    @classmethod
    def for_store(cls, store: Store, modality: str, size: Size) -> Self:
        """The configuration of an encoder of that size for the first band set of a store's modality."""
        width, depth = SIZES[size]
        entry = store.header["modalities"][modality]
        # Those of the first band set come first.
        ranges = entry["value_range"][: len(store.layout_of(modality).bands)]
        return cls(
            width=width,
            depth=depth,
            value_range=tuple((float(low), float(high)) for low, high in ranges),
            base_patch_size=entry["base_patch_size"],
            ground_sample_distance_m=entry["ground_sample_distance_m"],
        )

    @property
    def metres_per_cell(self) -> float:
        return self.base_patch_size * (self.ground_sample_distance_m or REFERENCE_DISTANCE_M)


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )

    def forward(self, x_ND: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        attend = choose_attention(x_ND.device.type)
        qkv = self.qkv(self.norm1(x_ND)).view(-1, 3, self.num_heads, HEAD_WIDTH)
        q_NHK, k_NHK, v_NHK = qkv.unbind(1)
        attended = attend(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen)
        x_ND = x_ND + self.projection(attended.flatten(1))
        return x_ND + self.mlp(self.norm2(x_ND))


class BlockStack(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_ND: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        for block in self.blocks:
            x_ND = block(x_ND, cu_seqlens, max_seqlen)
        return self.norm(x_ND)


class APTEncoder(nn.Module):
    """Adaptive patch transformer: `encoder(batch)` gives [N, D] in the order of the batch's tokens.

    Invalid pixels and missing leaves cannot change any output. `model.upsample.scatter_to_grid`
    brings tokens back to the base grid.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.normalization = PixelNormalization(config.value_range)
        self.embedding = PatchEmbedding(
            len(config.value_range), config.base_patch_size, config.width
        )
        self.encoding = CompositeEncoding(config.width, config.metres_per_cell)
        self.merge = RunMerge(config.width)
        self.stack = BlockStack(config.width, config.depth)

    def forward(self, batch: TokenBatch) -> Tensor:
        return self.stack(self.tokens(batch), batch.cu_seqlens, batch.max_seqlen)

    def tokens(self, batch: TokenBatch) -> Tensor:
        """Embedded, encoded and merged tokens [N, D], before any token saw another."""
        pixels_MCPP, valid_MPP = self.pixels(batch)
        base_MD = self.embedding(pixels_MCPP, valid_MPP) + self._base_encoding(batch)
        return self.merge(base_MD, batch)

    def pixels(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Normalised pixels [M, C, P, P], 0 where invalid or dropped, and validity [M, P, P].

        Raises ConfigError for a batch of several modalities or band sets.
        """
        frames = only_group(batch, "APTEncoder")
        pixels_MCPP, valid_MPP = batch.cells(0, 0)
        frame = batch.cell_index(0) // frames.grid.num_cells
        present_MC = frames.band_sets[0].band_present.index_select(0, frame)
        there_MCPP = valid_MPP[:, None] & present_MC[:, :, None, None]
        if batch.normalized:
            return torch.where(there_MCPP, pixels_MCPP.float(), 0), valid_MPP
        return self.normalization(pixels_MCPP, there_MCPP), valid_MPP

    def save_pretrained(self, folder: Path) -> None:
        """Write `model.safetensors` and then `config.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS_FILE)
        text = json.dumps(json.loads(canonical_json(self.config.model_dump())), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """The encoder written by `save_pretrained`; ConfigError if its files are not one."""
        try:
            config = EncoderConfig.model_validate_json((folder / CONFIG_FILE).read_bytes())
            weights = load_file(folder / WEIGHTS_FILE)
            encoder = cls(config)
            encoder.load_state_dict(weights)
        except (OSError, ValidationError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{folder}: not a saved encoder: {reason:.300}") from None
        return encoder

    def _base_encoding(self, batch: TokenBatch) -> Tensor:
        """[M, D]: the encoding of every base row."""
        frames, index = batch.modalities[0], batch.cell_index(0)
        cells = frames.grid.num_cells
        yx = torch.tensor(frames.grid.cell_yx).to(index.device)
        y, x = yx[index % cells].unbind(1)
        return self.encoding(y, x, frames.timestep[index // cells])
