"""Which rows of a packed buffer are sequences and windows, against lists made token by token."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.batch import DECODER, MISSING, ONLINE, TARGET_ONLY
from model.packing import BandSetArrays, TileArrays, pack
from model.sequences import permute_rows, plan, windowed
from pipeline.errors import ConfigError


def with_height(tiles):
    """The tiles with a second band set, and with a static modality that the first tile lacks."""
    image, height = tiles.arrays(), tiles.arrays()
    (own,) = image.band_sets
    image.band_sets.append(BandSetArrays("20m", own.bands, own.pixels, own.valid, own.band_present))
    keep = np.flatnonzero((height.timestep == 0) & (height.tile > 0))
    height.band_sets = [
        BandSetArrays("", own.bands, *(x[keep] for x in (own.pixels, own.valid, own.band_present)))
    ]
    height.name, height.static = "height", True
    height.scales = np.concatenate([np.empty(0, np.uint8), *(tiles.frames.scales[f] for f in keep)])
    for field in ("counts", "tile", "timestep", "timestamps"):
        setattr(height, field, getattr(height, field)[keep])
    return pack(TileArrays(np.arange(tiles.num_tiles), [image, height]))


def masked(batch, seed):
    """Tokens of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([ONLINE, TARGET_ONLY, DECODER, MISSING], dtype=torch.uint8)
    drawn = torch.randint(0, 4, (batch.num_tokens,), generator=generator)
    return replace(batch, mask=kinds[drawn], masked=True)


@st.composite
def batches(draw, tilesets):
    batch = with_height(draw(tilesets))
    return masked(batch, draw(st.integers(0, 99))) if draw(st.booleans()) else batch


def expected_sequences(batch, per, see):
    """(tile, timestep) of every sequence, and its tokens."""
    members = {}
    if per == "tile":
        members = {(tile, -1): [] for tile in range(batch.num_tiles)}
    else:
        for m in batch.modalities:
            for tile, timestep in zip(m.tile.tolist(), m.timestep.tolist(), strict=True):
                members.setdefault((tile, -1 if m.static else timestep), [])
    kinds = {"online": {ONLINE}, "target": {ONLINE, TARGET_ONLY, DECODER}}[see]
    tile_of_token = batch.tile_of_token.tolist()
    for token in range(batch.num_tokens):
        if int(batch.mask[token]) in kinds:
            timestep = int(batch.positions[token, 3])
            if per == "tile" or batch.modalities[int(batch.modality[token])].static:
                timestep = -1
            members[tile_of_token[token], timestep].append(token)
    return dict(sorted(members.items()))


CHOICES = {
    "per": st.sampled_from(["tile", "date"]),
    "see": st.sampled_from(["online", "target"]),
    "num_prefix": st.integers(0, 2),
}


@settings(max_examples=150)
@given(data=st.data(), **CHOICES)
def test_a_plan_is_the_list_of_each_sequences_tokens(data, per, see, num_prefix, tilesets):
    batch = data.draw(batches(tilesets))
    expected = expected_sequences(batch, per, see)
    found = plan(batch, per, see, num_prefix)
    owners = zip(found.tile.tolist(), found.timestep.tolist(), strict=True)
    assert list(owners) == list(expected)
    tokens = torch.arange(batch.num_tokens)
    # Prefix tokens are numbered from -1 down.
    prefix = -1 - torch.arange(len(expected) * num_prefix).view(len(expected), num_prefix)
    buffer = found.put(found.see(tokens), prefix)
    parts = buffer.split(list(found.packed.lengths))
    rows = zip(prefix.tolist(), expected.values(), strict=True)
    assert [part.tolist() for part in parts] == [first + rest for first, rest in rows]
    assert found.packed.max_seqlen >= max(map(len, parts), default=0)
    again, prefix_again = found.take(buffer)
    assert torch.equal(again, found.see(tokens))
    assert torch.equal(prefix_again, prefix)
    if not batch.masked:
        assert found.visible is None


@given(data=st.data())
def test_without_masks_and_prefix_nothing_is_moved(data, tilesets):
    batch = with_height(data.draw(tilesets))
    found, tokens = plan(batch), torch.rand(batch.num_tokens, 3)
    assert found.put(tokens) is tokens
    assert found.take(tokens)[0].data_ptr() == tokens.data_ptr()
    assert found.packed.cu_seqlens is batch.cu_seqlens


def test_what_goes_through_the_buffer_has_its_gradient(make_tiles):
    batch = masked(with_height(make_tiles()), 0)
    found = plan(batch, "date", num_prefix=2)
    num_visible, shape = len(found.visible), (found.num_sequences, 2, 1)
    tokens = torch.rand(num_visible, 1, dtype=torch.float64, requires_grad=True)
    prefix = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_visible + prefix.numel(), 1, dtype=torch.float64)
    loss = (found.put(tokens, prefix) * weights).sum()
    of_tokens, of_prefix = torch.autograd.grad(loss, (tokens, prefix))
    assert torch.equal(of_tokens, found.take(weights)[0])
    assert torch.equal(of_prefix, found.take(weights)[1])
    everything = torch.rand(batch.num_tokens, 2, 3, requires_grad=True)
    (of_everything,) = torch.autograd.grad(found.see(everything).sum(), everything)
    assert of_everything.flatten(1).sum(1).eq(6 * batch.mask.eq(ONLINE)).all()
    order = torch.tensor([2, 0, 1])
    rows = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, order, order.argsort()), rows)


