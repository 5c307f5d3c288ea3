"""Packed batches: tiles of any token count side by side, without padding.

A batch carries whole frames and one row of small numbers per token. Whatever has a row per base cell is
derived from these on the batch's own device, at first use, in a number of operations that does not depend
on how much the batch holds.

Shape suffixes used in this package:

- N = tokens, B = tiles, F = frames of a modality, C = bands of a band set
- M = base cells of tokens, P = a base cell's side in px of a band set
- D = model width, H = heads, K = head width
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from model.cells import SIGNED, cell_tables, cut, shrink
from model.frames import BandSetPixels, LabelFrames, ModalityFrames
from model.rows import MergePlan, merge_plan, repeated, runs
from pipeline.errors import ConfigError

# Values of `TokenBatch.mask`: who sees a token.
ONLINE, TARGET_ONLY, DECODER, MISSING = range(4)


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
    - `masked`: whether a token may be other than `ONLINE`; where it is False, nobody reads `mask`.
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
    masked: bool = False

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

    def modality_number(self, modality: int | str) -> int:
        """Position in `modalities` of one given by its name, or by that; ConfigError for an unknown one."""
        names = [frames.name for frames in self.modalities]
        if modality in names:
            return names.index(str(modality))
        if isinstance(modality, int) and 0 <= modality < len(names):
            return modality
        raise ConfigError(
            f"no modality {modality!r} in this batch; it has {', '.join(names)}: give one of these names"
        )

    def token_index(self, modality: int, band_set: int) -> Tensor:
        """int64 [n]: positions of one band set's tokens among all, in frame and storage order."""
        return self._by_group[self._of_group(modality, band_set)]

    def tokens_by_scale(self, modality: int, band_set: int, scale: int | None = None) -> Tensor:
        """int64 [n]: positions of one band set's tokens among all, in merging order, or those of a scale.

        That is by scale, and within a scale in frame and storage order.
        """
        tokens = self._by_group_and_scale[self._of_group(modality, band_set)]
        if scale is None:
            return tokens
        frames = self.modalities[modality]
        return tokens[frames.tokens_below(scale) : frames.tokens_below(scale + 1)]

    def token_rows(self, modality: int, band_set: int) -> Tensor:
        """int64 [M]: position among all tokens of the one every base row belongs to, in merging order."""
        key = ("token_rows", modality, band_set)
        return self._once(key, lambda: self._token_rows(modality, band_set))

    def cell_index(self, modality: int) -> Tensor:
        """int64 [M]: frame * cells per frame + storage position of every base cell of a modality's tokens.

        Rows are in merging order (`model.rows`): those of tokens of scale 0, then of scale 1, and so on; a
        token of scale `s` owns `4**s` neighbours. The same in all band sets of the modality.
        """
        return self._once(("cell_index", modality), lambda: self._cell_index(modality))

    def cell_places(self, modality: int) -> Tensor:
        """int64 [M]: as `cell_index`, with the cell's row-major index in place of its storage position."""
        return self._once(("cell_places", modality), lambda: self._cell_places(modality))

    def covering(self, modality: int, band_set: int) -> Tensor:
        """int64 [F, rows, cols]: the token over every base cell; `num_tokens` where none is."""
        key = ("covering", modality, band_set)
        return self._once(key, lambda: self._covering(modality, band_set))

    def cells(
        self, modality: int, band_set: int, scale: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels [M, C, P, P] and validity [M, P, P] of the base cells in `cell_index`'s order.

        A cell has `P = ceil(r)` px a side, `r` being its side in px of the band set. Where `r` is no
        whole number, cells share pixels, and each px takes the pixel in which its centre lies.

        With a `scale`: float32 [n, C, P, P] and bool [n, P, P] of that scale's tokens in the order of
        `tokens_by_scale`, each shrunk to P x P px. A px is the mean of the valid ones it is made of.
        """
        if scale is not None:
            return self._shrunk_cells(modality, band_set, scale)
        key = ("cells", modality, band_set)
        return self._once(key, lambda: self._cells(modality, band_set))

    @cached_property
    def merge(self) -> MergePlan:
        """How base rows of all modalities and band sets become tokens."""
        per_scale = [m.tokens_per_scale for m in self.modalities for _ in m.band_sets]
        by_scale = (self.scales.long() << 16) + self._group
        return merge_plan(per_scale, by_scale.argsort(stable=True))

    def with_mask(self, mask: Tensor) -> Self:
        """The same tokens seen by others: `mask` uint8 [N]. What is derived of the batch is kept.

        `model.masks` makes masks from those of cells.
        """
        changed = replace(self, mask=mask, masked=True)
        # Nothing derived here depends on the mask.
        kept = {name: value for name, value in vars(self).items() if name not in vars(changed)}
        vars(changed).update(kept)
        return changed

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
    def _group(self) -> Tensor:
        """int64 [N]: a number that counts modalities and, in each, band sets."""
        return (self.modality.long() << 8) + self.band_set

    @cached_property
    def _by_group(self) -> Tensor:
        """int64 [N]: tokens modality by modality, band set by band set, each in frame and storage order."""
        return self._group.argsort(stable=True)

    @cached_property
    def _by_group_and_scale(self) -> Tensor:
        """int64 [N]: as `_by_group`, but each in merging order."""
        return ((self._group << 8) + self.scales).argsort(stable=True)

    def _of_group(self, modality: int, band_set: int) -> slice:
        """Where a band set's tokens are in `_by_group` and `_by_group_and_scale`."""
        first = 0
        for m, frames in enumerate(self.modalities):
            for b in range(len(frames.band_sets)):
                if (m, b) == (modality, band_set):
                    return slice(first, first + frames.num_tokens)
                first += frames.num_tokens
        raise IndexError(f"no band set {band_set} of modality {modality} in this batch")

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

    def _token_rows(self, modality: int, band_set: int) -> Tensor:
        tokens = self.tokens_by_scale(modality, band_set)
        return repeated(tokens, self.modalities[modality].tokens_per_scale)

    def _cell_index(self, modality: int) -> Tensor:
        frames = self.modalities[modality]
        tokens = self.tokens_by_scale(modality, 0)
        y, x = self.positions[tokens, :2].long().unbind(1)
        order, position = cell_tables(frames.grid, self.device)
        first = self.frame[tokens] * order.numel() + position[y * frames.grid.cols + x]
        return runs(first, frames.tokens_per_scale)

    def _cell_places(self, modality: int) -> Tensor:
        index, grid = self.cell_index(modality), self.modalities[modality].grid
        position = index % grid.num_cells
        return index - position + cell_tables(grid, self.device)[0][position]

    def _covering(self, modality: int, band_set: int) -> Tensor:
        frames = self.modalities[modality]
        shape = (frames.num_frames, frames.grid.rows, frames.grid.cols)
        nothing = torch.full((math.prod(shape),), self.num_tokens, device=self.device)
        rows = self.token_rows(modality, band_set)
        return nothing.index_copy(0, self.cell_places(modality), rows).view(shape)

    def _cells(self, modality: int, band_set: int) -> tuple[Tensor, Tensor]:
        places, grid = self.cell_places(modality), self.modalities[modality].grid
        chosen = self.modalities[modality].band_sets[band_set]
        return cut(chosen.pixels, grid, places), cut(chosen.valid[:, None], grid, places)[:, 0]

    def _shrunk_cells(self, modality: int, band_set: int, scale: int) -> tuple[Tensor, Tensor]:
        rows = [n * 4**s for s, n in enumerate(self.modalities[modality].tokens_per_scale)]
        first, end = sum(rows[:scale]), sum(rows[: scale + 1])
        pixels, valid = self.cells(modality, band_set)
        return shrink(pixels[first:end], valid[first:end], scale)

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
