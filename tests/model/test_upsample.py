"""Tokens back on the base grid, against loops over leaves and pixels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.rows import run_lengths
from model.upsample import read_at_leaves, scatter_to_grid


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
def test_reading_at_the_leaves_gives_the_tokens_back(data, tilesets):
    batch = data.draw(tilesets).pack()
    tokens = token_numbers(batch)
    on_grid, _ = scatter_to_grid(tokens, batch)
    assert torch.equal(read_at_leaves(on_grid, batch), tokens)


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
    assert torch.equal(tokens.grad[:, 0], run_lengths(batch.scales).float())
    assert run_lengths(batch.scales).tolist() == [4**s for s in batch.scales.tolist()]
