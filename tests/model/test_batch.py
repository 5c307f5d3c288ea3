"""What a packed batch holds, against a reading of the 2-D image square by square."""

import pickle
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import ONLINE, cumulative_lengths
from model.merge import average_runs
from model.packing import BandSetArrays, FrameArrays, TileArrays, pack
from pipeline.grid import BaseGrid


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
    assert batch.cell_index(0).dtype == batch.token_rows(0, 0).dtype == torch.int64
    assert batch.merge.token_order.dtype == torch.int64
    values, valid = batch.cells(0, 0)
    assert (values.dtype, valid.dtype) == (torch.uint16, torch.bool)


def test_a_batch_of_one_hand_made_frame(make_tiles, roots_of):
    """Two roots of 2 x 2 cells of 1 px: the left one whole, the right one split."""
    tiles = make_tiles(tiles=[(1, 0.0)], num_roots=(1, 2), base_patch_size=1, num_scales=2)
    left, right = roots_of(tiles.grid)
    tiles = tiles.with_leaves([[left, *right.children()]])
    pixels = np.arange(24, dtype=np.uint16).reshape(1, 3, 2, 4)
    batch = tiles.with_pixels(pixels).pack()
    assert batch.cells(0, 0)[0][:, 0, 0, 0].tolist() == [2, 3, 6, 7, 0, 1, 4, 5]
    assert batch.positions.tolist() == [
        [0, 0, 1, 0],
        [0, 2, 0, 0],
        [0, 3, 0, 0],
        [1, 2, 0, 0],
        [1, 3, 0, 0],
    ]
    assert batch.cu_seqlens.tolist() == [0, 5]
    assert batch.token_rows(0, 0).tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert batch.covering(0, 0).tolist() == [[[0, 0, 1, 2], [0, 0, 3, 4]]]
    assert batch.merge.finished == (4, 1)
    assert batch.merge.token_order.tolist() == [4, 0, 1, 2, 3]


@given(lengths=st.lists(st.integers(0, 1000), max_size=20))
def test_cumulative_lengths_is_a_running_sum_from_zero(lengths):
    cumulative = cumulative_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert cumulative.dtype == torch.int32
    assert cumulative.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_to_moves_every_tensor_and_keeps_the_rest(make_tiles):
    batch = make_tiles().pack()
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert len(tensors_of(moved)) == len(tensors_of(batch)) == 15
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


def hand_made():
    """Two tiles of two modalities: tile 0 has two dates of "optical" in two band sets, tile 1 one of it,
    all missing, and one frame of "radar", with tokens at two of its four cells."""
    optical, radar = BaseGrid(2, 2, 2, 2), BaseGrid(2, 2, 1, 1)
    fine = np.arange(3 * 2 * 16, dtype=np.uint16).reshape(3, 2, 4, 4)
    coarse = (1000 + np.arange(3 * 4)).astype(np.float64).reshape(3, 1, 2, 2)
    gone = 0x80
    return TileArrays(
        np.array([7, 3]),
        [
            FrameArrays(
                "optical",
                optical,
                [
                    BandSetArrays("", ("B2", "B3"), fine, fine[:, 0] < 90, np.ones((3, 2), bool)),
                    BandSetArrays("20m", ("B5",), coarse, coarse[:, 0] > 0, np.ones((3, 1), bool)),
                ],
                scales=np.array([1, 0, gone, 0, 0, 1 | gone], np.uint8),
                counts=np.array([1, 4, 1]),
                tile=np.array([0, 0, 1]),
                timestep=np.array([0, 2, 1]),
                timestamps=np.array([[1, 0, 2020], [-1, -1, -1], [31, 11, 2021]], np.int32),
            ),
            FrameArrays(
                "radar",
                radar,
                [
                    BandSetArrays(
                        "",
                        ("VV",),
                        np.full((1, 1, 2, 2), -9, np.int16),
                        np.ones((1, 2, 2), bool),
                        np.ones((1, 1), bool),
                    )
                ],
                scales=np.array([0, gone, 0, gone], np.uint8),
                counts=np.array([4]),
                tile=np.array([1]),
                timestep=np.array([0]),
                timestamps=np.full((1, 3), -1, np.int32),
            ),
        ],
        labels={"crop": np.array([[5], [6]])},
    )


