"""Which tokens attend to each other: sequences of a batch's tokens in one packed buffer.

A sequence is what may see itself: the tokens of a tile, or those of one of its dates, as far as the mask
lets them be seen, with prefix tokens (class, registers, location) in front. Where everything is seen and
nothing put in front, the buffer is the batch's own order and nothing is moved.

Shape suffixes are those of `model.batch`; besides, V are visible tokens, S sequences, R prefix tokens of
each, and a packed buffer has V + S R rows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.attention import Packed
from model.batch import MISSING, ONLINE, TokenBatch, cumulative_lengths
from model.frames import ModalityFrames
from model.places import per_modality, select_once, starts
from pipeline.errors import ConfigError

Per = Literal["tile", "date"]
See = Literal["online", "target"]

# A tile and one of its timesteps (-1: static) as one number.
_TIMESTEPS = 1 << 32


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the tokens of a batch go in a packed buffer.

    - `visible` int64 [V]: the batch's tokens that are seen, ascending; None if all are.
    - `packed`: the sequences of the buffer, tile after tile, in each by timestep. Some may be empty.
    - `tile` int64 [S]: position of the sequence's tile in the batch. `timestep` int64 [S]: its date's
      number in the tile; -1 for a whole tile, and for the static modalities of one.
    - `num_prefix`: rows in front of every sequence.
    - `place` int64 [V + S R]: rows of the buffer where visible tokens go, then those of prefix tokens,
      sequence after sequence; None if tokens go where they are. `source`: its inverse.
    """

    visible: Tensor | None
    packed: Packed
    tile: Tensor
    timestep: Tensor
    num_prefix: int = 0
    place: Tensor | None = None
    source: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.tile.numel()

    def see(self, tokens_ND: Tensor) -> Tensor:
        """[V, ...]: what the batch's visible tokens have of values [N, ...]."""
        return tokens_ND if self.visible is None else select_once(tokens_ND, self.visible)

    def put(self, tokens_VD: Tensor, prefix_SRD: Tensor | None = None) -> Tensor:
        """The packed buffer [V + S R, ...] of values of visible tokens and of prefix tokens.

        `prefix_SRD` [S, R, ...] may be left out only if there are no prefix tokens.
        """
        rows = tokens_VD
        if prefix_SRD is not None:
            rows = torch.cat([rows, prefix_SRD.flatten(0, 1).to(rows.dtype)])
        if self.place is None or self.source is None:
            return rows
        return permute_rows(rows, self.source, self.place)

    def take(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """What `put` put there: values of visible tokens [V, ...] and of prefix tokens [S, R, ...]."""
        rows = buffer
        if self.place is not None and self.source is not None:
            rows = permute_rows(buffer, self.place, self.source)
        num_prefix = self.num_sequences * self.num_prefix
        tokens, prefix = rows.split([len(rows) - num_prefix, num_prefix])
        return tokens, prefix.view(self.num_sequences, self.num_prefix, *rows.shape[1:])

    def put_rotary(self, cos_NK: Tensor, sin_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [N, ...] of the batch's tokens as rows of the buffer; prefix tokens are not turned."""
        shape = (self.num_sequences, self.num_prefix, *cos_NK.shape[1:])
        return (
            self.put(self.see(cos_NK), cos_NK.new_ones(shape)),
            self.put(self.see(sin_NK), sin_NK.new_zeros(shape)),
        )


@dataclass(frozen=True, eq=False)
class Windows:
    """The rows of a packed buffer in another order, in which windows are sequences.

    `order` int64 [V + S R]: the buffer's row at every place of the new one. `inverse`: the way back.
    """

    order: Tensor
    inverse: Tensor
    packed: Packed

    def enter(self, rows: Tensor) -> Tensor:
        return permute_rows(rows, self.order, self.inverse)

    def leave(self, rows: Tensor) -> Tensor:
        return permute_rows(rows, self.inverse, self.order)


@torch.compiler.disable
def plan(
    batch: TokenBatch, per: Per = "tile", see: See = "online", num_prefix: int = 0
) -> Sequences:
    """The sequences of a batch.

    `per` "tile": one for every tile. "date": one for every tile and timestep that has a frame, and one of
    its static modalities. `see` "online": tokens whose mask is `ONLINE`; "target": all but `MISSING`.

    A batch without masks, per tile, is planned without waiting for a GPU.
    """
    visible = _visible(batch, see)
    owner_N, tile, timestep = _per_tile(batch) if per == "tile" else _per_date(batch)
    if per == "tile" and visible is None and not num_prefix:
        return Sequences(None, Packed(batch.cu_seqlens, batch.max_seqlen), tile, timestep)
    owner_V = owner_N if visible is None else owner_N.index_select(0, visible)
    cu_seqlens = cumulative_lengths(_counts(owner_V, tile.numel()) + num_prefix)
    # Before a token there are the prefix tokens of its own sequence and of those before.
    place_V = _ranks(owner_V) + num_prefix * (owner_V + 1)
    prefix = torch.arange(num_prefix, device=batch.device)
    place = torch.cat([place_V, (cu_seqlens[:-1, None] + prefix).flatten().long()])
    return Sequences(
        visible=visible,
        # No sequence is longer than a tile with all its tokens: a bound that nothing waits for.
        packed=Packed(cu_seqlens, batch.max_seqlen + num_prefix),
        tile=tile,
        timestep=timestep,
        num_prefix=num_prefix,
        place=place,
        source=_inverse(place),
    )


@torch.compiler.disable
def windowed(batch: TokenBatch, sequences: Sequences, windows: int) -> Windows:
    """Sequences cut into `windows x windows` squares of the tile.

    A window has the tokens of its square, whatever their modality, band set or date, as far as they are of
    one sequence; prefix tokens of a sequence are a window of their own. Windows of equal length lie side by
    side, so that one call of attention can serve them. `packed.max_seqlen` stays that of the sequences.

    Raises ConfigError if a root would lie in several windows.
    """
    for frames in batch.modalities:
        _check_windows(frames, windows)
    packed, squares = sequences.packed, windows**2
    of_tokens = sequences.see(_window_of_tokens(batch, windows))
    # The number behind those of the squares is the prefix tokens' window.
    shape = (sequences.num_sequences, sequences.num_prefix)
    of_rows = sequences.put(of_tokens, of_tokens.new_full(shape, squares))
    per_sequence = squares + bool(sequences.num_prefix)
    window = packed.sequence_of_row(of_rows.numel()) * per_sequence + of_rows
    counts = _counts(window, sequences.num_sequences * per_sequence)
    by_length = counts.argsort(stable=True)
    inverse = _ranks(_inverse(by_length)[window])
    new = Packed(cumulative_lengths(counts[by_length]), packed.max_seqlen)
    return Windows(_inverse(inverse), inverse, new)


def permute_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`rows[order]` for a permutation int64 [n] of the first axis and its inverse.

    Its gradient is a permutation too, not a sum as that of a look-up.
    """
    if torch.compiler.is_compiling():
        # Derived from what it sees, and the compiler warns of functions with a gradient of their own.
        return rows.index_select(0, order)
    permuted: Tensor = _Permute.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        return permute_rows(grad, inverse, order), None, None


def _visible(batch: TokenBatch, see: See) -> Tensor | None:
    if not batch.masked:
        return None
    seen = batch.mask == ONLINE if see == "online" else batch.mask != MISSING
    return seen.nonzero()[:, 0]


def _per_tile(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence of every token [N]; tile and timestep [S] of every sequence."""
    tile = torch.arange(batch.num_tiles, device=batch.device)
    return batch.tile_of_token, tile, torch.full_like(tile, -1)


def _per_date(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """As `_per_tile`."""
    of_frames = torch.cat([_tile_and_timestep(frames) for frames in batch.modalities])
    present, owner_of_frame = of_frames.unique(return_inverse=True)
    first_frame = starts(tuple(m.num_frames for m in batch.modalities), batch.device)
    frame = first_frame[batch.modality.long()] + batch.frame
    return owner_of_frame[frame], present // _TIMESTEPS, present % _TIMESTEPS - 1


def _tile_and_timestep(frames: ModalityFrames) -> Tensor:
    """int64 [F]: a number for the tile and timestep of every frame, ascending with both."""
    timestep = torch.full_like(frames.timestep, -1) if frames.static else frames.timestep
    return frames.tile * _TIMESTEPS + timestep + 1


def _window_of_tokens(batch: TokenBatch, windows: int) -> Tensor:
    """int64 [N]: the square of the tile each token lies in, row by row."""
    sides = tuple((m.grid.rows // windows, m.grid.cols // windows) for m in batch.modalities)
    side_N2 = per_modality(sides, batch.device).long()[batch.modality.long()]
    y, x = (batch.positions[:, :2] // side_N2).unbind(1)
    return y * windows + x


def _check_windows(frames: ModalityFrames, windows: int) -> None:
    grid = frames.grid
    sides = {"rows": grid.rows // grid.root_cells, "columns": grid.cols // grid.root_cells}
    for name, roots in sides.items():
        if roots % windows:
            fit = [str(n) for n in range(1, roots + 1) if not roots % n]
            raise ConfigError(
                f"windows is {windows}, but a tile of {frames.name!r} has {roots} {name} of roots, and a "
                f"root must lie in one window; give one of {', '.join(fit)}"
            )


def _counts(owner: Tensor, num_owners: int) -> Tensor:
    """int64 [num_owners]: how often each occurs in `owner`."""
    # bincount would wait for a GPU.
    return owner.new_zeros(num_owners).index_add(0, owner, torch.ones_like(owner))


def _ranks(keys: Tensor) -> Tensor:
    """int64 [n]: the place of every row when sorted by key, rows of one key staying in order."""
    return _inverse(keys.argsort(stable=True))


def _inverse(permutation: Tensor) -> Tensor:
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).index_copy(0, permutation, places)
