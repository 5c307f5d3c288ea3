"""Rows of base cells in merging order, and coarse patches shrunk, against a reading leaf by leaf."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.masks import with_cell_masks
from model.merge import RunMerge
from model.packing import BandSetArrays, FrameArrays, TileArrays, pack
from model.upsample import to_grid, tokens_at
from pipeline.grid import BaseGrid


@given(data=st.data())
def test_values_are_the_pixels_of_every_token_cell_by_cell(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    p = tiles.grid.base_patch_size
    cells = tiles.rows()
    values, valid = batch.cells(0, 0)
    assert values.shape == (len(cells), tiles.frames.pixels.shape[1], p, p)
    for row, (f, y, x) in enumerate(cells):
        window = np.s_[y * p : y * p + p, x * p : x * p + p]
        np.testing.assert_array_equal(values[row].numpy(), tiles.frames.pixels[f][:, *window])
        np.testing.assert_array_equal(valid[row].numpy(), tiles.frames.valid[f][window])


@given(data=st.data())
def test_cell_index_counts_cells_root_by_root_and_quarter_by_quarter(data, tilesets, roots_of):
    tiles = data.draw(tilesets)
    place = {cell: i for i, cell in enumerate(c for r in roots_of(tiles.grid) for c in r.cells())}
    batch, rows = tiles.pack(), tiles.rows()
    assert batch.cell_index(0).tolist() == [f * len(place) + place[y, x] for f, y, x in rows]
    row_major = [(f * tiles.grid.rows + y) * tiles.grid.cols + x for f, y, x in rows]
    assert batch.cell_places(0).tolist() == row_major


@pytest.mark.parametrize("px", [3, 6, 12])
def test_cells_that_hold_no_whole_number_of_pixels_take_the_nearest(px):
    """A base grid of 4 cells over 3, 6 and 12 px: each px of a cell takes the pixel below its centre."""
    grid = BaseGrid(4, 4, 2, 1)
    pixels = np.arange(px * px, dtype=np.uint16).reshape(1, 1, px, px)
    shown = BandSetArrays("60m", ("B9",), pixels, pixels[0] % 5 > 0, np.ones((1, 1), bool))
    frames = FrameArrays(
        "optical", grid, [shown], np.zeros(16, np.uint8), np.array([16]), np.array([0]),
        np.array([0]), np.full((1, 3), -1, np.int32),
    )  # fmt: skip
    values, valid = pack(TileArrays(np.array([0]), [frames])).cells(0, 0)
    p = -(-px // 4)
    assert values.shape == (16, 1, p, p)
    at = np.floor((np.arange(4 * p) + 0.5) * px / (4 * p)).astype(int)
    whole = pixels[0, 0][np.ix_(at, at)]
    for number in range(16):
        y, x = grid.cell_yx[number] * p
        np.testing.assert_array_equal(values[number, 0].numpy(), whole[y : y + p, x : x + p])
        np.testing.assert_array_equal(valid[number], whole[y : y + p, x : x + p] % 5 > 0)
    assert set(at.tolist()) == set(range(px))


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


def derived(batch):
    for m, frames in enumerate(batch.modalities):
        for b in range(len(frames.band_sets)):
            batch.cells(m, b)
            batch.covering(m, b)
        batch.cells(m, 0, scale=1)
    assert batch.merge.token_order.numel()
    batch.padded(batch.scales)


def there_and_back(batch, merge):
    """Merging, its gradient, and everything that brings tokens to cells and masks to tokens."""
    device = batch.device
    rows = [
        torch.ones(frames.num_covered, 4, requires_grad=True, device=device)
        for frames in batch.modalities
        for _ in frames.band_sets
    ]
    merge.zero_grad()
    tokens = merge(rows, batch, torch.ones(batch.num_tokens, 4, device=device))
    cells = torch.zeros(5, 4, dtype=torch.int64, device=device)
    for m, frames in enumerate(batch.modalities):
        to_grid(tokens, batch, m)[0].sum().backward(retain_graph=True)
        tokens_at(tokens, batch, m, 0, cells)
        shape = (frames.num_frames, frames.grid.rows, frames.grid.cols)
        mask = torch.zeros(shape, dtype=torch.uint8, device=device)
        with_cell_masks(batch, {frames.name: mask})


def test_the_operations_are_the_same_whatever_the_batch_holds(make_groups):
    counted = []
    merge = RunMerge(4, init="zero")
    for num_tiles in (4, 30):
        groups = make_groups(11, num_tiles, [(3, 2, 2), (2, 1, 2)])
        derived(groups.pack())  # tables of the grid are made once
        batch = groups.pack()
        with CountingOps() as deriving:
            derived(batch)
        with CountingOps() as using:
            there_and_back(batch, merge)
        counted.append((deriving.ops, using.ops))
    assert counted[0] == counted[1]
    total = sum(sum(ops.values()) for ops in counted[0])
    print(f"{total} operations for 4 tiles as for 30")


def test_nothing_asks_a_device_for_a_number(make_groups):
    """A GPU would have to be waited for. The meta device has no numbers, and mixes with no other."""
    batch = make_groups(11, 4, [(3, 2, 2), (2, 1, 2)]).pack().to("meta")
    derived(batch)
    there_and_back(batch, RunMerge(4, init="zero").to("meta"))
