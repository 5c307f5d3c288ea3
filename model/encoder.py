"""The APT encoder: pixels of a packed batch in, one vector per token out.

Embed every base cell, add encodings, merge runs into tokens, run pre-norm transformer blocks over the
packed sequences. This module only wires; each step has a module of its own. Shape suffixes are those of
`model.batch`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from model import pretrained
from model.batch import TokenBatch
from model.blocks import BlockStack
from model.config import EncoderConfig, group_name
from model.embed import PatchEmbedding, PixelNormalization, normalised_cells
from model.encoded import Encoded
from model.encodings import CompositeEncodings
from model.frames import BandSetPixels, ModalityFrames
from model.merge import RunMerge


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
        self.encoding = CompositeEncodings(config)
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
        rows = [self._base_rows(batch, m, b, name) for m, b, name in self._groups(batch)]
        return self.merge(rows, batch)

    def token_encoding(self, batch: TokenBatch) -> Tensor:
        """[N, D]: the encoding of every token's place, at its leaf's centre."""
        return self.encoding.tokens(batch)

    def pixels(self, batch: TokenBatch, modality: int, band_set: int) -> tuple[Tensor, Tensor]:
        """Normalised pixels [M, C, P, P] of a group, 0 where invalid or dropped, and validity [M, P, P]."""
        frames = batch.modalities[modality]
        name = self._name(frames, frames.band_sets[band_set])
        return normalised_cells(batch, modality, band_set, self.normalization[name])[:2]

    def save_pretrained(self, folder: Path) -> None:
        """Write the encoder into `folder`, as `model.pretrained.save` says."""
        pretrained.save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """The encoder written by `save_pretrained`; ConfigError if its files are not one."""
        return pretrained.load(cls, folder)

    def _groups(self, batch: TokenBatch) -> Iterator[tuple[int, int, str]]:
        """(modality, band set, name) of every group of a batch, in the batch's order."""
        for m, frames in enumerate(batch.modalities):
            for b, band_set in enumerate(frames.band_sets):
                yield m, b, self._name(frames, band_set)

    def _name(self, frames: ModalityFrames, band_set: BandSetPixels) -> str:
        self.config.band_set(frames.name, band_set.name, band_set.bands)
        return group_name(frames.name, band_set.name)

    def _base_rows(self, batch: TokenBatch, modality: int, band_set: int, name: str) -> Tensor:
        """[M, D]: every base row of a group, embedded and encoded."""
        frames = batch.modalities[modality]
        cells = normalised_cells(batch, modality, band_set, self.normalization[name])
        onto_MD = self.encoding.base_rows(batch, modality)
        vector_D = self.encoding.band_set_vector(frames.name, frames.band_sets[band_set].name)
        return self.embedding[name](*cells, onto_MD, vector_D)
