"""The APT encoder: pixels of a packed batch in, one vector per token out.

Embed every base cell, add encodings, merge runs into tokens, run pre-norm transformer blocks over the
packed sequences. This module only wires; each step has a module of its own. Shape suffixes are those of
`model.batch`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.batch import BandSetPixels, ModalityFrames, TokenBatch
from model.blocks import BlockStack
from model.config import REFERENCE_DISTANCE_M, EncoderConfig, group_name
from model.embed import CompositeEncoding, PatchEmbedding, PixelNormalization
from model.encoded import Encoded
from model.merge import RunMerge
from pipeline.errors import ConfigError
from pipeline.settings.canonical import canonical_json

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


class APTEncoder(nn.Module):
    """Adaptive patch transformer: `encoder(batch)` gives tokens in the order of the batch's.

    A batch may lack modalities, band sets and dates; what is absent has no token. Invalid pixels and
    missing leaves cannot change any output. `model.upsample` brings tokens back to the base grid.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        sets = [(m.name, s) for m in config.modalities for s in m.band_sets]
        names = [group_name(m, s.name) for m, s in sets]
        self.normalization = nn.ModuleDict(
            {n: PixelNormalization(s.value_range) for n, (_, s) in zip(names, sets, strict=True)}
        )
        self.embedding = nn.ModuleDict(
            {
                n: PatchEmbedding(len(s.bands), config.kernel_px, config.width)
                for n, (_, s) in zip(names, sets, strict=True)
            }
        )
        self.encoding = nn.ModuleDict(
            {n: CompositeEncoding(config.width, REFERENCE_DISTANCE_M) for n in names}
        )
        self.merge = RunMerge(config.width)
        self.stack = BlockStack(config.width, config.depth)

    def forward(self, batch: TokenBatch, see: Literal["online", "target"] = "online") -> Encoded:
        """The tokens a batch's mask lets be seen, encoded.

        "online" sees those marked `ONLINE`, "target" all but `MISSING`. Raises ConfigError for a
        modality, band set or bands the encoder was not made for.
        """
        tokens = self.stack(self.embed(batch), batch.cu_seqlens, batch.max_seqlen)
        tile = torch.arange(batch.num_tiles, device=batch.device)
        return Encoded(tokens, None, None, None, tile, torch.full_like(tile, -1))

    def embed(self, batch: TokenBatch) -> Tensor:
        """Embedded, encoded and merged tokens [N, D], before any token saw another."""
        rows = [
            self.embedding[name](*self.pixels(batch, m, b)) + self._base_encoding(batch, m, name)
            for m, b, name in self._groups(batch)
        ]
        return self.merge(torch.cat(rows), batch)

    def token_encoding(self, batch: TokenBatch) -> Tensor:
        """[N, D]: the encoding of every token's place, at its leaf's centre."""
        y, x, scale, timestep = batch.positions.float().unbind(1)
        middle = (2**scale - 1) / 2
        encoding = torch.zeros(
            batch.num_tokens, self.config.width, device=batch.device, dtype=torch.float32
        )
        for m, b, name in self._groups(batch):
            at = batch.token_index(m, b)
            units = self._units_per_cell(batch.modalities[m])
            of_group = self.encoding[name](
                (y + middle)[at] * units, (x + middle)[at] * units, timestep[at]
            )
            encoding = encoding.index_copy(0, at, of_group)
        return encoding

    def pixels(self, batch: TokenBatch, modality: int, band_set: int) -> tuple[Tensor, Tensor]:
        """Normalised pixels [M, C, P, P] of a group, 0 where invalid or dropped, and validity [M, P, P]."""
        frames = batch.modalities[modality]
        chosen = frames.band_sets[band_set]
        pixels_MCPP, valid_MPP = batch.cells(modality, band_set)
        frame = batch.cell_index(modality) // frames.grid.num_cells
        present_MC = chosen.band_present.index_select(0, frame)
        there_MCPP = valid_MPP[:, None] & present_MC[:, :, None, None]
        if batch.normalized:
            return torch.where(there_MCPP, pixels_MCPP.float(), 0), valid_MPP
        normalization = self.normalization[self._name(frames, chosen)]
        return normalization(pixels_MCPP, there_MCPP), valid_MPP

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

    def _groups(self, batch: TokenBatch) -> Iterator[tuple[int, int, str]]:
        """(modality, band set, name) of every group of a batch, in the batch's order."""
        for m, frames in enumerate(batch.modalities):
            for b, band_set in enumerate(frames.band_sets):
                yield m, b, self._name(frames, band_set)

    def _name(self, frames: ModalityFrames, band_set: BandSetPixels) -> str:
        self.config.band_set(frames.name, band_set.name, band_set.bands)
        return group_name(frames.name, band_set.name)

    def _base_encoding(self, batch: TokenBatch, modality: int, name: str) -> Tensor:
        """[M, D]: the encoding of every base row."""
        frames, index = batch.modalities[modality], batch.cell_index(modality)
        cells, units = frames.grid.num_cells, self._units_per_cell(frames)
        yx = torch.tensor(frames.grid.cell_yx).to(index.device)
        y, x = yx[index % cells].unbind(1)
        return self.encoding[name](y * units, x * units, frames.timestep[index // cells])

    def _units_per_cell(self, frames: ModalityFrames) -> float:
        metres_per_px = self.config.modality(frames.name).metres_per_px
        return frames.grid.base_patch_size * metres_per_px / REFERENCE_DISTANCE_M