def test_prefix_tokens_are_not_turned(make_tiles):
    batch = masked(with_height(make_tiles()), 1)
    found = plan(batch, num_prefix=1)
    cos, sin = torch.rand(2, batch.num_tokens, 4)
    placed_cos, placed_sin = found.put_rotary(cos, sin)
    of_tokens, of_prefix = found.take(placed_cos)
    assert torch.equal(of_tokens, cos[found.visible])
    assert (of_prefix == 1).all()
    assert torch.equal(found.take(placed_sin)[0], sin[found.visible])
    assert not found.take(placed_sin)[1].any()


def test_a_tile_of_which_nothing_is_seen_has_an_empty_sequence(make_tiles):
    batch = make_tiles(tiles=[(1, 1.0), (2, 0.0)]).pack()
    assert plan(batch).packed.lengths[0] == 0
    assert plan(batch, num_prefix=2).packed.lengths[0] == 2
    hidden = replace(batch, mask=torch.full_like(batch.mask, DECODER), masked=True)
    assert plan(hidden).packed.lengths == (0, 0)
    assert len(plan(hidden).put(torch.rand(0, 5))) == 0
    assert plan(hidden, "date").packed.lengths == (0, 0, 0)
    assert plan(hidden, see="target").packed.lengths == plan(batch).packed.lengths


def expected_windows(batch, sequences, windows):
    """The tokens of every window that has any, and the prefix tokens of every sequence."""
    found = []
    for tokens in sequences.values():
        members = {}
        for token in tokens:
            grid = batch.modalities[int(batch.modality[token])].grid
            y, x = batch.positions[token, :2].tolist()
            square = (y * windows // grid.rows, x * windows // grid.cols)
            members.setdefault(square, []).append(token)
        found += members.values()
    return found


@settings(max_examples=100)
@given(data=st.data(), side=st.integers(1, 3), **CHOICES)
def test_windows_are_the_squares_of_every_sequence(data, side, per, see, num_prefix, make_tiles):
    tiles = make_tiles(
        seed=data.draw(st.integers(0, 99)),
        tiles=[(2, 0.3), (1, 0.0), (1, 1.0)],
        num_roots=data.draw(st.sampled_from([(side, side), (2 * side, side)])),
        num_scales=data.draw(st.integers(1, 3)),
    )
    batch = with_height(tiles)
    if data.draw(st.booleans()):
        batch = masked(batch, 5)
    sequences = plan(batch, per, see, num_prefix)
    tokens = torch.arange(batch.num_tokens)
    shape = (sequences.num_sequences, num_prefix)
    prefix = -1 - torch.arange(sequences.num_sequences * num_prefix).view(shape)
    buffer = sequences.put(sequences.see(tokens), prefix)
    cut = windowed(batch, sequences, side)
    inside = cut.enter(buffer)
    assert torch.equal(cut.leave(inside), buffer)
    lengths = list(cut.packed.lengths)
    assert lengths == sorted(lengths)
    expected = expected_windows(batch, expected_sequences(batch, per, see), side)
    expected += prefix.tolist() if num_prefix else []
    parts = [part.tolist() for part in inside.split(lengths) if len(part)]
    assert sorted(parts) == sorted(expected)


def test_a_root_in_several_windows_is_refused_in_words(make_tiles):
    batch = with_height(make_tiles(num_roots=(4, 2)))
    message = "windows is 4, but a tile of 'image' has 2 columns of roots.*give one of 1, 2"
    with pytest.raises(ConfigError, match=message) as refused:
        windowed(batch, plan(batch), 4)
    assert "\n" not in str(refused.value)


class CountingOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_planning_takes_the_same_operations_whatever_the_batch_holds(make_tiles):
    """Without masks no operation asks for a number either, so that nothing waits for a GPU."""
    counted = []
    for tiles in ([(1, 0.2), (1, 0.2)], [(3, 0.2)] * 20):
        batch = with_height(make_tiles(tiles=tiles, num_roots=(2, 2)))
        with CountingOps() as mode:
            found = plan(batch, num_prefix=1)
            cut = windowed(batch, found, 2)
            rows = found.put(torch.rand(batch.num_tokens, 4), torch.rand(batch.num_tiles, 1, 4))
            found.take(cut.leave(cut.enter(rows)))
        counted.append(mode.ops)
    assert counted[0] == counted[1]
    assert not [name for name in counted[0] if "nonzero" in name or "_local_scalar" in name]
