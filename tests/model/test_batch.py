"""What a packed batch holds, against a reading of the 2-D image square by square."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import cumulative_lengths
from model.merge import merge_runs


@given(data=st.data())
def test_values_are_the_pixels_of_every_token_cell_by_cell(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    p = tiles.grid.base_patch_size
    cells = [(f, y, x) for f, leaf in tiles.present() for y, x in leaf.cells()]
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
    expected = [
        f * len(place) + place[cell] for f, leaf in tiles.present() for cell in leaf.cells()
    ]
    assert tiles.pack().cell_index(0).tolist() == expected


@given(data=st.data())
def test_tokens_are_the_present_leaves_tile_after_tile(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    owner = tiles.tile_and_timestep
    expected = [[leaf.y, leaf.x, leaf.scale, owner[f][1]] for f, leaf in tiles.present()]
    assert batch.positions.tolist() == expected
    assert batch.scales.tolist() == [leaf.scale for _, leaf in tiles.present()]
    (frames,) = batch.modalities
    assert frames.tile.tolist() == [tile for tile, _ in owner]
    assert frames.timestep.tolist() == [timestep for _, timestep in owner]
    assert batch.frame.tolist() == [f for f, _ in tiles.present()]
    tile_of_token = [owner[f][0] for f, _ in tiles.present()]
    counts = [tile_of_token.count(tile) for tile in range(tiles.num_tiles)]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(counts)]
    assert batch.max_seqlen == max(counts)
    assert (batch.num_tiles, frames.num_frames, batch.num_tokens) == (
        tiles.num_tiles,
        len(owner),
        sum(counts),
    )


def test_types_are_those_the_kernels_need(make_tiles):
    batch = make_tiles().pack()
    assert batch.cu_seqlens.dtype == batch.positions.dtype == torch.int32
    assert batch.cell_index(0).dtype == batch.merge.token_order.dtype == torch.int64
    values, valid = batch.cells(0, 0)
    assert (values.dtype, valid.dtype) == (torch.uint16, torch.bool)


def test_a_batch_of_one_hand_made_frame(make_tiles, roots_of):
    """Two roots of 2 x 2 cells of 1 px: the left one whole, the right one split."""
    tiles = make_tiles(tiles=[(1, 0.0)], num_roots=(1, 2), base_patch_size=1, num_scales=2)
    left, right = roots_of(tiles.grid)
    tiles = tiles.with_leaves([[left, *right.children()]])
    pixels = np.arange(24, dtype=np.uint16).reshape(1, 3, 2, 4)
    batch = tiles.with_pixels(pixels).pack()
    assert batch.cells(0, 0)[0][:, 0, 0, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert batch.positions.tolist() == [
        [0, 0, 1, 0],
        [0, 2, 0, 0],
        [0, 3, 0, 0],
        [1, 2, 0, 0],
        [1, 3, 0, 0],
    ]
    assert batch.cu_seqlens.tolist() == [0, 5]
    assert batch.merge.rows.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert batch.merge.finished == (4, 1)
    assert batch.merge.token_order.tolist() == [4, 0, 1, 2, 3]


class OneOfFour(torch.nn.Module):
    """Passes a label on if all four children carry it."""

    def forward(self, children):
        assert torch.equal(children, children[:, :1].expand_as(children))
        return children[:, :1]


@given(data=st.data())
def test_merging_brings_every_tokens_rows_together_and_no_others(data, tilesets):
    batch = data.draw(tilesets).pack()
    token_of_row = torch.arange(batch.num_tokens).repeat_interleave(4 ** batch.scales.long())
    merged = merge_runs(token_of_row[:, None], batch.merge, OneOfFour())
    assert merged[:, 0].tolist() == list(range(batch.num_tokens))


@given(lengths=st.lists(st.integers(0, 1000), max_size=20))
def test_cumulative_lengths_is_a_running_sum_from_zero(lengths):
    cumulative = cumulative_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert cumulative.dtype == torch.int32
    assert cumulative.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_to_moves_every_tensor_and_keeps_the_rest(make_tiles):
    batch = make_tiles().pack()
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert len(tensors_of(moved)) == len(tensors_of(batch)) == 14
    assert (moved.max_seqlen, moved.modalities[0].grid) == (
        batch.max_seqlen,
        batch.modalities[0].grid,
    )


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        return tensors_of([getattr(value, field.name) for field in fields(value)])
    if isinstance(value, dict):
        return tensors_of(list(value.values()))
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


@pytest.mark.parametrize("missing", [0.0, 1.0])
def test_a_batch_without_or_with_only_missing_leaves(make_tiles, missing):
    tiles = make_tiles(tiles=[(2, missing), (1, missing)])
    batch = tiles.pack()
    covered = batch.cell_index(0).numel() / (tiles.grid.num_cells * 3)
    assert covered == 1 - missing
    assert (batch.num_tokens == 0) == (missing == 1.0)
