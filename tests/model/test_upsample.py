"""Tokens back on the base grid, against loops over leaves and pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.upsample import read_at_leaves, scatter_to_grid, to_grid, tokens_at
from pipeline.errors import ConfigError


def token_numbers(batch):
    """[N, 2]: a recognisable vector per token, never zero."""
    number = torch.arange(1.0, batch.num_tokens + 1)
    return torch.stack([number, -number], dim=1)


@given(data=st.data())
def test_every_pixel_gets_the_token_of_the_leaf_over_it(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    p = tiles.grid.base_patch_size
    owner = torch.zeros(len(tiles.leaves), *tiles.grid.shape_px)
    for number, (frame, leaf) in enumerate(tiles.present(), start=1):
        owner[frame][leaf.window(p)] = number
    on_grid, covered = scatter_to_grid(token_numbers(batch), batch)
    for frame, row, col in torch.cartesian_prod(*(torch.arange(n) for n in covered.shape)).tolist():
        number = owner[frame, row * p, col * p]
        assert on_grid[frame, row, col].tolist() == [number, -number]
        assert bool(covered[frame, row, col]) == (number > 0)


@given(data=st.data())
def test_reading_at_the_leaves_gives_the_tokens_back(data, groupsets):
    groups = data.draw(groupsets)
    batch = groups.pack()
    tokens = token_numbers(batch)
    for m, b in groups.numbers:
        on_grid, _ = scatter_to_grid(tokens, batch, m, b)
        assert torch.equal(read_at_leaves(on_grid, batch, m, b), tokens[batch.token_index(m, b)])


@given(data=st.data())
def test_a_missing_leaf_is_zero_and_not_covered(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    on_grid, covered = scatter_to_grid(token_numbers(batch), batch)
    for frame, leaves in enumerate(tiles.leaves):
        for leaf in leaves:
            window = leaf.window(1)
            assert bool(covered[frame][window].all()) == (not leaf.missing)
            assert bool(covered[frame][window].any()) == (not leaf.missing)
            assert bool(on_grid[frame][window].any()) == (not leaf.missing)


def test_a_token_gets_one_gradient_per_cell_it_covers(make_tiles):
    batch = make_tiles().pack()
    tokens = token_numbers(batch).requires_grad_()
    scatter_to_grid(tokens, batch)[0].sum().backward()
    assert tokens.grad[:, 0].tolist() == [4**s for s in batch.scales.tolist()]


def most_timesteps(groups, modality):
    """Of the tiles that have a frame at all; 1 if none has."""
    return max([1, *groups.modalities[modality].frames_per_tile.tolist()])


def grid_by_hand(groups, modality):
    """[B, H, W, T, S, 2] and bool [B, H, W, T, S]."""
    grid = groups.modalities[modality].grid
    shape = (
        groups.num_tiles,
        grid.rows,
        grid.cols,
        most_timesteps(groups, modality),
        groups.band_sets[modality],
    )
    on_grid, covered = torch.zeros(*shape, 2), torch.zeros(shape, dtype=torch.bool)
    owner = groups.modalities[modality].tile_and_timestep
    for number, (m, b, frame, leaf) in enumerate(groups.tokens(), start=1):
        if m == modality:
            tile, timestep = owner[frame]
            for y, x in leaf.cells():
                on_grid[tile, y, x, timestep, b] = torch.tensor([number, -number])
                covered[tile, y, x, timestep, b] = True
    return on_grid, covered


@settings(max_examples=60)
@given(data=st.data())
def test_every_tile_date_and_band_set_lies_on_one_grid(data, groupsets):
    groups = data.draw(groupsets)
    batch = groups.pack()
    for m in range(len(groups.modalities)):
        on_grid, covered = to_grid(token_numbers(batch), batch, m)
        expected, there = grid_by_hand(groups, m)
        assert torch.equal(on_grid, expected)
        assert torch.equal(covered, there)
        by_name = to_grid(token_numbers(batch), batch, f"m{m}")
        assert torch.equal(by_name[0], on_grid)


@given(data=st.data())
def test_reading_the_grid_of_all_tiles_at_the_leaves_gives_the_tokens_back(data, groupsets):
    batch = data.draw(groupsets).pack()
    tokens = token_numbers(batch)
    y, x, _, timestep = batch.positions.long().unbind(1)
    for m in range(len(batch.modalities)):
        own = batch.modality == m
        at = (batch.tile_of_token, y, x, timestep, batch.band_set.long())
        on_grid, covered = to_grid(tokens, batch, m)
        place = tuple(axis[own] for axis in at)
        assert torch.equal(on_grid[place], tokens[own])
        assert covered[place].all()


@settings(max_examples=60)
@given(data=st.data())
def test_tokens_at_some_cells_are_those_of_the_grid(data, groupsets):
    groups = data.draw(groupsets)
    batch, tokens = groups.pack(), token_numbers(groups.pack())
    modality = data.draw(st.sampled_from(range(len(groups.modalities))))
    band_set = data.draw(st.integers(0, groups.band_sets[modality] - 1))
    on_grid, covered = to_grid(tokens, batch, modality)
    tiles, rows, cols, timesteps, _ = covered.shape
    cell = st.tuples(*(st.integers(0, n - 1) for n in (tiles, rows, cols, timesteps)))
    chosen = data.draw(st.lists(cell, max_size=20))
    cells = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 4)
    found, there = tokens_at(tokens, batch, modality, band_set, cells)
    at = (*cells.unbind(1), band_set)
    assert torch.equal(found, on_grid[at])
    assert torch.equal(there, covered[at])


def test_dates_no_frame_has_are_not_covered(make_groups):
    groups = make_groups(6, 3, [(3, 2, 2), (1, 1, 1)])
    batch = groups.pack()
    cells = torch.tensor([[0, 0, 0, 7], [0, 0, 0, -1], [2, 1, 1, 2]])
    found, there = tokens_at(token_numbers(batch), batch, "m0", 1, cells)
    assert not found.any()
    assert not there.any()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([9, 0, 0, 0], "tile 9, the batch has 3: give numbers from 0 to 2"),
        ([0, 99, 0, 0], "y 99, the batch has 4"),
        ([0, 0, -1, 0], "x -1, the batch has 8"),
    ],
)
def test_cells_outside_the_grid_are_refused_in_words(make_groups, cell, message):
    batch = make_groups(6, 3, [(3, 2, 2)]).pack()
    with pytest.raises(IndexError, match=message):
        tokens_at(token_numbers(batch), batch, "m0", 0, torch.tensor([[0, 0, 0, 0], cell]))


def test_a_modality_the_batch_lacks_is_refused_in_words(make_groups):
    batch = make_groups(6, 3, [(3, 2, 2), (1, 1, 1)]).pack()
    for unknown in ("s2", 2, -1):
        with pytest.raises(ConfigError, match=r"no modality .* it has m0, m1"):
            to_grid(token_numbers(batch), batch, unknown)


@settings(max_examples=20)
@given(data=st.data())
def test_gradients_are_those_of_copying_cell_by_cell(data, groupsets):
    """Of the grid, and of looking some of its cells up."""
    groups = data.draw(groupsets)
    batch = groups.pack()
    tokens = torch.randn(batch.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    for m, band_sets in enumerate(groups.band_sets):
        on_grid, covered = to_grid(tokens, batch, m)
        cells = torch.cartesian_prod(*(torch.arange(n) for n in covered.shape[:4])).view(-1, 4)
        weights = torch.randn(on_grid.shape, dtype=torch.float64)
        expected = torch.zeros_like(tokens)
        numbers = grid_by_hand(groups, m)[0][..., 0].long()
        for at in covered.nonzero().tolist():
            expected[numbers[tuple(at)] - 1] += weights[tuple(at)]
        loss = (on_grid * weights).sum()
        one_by_one = sum(
            (tokens_at(tokens, batch, m, b, cells)[0] * weights[..., b, :].flatten(0, 3)).sum()
            for b in range(band_sets)
        )
        for value in (loss, one_by_one):
            assert_close(torch.autograd.grad(value, tokens)[0], expected)
