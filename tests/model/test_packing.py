"""What a packed batch holds, against a reading of the 2-D image square by square."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.merge import merge_runs
from model.packing import cumulative_lengths, merge_plan


@given(data=st.data())
def test_values_are_the_pixels_of_every_token_cell_by_cell(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    p = tiles.grid.base_patch_size
    cells = [(f, y, x) for f, leaf in tiles.present() for y, x in leaf.cells()]
    assert batch.values.shape == (len(cells), tiles.frames.pixels.shape[1], p, p)
    for row, (f, y, x) in enumerate(cells):
        window = np.s_[y * p : y * p + p, x * p : x * p + p]
        np.testing.assert_array_equal(batch.values[row].numpy(), tiles.frames.pixels[f][:, *window])
        np.testing.assert_array_equal(batch.valid[row].numpy(), tiles.frames.valid[f][window])


@given(data=st.data())
def test_cell_index_counts_cells_root_by_root_and_quarter_by_quarter(data, tilesets, roots_of):
    tiles = data.draw(tilesets)
    place = {cell: i for i, cell in enumerate(c for r in roots_of(tiles.grid) for c in r.cells())}
    expected = [
        f * len(place) + place[cell] for f, leaf in tiles.present() for cell in leaf.cells()
    ]
    assert tiles.pack().cell_index.tolist() == expected


@given(data=st.data())
def test_tokens_are_the_present_leaves_tile_after_tile(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    owner = tiles.tile_and_timestep
    expected = [[leaf.y, leaf.x, leaf.scale, owner[f][1]] for f, leaf in tiles.present()]
    assert batch.positions.tolist() == expected
    assert batch.scales.tolist() == [leaf.scale for _, leaf in tiles.present()]
    assert batch.frame_timestep.tolist() == [timestep for _, timestep in owner]
    tile_of_token = [owner[f][0] for f, _ in tiles.present()]
    counts = [tile_of_token.count(tile) for tile in range(tiles.num_tiles)]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(counts)]
    assert batch.max_seqlen == max(counts)
    assert (batch.num_tiles, batch.num_frames, batch.num_tokens) == (
        tiles.num_tiles,
        len(owner),
        sum(counts),
    )


def test_types_are_those_the_kernels_need(make_tiles):
    batch = make_tiles().pack()
    assert batch.cu_seqlens.dtype == batch.positions.dtype == torch.int32
    assert batch.cell_index.dtype == batch.token_order.dtype == torch.int64
    assert batch.values.dtype == torch.uint16
    assert batch.valid.dtype == torch.bool


def test_a_batch_of_one_hand_made_frame(make_tiles, roots_of):
    """Two roots of 2 x 2 cells of 1 px: the left one whole, the right one split."""
    tiles = make_tiles(tiles=[(1, 0.0)], num_roots=(1, 2), base_patch_size=1, num_scales=2)
    left, right = roots_of(tiles.grid)
    tiles = tiles.with_leaves([[left, *right.children()]])
    pixels = np.arange(24, dtype=np.uint16).reshape(1, 3, 2, 4)
    batch = tiles.with_pixels(pixels).pack()
    assert batch.values[:, 0, 0, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert batch.positions.tolist() == [
        [0, 0, 1, 0],
        [0, 2, 0, 0],
        [0, 3, 0, 0],
        [1, 2, 0, 0],
        [1, 3, 0, 0],
    ]
    assert batch.cu_seqlens.tolist() == [0, 5]
    assert batch.merge[0].rows.tolist() == [0, 1, 2, 3]
    assert batch.merge[0].finished.tolist() == [4, 5, 6, 7]
    assert batch.merge[1].finished.tolist() == [0]
    assert batch.token_order.tolist() == [4, 0, 1, 2, 3]


def test_merge_plan_of_three_scales_by_hand():
    plan, token_order = merge_plan(np.array([0, 2, 1, 0], np.uint8), 3)
    # Base rows: one of the first token, 16 of the second, 4 of the third, one of the last.
    assert plan[0].rows.tolist() == list(range(1, 21))
    assert plan[0].finished.tolist() == [0, 21]
    # Half-way rows: four of the second token, the third token itself.
    assert plan[1].rows.tolist() == [0, 1, 2, 3]
    assert plan[1].finished.tolist() == [4]
    assert plan[2].rows.tolist() == []
    assert plan[2].finished.tolist() == [0]
    # Finished in the order: first, last, third, second.
    assert token_order.tolist() == [0, 3, 2, 1]


class _OneOfFour(torch.nn.Module):
    """Passes a label on if all four children carry it."""

    def forward(self, children):
        assert torch.equal(children, children[:, :1].expand_as(children))
        return children[:, :1]


@given(scales=st.lists(st.integers(0, 3), max_size=30))
def test_merge_plan_brings_every_tokens_rows_together_and_no_others(scales):
    plan, token_order = merge_plan(np.array(scales, np.uint8), 4)
    token_of_row = np.repeat(np.arange(len(scales)), [4**s for s in scales])
    labels = torch.from_numpy(token_of_row)[:, None]
    merged = merge_runs(labels, plan, torch.from_numpy(token_order), _OneOfFour())
    assert merged[:, 0].tolist() == list(range(len(scales)))


@given(lengths=st.lists(st.integers(0, 1000), max_size=20))
def test_cumulative_lengths_is_a_running_sum_from_zero(lengths):
    cumulative = cumulative_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert cumulative.dtype == torch.int32
    assert cumulative.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_to_moves_every_tensor_and_keeps_the_rest(make_tiles):
    batch = make_tiles().pack()
    moved = batch.to("meta")
    levels = [tensor for level in moved.merge for tensor in (level.rows, level.finished)]
    tensors = [getattr(moved, field.name) for field in fields(moved)]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)] + levels
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.max_seqlen, moved.grid) == (batch.max_seqlen, batch.grid)


@pytest.mark.parametrize("missing", [0.0, 1.0])
def test_a_batch_without_or_with_only_missing_leaves(make_tiles, missing):
    tiles = make_tiles(tiles=[(2, missing), (1, missing)])
    batch = tiles.pack()
    covered = batch.cell_index.numel() / (tiles.grid.num_cells * batch.num_frames)
    assert covered == 1 - missing
    assert (batch.num_tokens == 0) == (missing == 1.0)
