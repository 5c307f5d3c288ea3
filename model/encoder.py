"""The APT encoder: pixels of a packed batch in, one vector per token out.

Embed every base cell, add encodings, merge runs into tokens, run pre-norm transformer blocks over the
packed sequences. This module only wires; each step has a module of its own. Shape suffixes are those of
`model.batch`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from model import pretrained
from model.attention import Packed
from model.batch import TokenBatch
from model.blocks import BlockStack, Rotary
from model.config import EncoderConfig, group_name
from model.embed import PatchEmbedding, PixelNormalization, normalised_cells, normalised_nodes
from model.encoded import Encoded
from model.encodings import CompositeEncodings, SizePosition, rotary_tables
from model.merge import RunMerge
from model.prefix import PrefixTokens
from model.sequences import See, Sequences, Windows, plan, windowed


class APTEncoder(nn.Module):
    """Adaptive patch transformer: `encoder(batch)` gives tokens in the order of the batch's.

    A batch may lack modalities, band sets and dates; what is absent has no token. Invalid pixels and
    missing leaves cannot change any output. `model.upsample` brings tokens back to the base grid.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        sets = {group_name(m.name, s.name): s for m in config.modalities for s in m.band_sets}
        self.normalization = nn.ModuleDict(
            {name: PixelNormalization(of.value_range) for name, of in sets.items()}
        )
        self.embedding = nn.ModuleDict(
            {
                name: PatchEmbedding(len(of.bands), config.kernel_px, config.width)
                for name, of in sets.items()
            }
        )
        self.encoding = CompositeEncodings(config)
        self.merge = RunMerge(config.width, config.merge, config.merge_levels, config.merge_init)
        self.size_position = SizePosition(config.width) if config.size_position else None
        self.prefix = PrefixTokens(config) if config.num_prefix else None
        self.stack = BlockStack(config, config.depth)

    # Of a compiled encoder the blocks are compiled: what is around them follows the contents of a batch,
    # which are others every time.
    @torch.compiler.disable(recursive=False)
    def forward(self, batch: TokenBatch, see: See = "online") -> Encoded:
        """The tokens a batch's mask lets be seen, encoded; the others take no part in anything.

        "online" sees those marked `ONLINE`, "target" all but `MISSING`. Raises ConfigError for a
        modality, band set or bands the encoder was not made for.
        """
        sequences, *rows = self._before_blocks(batch, see)
        return self._after_blocks(self.stack(*rows), sequences)

    @torch.compiler.disable
    def _before_blocks(
        self, batch: TokenBatch, see: See
    ) -> tuple[Sequences, Tensor, Packed, Rotary | None, Windows | None]:
        """Sequences, and what the blocks take."""
        tokens_ND = self.embed(batch)
        sequences = plan(batch, self.config.sequences, see, self.config.num_prefix)
        prefix_SRD = None if self.prefix is None else self.prefix(batch, sequences.tile)
        rotary, sides = self.rotary(batch), self.config.windows
        return (
            sequences,
            sequences.put(sequences.see(tokens_ND), prefix_SRD),
            sequences.packed,
            None if rotary is None else sequences.put_rotary(*rotary),
            None if sides is None else windowed(batch, sequences, sides),
        )

    @torch.compiler.disable
    def _after_blocks(self, rows: Tensor, sequences: Sequences) -> Encoded:
        tokens_VD, prefix_SRD = sequences.take(rows)
        parts = (None, None) if self.prefix is None else self.prefix.parts(prefix_SRD)
        return Encoded(tokens_VD, sequences.visible, *parts, sequences.tile, sequences.timestep)

    @torch.compiler.disable
    def embed(self, batch: TokenBatch) -> Tensor:
        """Embedded, encoded and merged tokens [N, D], before any token saw another."""
        rows = [self._base_rows(batch, m, b, name) for m, b, name in self._groups(batch)]
        resized_ND = self._resized(batch) if self.config.merge_init == "zero" else None
        tokens_ND: Tensor = self.merge(rows, batch, resized_ND)
        if self.size_position is not None:
            tokens_ND = tokens_ND + self.size_position(batch)
        # Autocast's products have few bits; what all blocks add to keeps those of the weights.
        return tokens_ND.to(self.stack.norm.weight.dtype)

    def token_encoding(self, batch: TokenBatch) -> Tensor:
        """[N, D]: the encoding at every token's centre; with position "rotary" see `rotary` also."""
        return self.encoding.tokens(batch)

    @torch.compiler.disable
    def rotary(self, batch: TokenBatch) -> Rotary | None:
        """cos and sin [N, 32] of the batch's tokens; None unless positions are rotations."""
        return rotary_tables(batch, self.config) if self.config.position == "rotary" else None

    def pixels(self, batch: TokenBatch, modality: int, band_set: int) -> tuple[Tensor, Tensor]:
        """Normalised pixels [M, C, P, P] of a group, 0 where invalid or dropped, and validity [M, P, P]."""
        normalization = self._normalization(batch, modality, band_set)
        return normalised_cells(batch, modality, band_set, normalization)[:2]

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
            for b in range(len(frames.band_sets)):
                yield m, b, self._name(batch, m, b)

    def _name(self, batch: TokenBatch, modality: int, band_set: int) -> str:
        """A group's name among the weights; ConfigError if the encoder was not made for it."""
        frames = batch.modalities[modality]
        chosen = frames.band_sets[band_set]
        self.config.band_set(frames.name, chosen.name, chosen.bands)
        return group_name(frames.name, chosen.name)

    def _normalization(self, batch: TokenBatch, modality: int, band_set: int) -> PixelNormalization:
        found = self.normalization[self._name(batch, modality, band_set)]
        assert isinstance(found, PixelNormalization)
        return found

    def _base_rows(self, batch: TokenBatch, modality: int, band_set: int, name: str) -> Tensor:
        """[M, D]: every base row of a group, embedded and encoded."""
        frames = batch.modalities[modality]
        normalization = self._normalization(batch, modality, band_set)
        cells = normalised_cells(batch, modality, band_set, normalization)
        onto_MD = self.encoding.base_rows(batch, modality)
        vector_D = self.encoding.band_set_vector(frames.name, frames.band_sets[band_set].name)
        rows_MD: Tensor = self.embedding[name](*cells, onto_MD, vector_D)
        return rows_MD

    def _resized(self, batch: TokenBatch) -> Tensor:
        """[N, D]: of every coarse token its patch shrunk to base size, embedded, with its encoding."""
        encoding_ND = self.encoding.tokens(batch)
        tokens, rows = [], []
        for m, b, name in self._groups(batch):
            normalization = self._normalization(batch, m, b)
            for scale in range(1, batch.modalities[m].grid.num_scales):
                tokens.append(batch.tokens_by_scale(m, b, scale))
                patches = normalised_nodes(batch, m, b, scale, normalization)
                rows.append(self.embedding[name](*patches))
        if not rows:
            return encoding_ND
        embedded, at = torch.cat(rows), torch.cat(tokens)
        # Under autocast the embedding has fewer bits than the encoding.
        return encoding_ND.index_add(0, at, embedded.to(encoding_ND.dtype))