def test_a_batch_of_two_modalities_two_dates_and_two_band_sets():
    batch = pack(hand_made())
    assert batch.cu_seqlens.tolist() == [0, 8, 10]
    assert (batch.max_seqlen, batch.num_tiles, batch.num_tokens) == (8, 2, 10)
    assert batch.tile_indices.tolist() == [7, 3]
    assert batch.modality.tolist() == [0] * 8 + [1] * 2
    assert batch.band_set.tolist() == [0] * 4 + [1] * 4 + [0] * 2
    assert batch.frame.tolist() == [0, 1, 1, 1] * 2 + [0, 0]
    assert batch.scales.tolist() == [1, 0, 0, 0] * 2 + [0, 0]
    of_tile_0 = [[0, 0, 1, 0], [0, 0, 0, 2], [1, 0, 0, 2], [1, 1, 0, 2]]
    assert batch.positions.tolist() == of_tile_0 * 2 + [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.mask.tolist() == [ONLINE] * 10
    assert batch.tile_of_token.tolist() == [0] * 8 + [1] * 2
    optical, radar = batch.modalities
    assert (optical.tokens_per_scale, radar.tokens_per_scale) == ((3, 1), (2,))
    assert optical.timestamps.tolist() == [[1, 0, 2020], [-1, -1, -1], [31, 11, 2021]]
    unknown = [-1, -1, -1]
    of_tile_0 = [[1, 0, 2020], unknown, unknown, unknown]
    assert batch.timestamps.tolist() == of_tile_0 * 2 + [unknown] * 2
    assert batch.labels["crop"].tolist() == [[5], [6]]


def test_cells_of_a_hand_made_batch():
    batch = pack(hand_made())
    assert batch.cell_index(0).tolist() == [4, 6, 7, 0, 1, 2, 3]
    assert batch.cell_index(1).tolist() == [0, 2]
    pixels, valid = batch.cells(0, 0)
    first = [[0, 1], [4, 5]]
    assert pixels[3].tolist() == [first, [[16 + n for n in row] for row in first]]
    assert pixels[1, 0].tolist() == [[40, 41], [44, 45]]
    assert pixels.dtype == torch.uint16
    assert valid.all()
    assert batch.cells(0, 1)[0].flatten().tolist() == [1004, 1006, 1007, 1000, 1001, 1002, 1003]
    assert batch.cells(1, 0)[0].flatten().tolist() == [-9, -9]
    assert batch.token_index(0, 1).tolist() == [4, 5, 6, 7]
    assert batch.tokens_by_scale(0, 1).tolist() == [5, 6, 7, 4]
    assert batch.tokens_by_scale(0, 1, 1).tolist() == [4]
    assert batch.token_rows(0, 1).tolist() == [5, 6, 7, 4, 4, 4, 4]
    assert [m.num_timesteps for m in batch.modalities] == [3, 1]
    assert batch.merge.tokens_per_scale == ((3, 1), (3, 1), (2, 0))
    assert batch.merge.finished == (8, 2)
    assert batch.merge.token_order.tolist() == [8, 0, 1, 2, 9, 3, 4, 5, 6, 7]


def several(tiles):
    """The tiles as two modalities: "image" in two band sets, and "other", which lacks the first tile."""
    one, other = tiles.arrays(), tiles.arrays()
    coarse = np.ascontiguousarray(tiles.frames.pixels[:, :1, :: tiles.grid.base_patch_size])
    coarse = np.ascontiguousarray(coarse[..., :: tiles.grid.base_patch_size]).astype(np.float32)
    whole = np.ones((len(coarse), *coarse.shape[2:]), bool)
    one.band_sets.append(
        BandSetArrays("coarse", ("C",), coarse, whole, np.ones((len(coarse), 1), bool))
    )
    keep = np.flatnonzero(other.tile > 0)
    (band_set,) = other.band_sets
    other = FrameArrays(
        "other",
        other.grid,
        [BandSetArrays("", band_set.bands, band_set.pixels[keep], band_set.valid[keep],
                       band_set.band_present[keep])],
        np.concatenate([np.empty(0, np.uint8), *(tiles.frames.scales[f] for f in keep)]),
        other.counts[keep],
        other.tile[keep],
        other.timestep[keep],
        other.timestamps[keep],
    )  # fmt: skip
    return TileArrays(np.arange(tiles.num_tiles), [one, other])


def stored_cells(batch):
    """Pixels and validity of the first band set's cells, frame after frame in storage order."""
    order = batch.cell_index(0).argsort()
    return [part[order] for part in batch.cells(0, 0)]


GROUPS = ((0, 0), (0, 1), (1, 0))


@settings(max_examples=60)
@given(data=st.data())
def test_tokens_come_tile_by_tile_modality_by_modality_set_by_set(data, tilesets):
    tiles = data.draw(tilesets)
    batch = pack(several(tiles))
    owner = tiles.tile_and_timestep
    skipped = int(tiles.frames_per_tile[0])
    expected = []
    for tile in range(tiles.num_tiles):
        for m, b in GROUPS:
            for f, leaf in tiles.present():
                if owner[f][0] == tile and not (m and tile == 0):
                    expected.append((m, b, f - m * skipped, leaf.y, leaf.x, leaf.scale))
    found = torch.column_stack(
        [batch.modality, batch.band_set, batch.frame, batch.positions[:, :3].long()]
    )
    assert [tuple(row) for row in found.tolist()] == expected
    for m, b in GROUPS:
        at = batch.token_index(m, b)
        assert at.tolist() == [i for i, row in enumerate(expected) if row[:2] == (m, b)]


@settings(max_examples=60)
@given(data=st.data())
def test_merging_all_groups_at_once_is_merging_each(data, tilesets):
    """One plan brings the cells of every group's tokens together, into the batch's order."""
    batch = pack(several(data.draw(tilesets)))
    rows = [batch.token_rows(m, b)[:, None].double() for m, b in GROUPS]
    assert average_runs(rows, batch)[:, 0].tolist() == list(range(batch.num_tokens))


@settings(max_examples=40)
@given(data=st.data())
def test_permuting_the_tiles_permutes_the_batch(data, tilesets):
    tiles = data.draw(tilesets)
    order = data.draw(st.permutations(range(tiles.num_tiles)))
    batch, permuted = tiles.pack(), tiles.select(order).pack()
    lengths = batch.cu_seqlens.diff().tolist()
    for field in ("scales", "positions", "mask", "modality", "band_set"):
        parts = getattr(batch, field).split(lengths)
        assert torch.equal(getattr(permuted, field), torch.cat([parts[i] for i in order]))
    cells = [(4 ** part.long()).sum().item() for part in batch.scales.split(lengths)]
    for whole, moved in zip(stored_cells(batch), stored_cells(permuted), strict=True):
        parts = whole.split(cells)
        assert torch.equal(moved, torch.cat([parts[i] for i in order]))


@settings(max_examples=40)
@given(data=st.data())
def test_packed_tiles_are_what_each_is_alone(data, tilesets):
    tiles = data.draw(tilesets)
    batch = tiles.pack()
    alone = [tiles.select([i]).pack() for i in range(tiles.num_tiles)]
    assert torch.equal(batch.positions, torch.cat([one.positions for one in alone]))
    for part in (0, 1):
        cells = torch.cat([stored_cells(one)[part] for one in alone])
        assert torch.equal(stored_cells(batch)[part], cells)


@given(data=st.data(), width=st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_padding_and_nesting_go_there_and_back(data, width, tilesets):
    batch = data.draw(tilesets).pack()
    values = torch.arange(1, batch.num_tokens * int(np.prod(width)) + 1).view(-1, *width)
    padded, there = batch.padded(values)
    assert padded.shape == (batch.num_tiles, batch.max_seqlen, *width)
    assert there.sum(1).tolist() == batch.cu_seqlens.diff().tolist()
    assert torch.equal(padded[there], values)
    assert not padded[~there].any()
    assert torch.equal(batch.unpad(padded), values)
    if width:
        nested = batch.nested(values)
        assert (nested.layout, nested.size(0)) == (torch.jagged, batch.num_tiles)
        assert torch.equal(nested.values(), values)
        of_tiles = nested.unbind()
        assert [len(part) for part in of_tiles] == batch.cu_seqlens.diff().tolist()


def equal(a, b):
    """NaN is what is not known, the same on both sides."""
    return np.array_equal(a, b, equal_nan=a.is_floating_point())


def test_what_is_derived_is_derived_once(make_tiles):
    batch = make_tiles().pack()
    assert batch.cells(0, 0)[0] is batch.cells(0, 0)[0]
    assert batch.cell_index(0) is batch.cell_index(0)
    assert batch.merge is batch.merge


def test_a_pickled_batch_is_the_same_and_leaves_out_what_is_derived(make_tiles):
    batch = pack(several(make_tiles()))
    before = len(pickle.dumps(batch))
    batch.cells(0, 0)
    content = pickle.dumps(batch)
    assert len(content) == before
    again = pickle.loads(content)  # noqa: S301
    pairs = zip(tensors_of(again), tensors_of(batch), strict=True)
    assert all(a.dtype == b.dtype and equal(a, b) for a, b in pairs)
    assert torch.equal(again.cells(0, 1)[0], batch.cells(0, 1)[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32,
                                   np.uint64, np.int64, np.float32, np.float64])  # fmt: skip
def test_pixels_of_every_stored_type_are_cut_and_become_numbers(make_tiles, make_encoder, dtype):
    tiles = make_tiles()
    tiles = tiles.with_pixels((tiles.frames.pixels % 100).astype(dtype))
    batch = tiles.pack()
    values, _ = batch.cells(0, 0)
    assert values.numpy().dtype == dtype
    expected = make_encoder()(tiles.with_pixels(tiles.frames.pixels.astype(np.float32)).pack())
    assert torch.equal(make_encoder()(batch).tokens, expected.tokens)


def test_a_band_that_was_dropped_counts_as_no_pixels(make_tiles, make_encoder, with_pixels):
    tiles, encoder = make_tiles(), make_encoder()
    batch = tiles.pack()
    present = torch.ones(len(tiles.leaves), 3, dtype=torch.bool)
    present[:, 1] = False
    outputs = []
    for number in (0, 77):
        pixels = tiles.frames.pixels.copy()
        pixels[:, 1] = number
        dropped = with_pixels(batch, pixels=torch.from_numpy(pixels), band_present=present)
        outputs.append(encoder(dropped).tokens)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], encoder(batch).tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_batch_on_a_gpu_is_what_it_is_here(make_tiles):
    batch = pack(several(make_tiles()))
    there = batch.pin_memory().to("cuda", non_blocking=True)
    for m, b in GROUPS:
        pairs = zip(there.cells(m, b), batch.cells(m, b), strict=True)
        assert all(torch.equal(a.cpu(), b) for a, b in pairs)
    assert torch.equal(there.covering(0, 1).cpu(), batch.covering(0, 1))
    assert torch.equal(there.merge.token_order.cpu(), batch.merge.token_order)
    values = torch.arange(batch.num_tokens, device="cuda")[:, None]
    assert torch.equal(there.unpad(there.padded(values)[0]), values)
