"""Packed batches: tiles of any token count side by side, without padding.

A batch carries whole frames and one row of small numbers per token. Whatever has a row per base cell is
derived from these on the batch's own device, at first use, in a number of operations that does not depend
on how much the batch holds.

Shape suffixes used in this package:

- N = tokens, B = tiles, F = frames of a modality, C = bands of a band set
- M = base cells of tokens, P = a base cell's side in px of a band set
- D = model width, H = heads, K = head width
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from model.cells import SIGNED, cell_tables, cut, runs
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid

# Values of `TokenBatch.mask`: who sees a token.
ONLINE, TARGET_ONLY, DECODER, MISSING = range(4)


@dataclass(frozen=True, eq=False)
class BandSetPixels:
    """Bands of one native resolution of all frames of a modality.

    - `name` ("" for a modality's first set) and `bands`: as in the store.
    - `pixels` [F, C, y, x]: in the archive's own numbers and type, or as the dataset was asked to give
      them; `y`, `x` are px of this set. A pixel that is not valid means nothing (0 if normalised).
    - `valid` bool [F, y, x]: which pixels are data.
    - `band_present` bool [F, C]: False where augmentation dropped a band; its pixels are 0.
    """

    name: str
    bands: tuple[str, ...]
    pixels: Tensor
    valid: Tensor
    band_present: Tensor


@dataclass(frozen=True, eq=False)
class ModalityFrames:
    """All frames of one modality in a batch, tile after tile, each tile's in the order of time.

    - `grid`: base cells of a frame.
    - `band_sets`: those read, in the dataset's order.
    - `tile` int64 [F]: position of the frame's tile in the batch, 0 ... B - 1, ascending.
    - `timestep` int64 [F]: which of its tile's dates; 0 for the one frame of a static modality.
    - `timestamps` int32 [F, 3]: (day 1 ... 31, month 0 ... 11, year) of that date, UTC; -1 where the date
      is unknown, and for static modalities, whose frame belongs to no date.
    - `tokens_per_scale`: tokens of every scale, fine to coarse, in each band set.
    """

    name: str
    grid: BaseGrid
    band_sets: tuple[BandSetPixels, ...]
    tile: Tensor
    timestep: Tensor
    timestamps: Tensor
    tokens_per_scale: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        return self.tile.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens in each band set."""
        return sum(self.tokens_per_scale)

    @property
    def num_covered(self) -> int:
        """M: base cells of the tokens of one band set."""
        return sum(n * 4**scale for scale, n in enumerate(self.tokens_per_scale))


@dataclass(frozen=True, eq=False)
class LabelFrames:
    """Label rasters of a batch: `pixels` [F, C, y, x] of class numbers, `valid` bool [F, y, x].

    `tile` and `timestep` int64 [F] as in `ModalityFrames`; `ignore_index` is the class that means
    "no label", None where the store names none. A tile without a label raster has no frame.
    """

    name: str
    pixels: Tensor
    valid: Tensor
    tile: Tensor
    timestep: Tensor
    ignore_index: int | None


@dataclass(frozen=True, eq=False)
class MergePlan:
    """How rows of base cells become tokens, level by level, all modalities and band sets at once.

    - `rows` int64 [M]: the base rows in the order of merging: those of tokens of scale 0, then of scale 1,
      and so on. Rows are those of `TokenBatch.cell_index`, of every modality and band set in turn.
    - `finished`: at every level, fine to coarse, this many rows from the front are whole tokens; of the
      rest, four neighbours make one row of the next level.
    - `token_order` int64 [N]: finished rows of all levels one after another, indexed by it, are in the
      batch's order of tokens.
    """

    rows: Tensor
    finished: tuple[int, ...]
    token_order: Tensor


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tiles as one packed sequence of tokens.

    Order of tokens: tile after tile; in a tile by modality (the dataset's order), band set, frame (time),
    and in storage order. Every leaf that is not missing is one token of each band set; missing leaves have
    none, so that a tile may have no token.

    - `modalities`: the frames the tokens are cut from.
    - `labels`: by name, label rasters of the store, or a tensor [B, ...] of labels given per tile.
    - `scales` uint8 [N]: the patch is `base_patch_size * 2**scale` px of the first band set.
    - `positions` int32 [N, 4]: (y, x) of the leaf's top-left base cell, scale, timestep.
    - `frame` int64 [N]: the frame, counted in its modality; `modality` uint8 [N]; `band_set` uint8 [N],
      counted in its modality.
    - `mask` uint8 [N]: `ONLINE` encoder, `TARGET_ONLY`, `DECODER`, `MISSING`; a dataset gives `ONLINE`.
    - `cu_seqlens` int32 [B + 1]: tile `b` owns tokens `cu_seqlens[b] ... cu_seqlens[b + 1] - 1`;
      `max_seqlen` is the largest tile's count.
    - `tile_indices` int64 [B]: rows of the dataset.
    - `location` float32 [B, 2]: (latitude, longitude) in degrees of the tile's centre; NaN where unknown.
    - `normalized`: whether pixels are in [-1, 1] over the value range and 0 where not valid.
    - `skipped`: a line for every tile left out because it could not be read: its id and why.
    """

    modalities: tuple[ModalityFrames, ...]
    labels: dict[str, LabelFrames | Tensor]
    scales: Tensor
    positions: Tensor
    frame: Tensor
    modality: Tensor
    band_set: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    tile_indices: Tensor
    location: Tensor
    normalized: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def num_tiles(self) -> int:
        return self.tile_indices.numel()

    @property
    def num_tokens(self) -> int:
        return self.scales.numel()

    @property
    def device(self) -> torch.device:
        return self.scales.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on `device`; copies from pinned memory need not be waited for."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from where copies to a GPU run beside its work."""
        return self._map(Tensor.pin_memory)

    def token_index(self, modality: int, band_set: int) -> Tensor:
        """int64 [n]: positions of one band set's tokens among all, in frame and storage order."""
        first = 0
        for m, frames in enumerate(self.modalities):
            for b in range(len(frames.band_sets)):
                if (m, b) == (modality, band_set):
                    return self._by_group[first : first + frames.num_tokens]
                first += frames.num_tokens
        raise IndexError(f"no band set {band_set} of modality {modality} in this batch")

    def cell_index(self, modality: int) -> Tensor:
        """int64 [M]: frame * cells per frame + storage position of every base cell of a modality's tokens.

        Frame after frame, in storage order; a token of scale `s` owns `4**s` neighbours. The same in all
        band sets of the modality.
        """
        return self._once(("cell_index", modality), lambda: self._cell_index(modality))

    def cells(self, modality: int, band_set: int) -> tuple[Tensor, Tensor]:
        """Pixels [M, C, P, P] and validity [M, P, P] of the base cells in `cell_index`'s order.

        A cell has `P = ceil(r)` px a side, `r` being its side in px of the band set. Where `r` is no
        whole number, cells share pixels, and each px takes the pixel in which its centre lies.
        """
        key = ("cells", modality, band_set)
        return self._once(key, lambda: self._cells(modality, band_set))

    @cached_property
    def merge(self) -> MergePlan:
        """How base rows of all modalities and band sets, one after another, become tokens."""
        counts = [(m.tokens_per_scale, len(m.band_sets)) for m in self.modalities]
        num_scales = max((len(per_scale) for per_scale, _ in counts), default=0)
        finished = tuple(
            sum(per_scale[s] * sets for per_scale, sets in counts if s < len(per_scale))
            for s in range(num_scales)
        )
        num_rows = sum(m.num_covered * len(m.band_sets) for m in self.modalities)
        scales = self.scales.long()
        lengths = 1 << 2 * scales[self._by_group]
        first_row = torch.empty_like(self._by_group)
        first_row[self._by_group] = lengths.cumsum(0) - lengths
        by_scale = self._by_group[scales[self._by_group].argsort(stable=True)]
        token_order = torch.empty_like(by_scale)
        token_order[by_scale] = torch.arange(self.num_tokens, device=self.device)
        rows = runs(first_row[by_scale], scales[by_scale], num_rows)
        return MergePlan(rows, finished, token_order)

    @cached_property
    def timestamps(self) -> Tensor:
        """int32 [N, 3]: (day, month, year) of each token's frame, as in `ModalityFrames.timestamps`."""
        of_groups = [
            frames.timestamps[self.frame[self.token_index(m, b)]]
            for m, frames in enumerate(self.modalities)
            for b in range(len(frames.band_sets))
        ]
        stamps = torch.cat(of_groups)
        return torch.empty_like(stamps).index_copy(0, self._by_group, stamps)

    @cached_property
    def tile_of_token(self) -> Tensor:
        """int64 [N]: position of each token's tile in the batch."""
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(lengths, output_size=self.num_tokens)

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values per token [N, ...] as [B, max_seqlen, ...] with zeros behind, and bool [B, max_seqlen].

        The mask is True where a token is.
        """
        slots = values.new_zeros(self.num_tiles * self.max_seqlen, *values.shape[1:])
        padded = slots.index_copy(0, self._padded_index, values)
        place = torch.arange(self.max_seqlen, device=self.device)
        return (
            padded.unflatten(0, (self.num_tiles, self.max_seqlen)),
            place < self.cu_seqlens.diff()[:, None],
        )

    def unpad(self, padded: Tensor) -> Tensor:
        """What `padded` made of values [N, ...], brought back."""
        return padded.flatten(0, 1).index_select(0, self._padded_index)

    def nested(self, values: Tensor) -> Tensor:
        """Values per token [N, ...] as a nested tensor [B, *, ...] of layout `torch.jagged`, not copied."""
        return torch.nested.nested_tensor_from_jagged(
            values, self.cu_seqlens, max_seqlen=self.max_seqlen
        )

    def __getstate__(self) -> dict[str, Any]:
        # Without what is derived.
        return _mapped(self, _pickled)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: _changed(value, _unpickled) for name, value in state.items()})

    @cached_property
    def _by_group(self) -> Tensor:
        """int64 [N]: tokens modality by modality, band set by band set, each in frame and storage order."""
        group = (self.modality.long() << 8) + self.band_set
        return group.argsort(stable=True)

    @cached_property
    def _padded_index(self) -> Tensor:
        within = torch.arange(self.num_tokens, device=self.device)
        within = within - self.cu_seqlens.long().index_select(0, self.tile_of_token)
        return self.tile_of_token * self.max_seqlen + within

    @cached_property
    def _derived(self) -> dict[tuple[str | int, ...], Any]:
        return {}

    def _once(self, key: tuple[str | int, ...], make: Callable[[], Any]) -> Any:
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def _cell_index(self, modality: int) -> Tensor:
        frames = self.modalities[modality]
        tokens = self.token_index(modality, 0)
        y, x = self.positions[tokens, :2].long().unbind(1)
        order, position = cell_tables(frames.grid, self.device)
        first = self.frame[tokens] * order.numel() + position[y * frames.grid.cols + x]
        return runs(first, self.scales[tokens].long(), frames.num_covered)

    def _cells(self, modality: int, band_set: int) -> tuple[Tensor, Tensor]:
        frames = self.modalities[modality]
        index, grid = self.cell_index(modality), frames.grid
        frame, position = index // grid.num_cells, index % grid.num_cells
        row_major = cell_tables(grid, self.device)[0][position]
        at = (frame, row_major // grid.cols, row_major % grid.cols)
        chosen = frames.band_sets[band_set]
        return cut(chosen.pixels, grid, at), cut(chosen.valid[:, None], grid, at)[:, 0]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **_mapped(self, change))


def cumulative_lengths(lengths: Tensor) -> Tensor:
    """int32 [B + 1]: 0 and the running sum of `lengths` [B]."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def only_group(batch: TokenBatch, what: str) -> ModalityFrames:
    """The one modality of a batch of one band set; ConfigError, naming `what` needs it, for any other."""
    groups = [f"{m.name}/{s.name or 'first'}" for m in batch.modalities for s in m.band_sets]
    if len(groups) != 1:
        raise ConfigError(
            f"{what} takes one band set of one modality, the batch has {len(groups)} "
            f"({', '.join(groups)}); give TileDataset(modalities={{NAME: ['']}})"
        )
    return batch.modalities[0]


def _mapped(value: Any, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Every field of a dataclass with its tensors changed."""
    return {field.name: _changed(getattr(value, field.name), change) for field in fields(value)}


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    match value:
        case Tensor() | _Unsigned():
            return change(value)
        case BandSetPixels() | ModalityFrames() | LabelFrames():
            return replace(value, **_mapped(value, change))
        case tuple():
            return tuple(_changed(item, change) for item in value)
        case dict():
            return {name: _changed(item, change) for name, item in value.items()}
        case _:
            return value


@dataclass(frozen=True)
class _Unsigned:
    """A tensor of unsigned numbers, seen as signed ones."""

    signed: Tensor
    dtype: torch.dtype


def _pickled(tensor: Tensor) -> Tensor | _Unsigned:
    # torch writes tensors of these types, but cannot read them again.
    if tensor.dtype in SIGNED:
        return _Unsigned(tensor.view(SIGNED[tensor.dtype]), tensor.dtype)
    return tensor


def _unpickled(value: Tensor | _Unsigned) -> Tensor:
    return value.signed.view(value.dtype) if isinstance(value, _Unsigned) else value
