"""Rows of base cells in merging order, and coarse patches shrunk, against a reading leaf by leaf."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.masks import with_cell_masks
from model.merge import RunMerge
from model.upsample import to_grid, tokens_at


def shrunk_by_hand(groups, m, b, f, leaf, p):
    """Pixels [C, p, p] and validity [p, p] of a leaf's patch, px by px."""
    frames, side = groups.modalities[m].frames, 2**leaf.scale
    pixels = frames.pixels[f][:, *leaf.window(p)].astype(np.float64) + b
    valid = frames.valid[f][leaf.window(p)]
    values, there = np.zeros((len(pixels), p, p)), np.zeros((p, p), bool)
    for y, x in np.ndindex(p, p):
        square = np.s_[y * side : (y + 1) * side, x * side : (x + 1) * side]
        there[y, x] = valid[square].any()
        if there[y, x]:
            values[:, y, x] = pixels[:, *square][:, valid[square]].mean(1)
    return values, there


@settings(max_examples=40)
@given(data=st.data())
def test_coarse_tokens_are_shrunk_to_patches_of_base_size(data, groupsets):
    groups = data.draw(groupsets)
    batch = groups.pack()
    tokens = groups.tokens()
    for m, b in groups.numbers:
        grid = groups.modalities[m].grid
        for scale in range(grid.num_scales):
            values, valid = batch.cells(m, b, scale=scale)
            at = batch.tokens_by_scale(m, b, scale).tolist()
            assert (values.dtype, valid.dtype) == (torch.float32, torch.bool)
            assert len(values) == len(valid) == len(at)
            for row, number in enumerate(at):
                *group, f, leaf = tokens[number]
                assert (group, leaf.scale) == ([m, b], scale)
                expected = shrunk_by_hand(groups, m, b, f, leaf, grid.base_patch_size)
                np.testing.assert_allclose(values[row], expected[0], rtol=1e-6)
                np.testing.assert_array_equal(valid[row], expected[1])


def test_shrinking_looks_at_no_invalid_pixel(make_tiles):
    """Not even at one that is no number."""
    tiles = make_tiles()
    junk = np.where(tiles.frames.valid[:, None], tiles.frames.pixels, np.float32(np.nan))
    junk = tiles.with_pixels(junk.astype(np.float32)).pack()
    assert junk.modalities[0].tokens_per_scale[2]
    for scale in range(3):
        found, expected = (of.cells(0, 0, scale=scale) for of in (junk, tiles.pack()))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@settings(max_examples=40)
@given(data=st.data())
def test_rows_of_every_group_belong_to_its_tokens(data, groupsets):
    groups = data.draw(groupsets)
    batch, tokens = groups.pack(), groups.tokens()
    for m, b in groups.numbers:
        tiles = groups.modalities[m]
        of_group = [i for i, token in enumerate(tokens) if token[:2] == (m, b)]
        assert batch.token_index(m, b).tolist() == of_group
        in_order = sorted(of_group, key=lambda i: tokens[i][3].scale)
        assert batch.tokens_by_scale(m, b).tolist() == in_order
        rows = [i for i in in_order for _ in range(4 ** tokens[i][3].scale)]
        assert batch.token_rows(m, b).tolist() == rows
        covering = np.full((len(tiles.leaves), tiles.grid.rows, tiles.grid.cols), len(tokens))
        for i in of_group:
            for y, x in tokens[i][3].cells():
                covering[tokens[i][2], y, x] = i
        np.testing.assert_array_equal(batch.covering(m, b), covering)
        timesteps = [1, *tiles.frames_per_tile.tolist()]
        assert batch.modalities[m].num_timesteps == max(timesteps)


class CountingOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def there_and_back(batch, merge):
    """Merging, its gradient, and everything that brings tokens to cells and masks to tokens."""
    rows = [
        torch.ones(frames.num_covered, 4, requires_grad=True)
        for frames in batch.modalities
        for _ in frames.band_sets
    ]
    tokens = merge(rows, batch, torch.ones(batch.num_tokens, 4))
    cells = torch.zeros(5, 4, dtype=torch.int64)
    for m, frames in enumerate(batch.modalities):
        to_grid(tokens, batch, m)[0].sum().backward(retain_graph=True)
        tokens_at(tokens, batch, m, 0, cells)
        batch.cells(m, 0, scale=1)
        mask = torch.zeros(frames.num_frames, frames.grid.rows, frames.grid.cols, dtype=torch.uint8)
        with_cell_masks(batch, {frames.name: mask})


def test_the_operations_are_the_same_whatever_the_batch_holds(make_groups):
    counted = []
    merge = RunMerge(4, init="zero")
    for num_tiles in (4, 30):
        groups = make_groups(11, num_tiles, [(3, 2, 2), (2, 1, 2)])
        there_and_back(groups.pack(), merge)  # tables of the grid are made once
        with CountingOps() as mode:
            there_and_back(groups.pack(), merge)
        counted.append(mode.ops)
    assert counted[0] == counted[1]
    assert not [name for name in counted[0] if "nonzero" in name]
    print(f"{sum(counted[0].values())} operations for 4 tiles as for 30")
