"""Rows of base cells in merging order, and coarse patches shrunk, against a reading leaf by leaf."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


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
