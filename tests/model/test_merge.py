"""Merging runs of base tokens, against convolutions over the 2-D grid."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from model.merge import RunMerge, average_runs

WIDTH = 6


def grid_of_vectors(tiles, seed=0):
    """Random [frame, D, row, col], and its rows [M, D] in the order of the batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(tiles.leaves), WIDTH, tiles.grid.rows, tiles.grid.cols)
    on_grid = torch.randn(shape, generator=generator)
    rows = [on_grid[f, :, y, x] for f, leaf in tiles.present() for y, x in leaf.cells()]
    return on_grid, torch.stack(rows) if rows else torch.empty(0, WIDTH)


def block_of(on_grid, frame, leaf):
    side = 2**leaf.scale
    return on_grid[frame, :, leaf.y : leaf.y + side, leaf.x : leaf.x + side]


def stacked(tokens):
    return torch.stack(tokens) if tokens else torch.empty(0, WIDTH)


def random_merge():
    torch.manual_seed(1)
    merge = RunMerge(WIDTH)
    nn.init.normal_(merge.combine.weight)
    nn.init.normal_(merge.combine.bias)
    return merge


@given(data=st.data())
def test_merging_is_a_recursive_2x2_convolution_with_stride_2(data, tilesets):
    tiles = data.draw(tilesets)
    on_grid, rows = grid_of_vectors(tiles)
    merge = random_merge()
    conv = nn.Conv2d(WIDTH, WIDTH, kernel_size=2, stride=2)
    with torch.no_grad():
        # [out, (y, x), in] to [out, in, y, x]
        conv.weight.copy_(merge.combine.weight.view(WIDTH, 2, 2, WIDTH).permute(0, 3, 1, 2))
        conv.bias.copy_(merge.combine.bias)
    expected = []
    for frame, leaf in tiles.present():
        block = block_of(on_grid, frame, leaf)
        for _ in range(leaf.scale):
            block = conv(block)
        expected.append(block[:, 0, 0])
    assert_close(merge(rows, tiles.pack()), stacked(expected), rtol=1e-4, atol=1e-4)


@given(data=st.data())
def test_a_fresh_merge_gives_the_mean_of_the_base_tokens(data, tilesets):
    tiles = data.draw(tilesets)
    on_grid, rows = grid_of_vectors(tiles)
    means = stacked([block_of(on_grid, f, leaf).mean((1, 2)) for f, leaf in tiles.present()])
    batch = tiles.pack()
    assert_close(RunMerge(WIDTH)(rows, batch), means, rtol=0, atol=1e-5)
    assert_close(average_runs(rows, batch), means, rtol=0, atol=1e-5)


def test_base_tokens_pass_unchanged(make_tiles):
    tiles = make_tiles(split_share=1.0)
    _, rows = grid_of_vectors(tiles)
    assert torch.equal(random_merge()(rows, tiles.pack()), rows)


def test_a_base_token_among_coarse_ones_passes_unchanged(make_tiles):
    tiles = make_tiles()
    on_grid, rows = grid_of_vectors(tiles)
    merged = random_merge()(rows, tiles.pack())
    base = [i for i, (_, leaf) in enumerate(tiles.present()) if leaf.scale == 0]
    assert 0 < len(base) < len(merged)
    for token in base:
        frame, leaf = tiles.present()[token]
        assert torch.equal(merged[token], on_grid[frame, :, leaf.y, leaf.x])


def test_one_convolution_serves_all_levels():
    assert sum(p.numel() for p in RunMerge(WIDTH).parameters()) == WIDTH * 4 * WIDTH + WIDTH


def test_every_base_row_gets_its_share_of_the_gradient(make_tiles):
    tiles = make_tiles()
    _, rows = grid_of_vectors(tiles)
    rows.requires_grad_()
    RunMerge(WIDTH)(rows, tiles.pack()).sum().backward()
    share = torch.tensor([4.0**-leaf.scale for _, leaf in tiles.present() for _ in leaf.cells()])
    assert_close(rows.grad, share[:, None].expand_as(rows))
