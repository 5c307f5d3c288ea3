"""Turns and crops of frames and of their partitions, against the same done to painted grids."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.data import symmetry
from model.data.symmetry import (
    FLIPS,
    IDENTITY,
    NUM_TURNS,
    ROTATIONS,
    compose,
    crop_rasters,
    crop_scales,
    cropped_grid,
    inverse,
    moved_cells,
    turn_rasters,
    turn_scales,
    turned,
)
from pipeline import segments
from pipeline.grid import BaseGrid
from pipeline.quadtree import partition_image

TURNS = range(NUM_TURNS)
NUM_BINS = 8


def painted(scales: np.ndarray, counts: np.ndarray, grid: BaseGrid) -> np.ndarray:
    """uint8 [F, row, col]: every cell in the colour of its leaf, the byte that stands for it."""
    in_order = np.repeat(scales, segments.run_lengths(scales)).reshape(counts.size, -1)
    on_grid = np.empty_like(in_order)
    on_grid[:, grid.storage_order] = in_order
    return on_grid.reshape(-1, grid.rows, grid.cols)


def check_frames(scales: np.ndarray, counts: np.ndarray, grid: BaseGrid) -> None:
    for frame, leaves in enumerate(np.split(scales, np.cumsum(counts)[:-1])):
        segments.check(leaves, grid, f"frame {frame}")


@st.composite
def frames(draw, most_roots=3):
    """Random partitions of some frames of a square grid: grid, scales, counts."""
    num_scales, side = draw(st.integers(1, 4)), draw(st.integers(1, most_roots))
    grid = BaseGrid(*(side * 2 ** (num_scales - 1),) * 2, 2, num_scales)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    split, missing = draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.3, 1.0]))

    def leaves(scale: int) -> list[int]:
        if scale and rng.random() < split:
            return [leaf for _ in range(4) for leaf in leaves(scale - 1)]
        return [scale | (0x80 if rng.random() < missing else 0)]

    of_frames = [
        [leaf for _ in range(side**2) for leaf in leaves(num_scales - 1)]
        for _ in range(draw(st.integers(1, 5)))
    ]
    counts = np.array([len(leaves) for leaves in of_frames])
    return grid, np.array([leaf for leaves in of_frames for leaf in leaves], np.uint8), counts


def turns_of(draw, counts: np.ndarray) -> np.ndarray:
    turns = st.lists(st.sampled_from(TURNS), min_size=counts.size, max_size=counts.size)
    return np.array(draw(turns))


def test_the_eight_turns_are_the_symmetries_of_the_square():
    square = np.array([[1, 2], [3, 4]])
    assert {turned(square, turn).tobytes() for turn in TURNS} == {
        each.tobytes()
        for flip in (square, square[::-1])
        for each in (np.rot90(flip, quarter) for quarter in range(4))
    }
    for quarters, turn in enumerate(ROTATIONS):
        np.testing.assert_array_equal(turned(square, turn), np.rot90(square, quarters))
    flipped = [turned(square, turn).tolist() for turn in FLIPS]
    assert flipped == [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[3, 4], [1, 2]], [[4, 3], [2, 1]]]


def test_the_turns_form_a_group_and_so_do_flips_and_rotations():
    image = np.arange(9).reshape(3, 3)
    for first in TURNS:
        assert compose(first, IDENTITY) == compose(IDENTITY, first) == first
        assert compose(first, inverse(first)) == compose(inverse(first), first) == IDENTITY
        for then in TURNS:
            both = turned(turned(image, first), then)
            np.testing.assert_array_equal(turned(image, compose(first, then)), both)
    for subgroup in (FLIPS, ROTATIONS, TURNS):
        assert {compose(a, b) for a in subgroup for b in subgroup} == set(subgroup)


@given(data=st.data())
def test_rasters_turn_in_place_each_by_its_own_turn(data):
    side = data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(["uint8", "uint16", "float32", "float64"]))
    inner = data.draw(st.sampled_from([(), (1,), (3,)]))
    count = data.draw(st.integers(0, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rasters = rng.integers(0, 200, (count, *inner, side, side)).astype(dtype)
    turns = rng.integers(0, NUM_TURNS, count)
    expected = [turned(raster, turn) for raster, turn in zip(rasters.copy(), turns, strict=True)]
    turn_rasters(rasters, turns)
    np.testing.assert_array_equal(rasters, np.array(expected).reshape(rasters.shape))


def test_rasters_larger_than_the_scratch_turn_as_well():
    side = 600
    assert side**2 * 8 > symmetry._SCRATCH_BYTES
    rasters = np.random.default_rng(0).random((16, side, side))
    expected = [turned(raster, f % 8) for f, raster in enumerate(rasters.copy())]
    turn_rasters(rasters, np.arange(16) % 8)
    np.testing.assert_array_equal(rasters, expected)


def test_a_hand_made_partition_turns_by_a_quarter():
    """Two by two roots; only the top right one is split, its bottom left cell is missing."""
    grid = BaseGrid(4, 4, 1, 2)
    scales = np.array([1, 0, 0, 0x80, 0, 0x81, 1], np.uint8)
    quarter = turn_scales(scales, np.array([7]), np.array([ROTATIONS[1]]), grid)
    # Counter-clockwise the top right root comes top left, its bottom left cell bottom right.
    assert quarter.tolist() == [0, 0, 0, 0x80, 1, 1, 0x81]


@given(data=st.data(), read=frames())
def test_turned_partitions_are_those_of_the_turned_grids(data, read):
    grid, scales, counts = read
    turns = turns_of(data.draw, counts)
    after = turn_scales(scales, counts, turns, grid)
    check_frames(after, counts, grid)
    expected = [
        turned(cells, turn)
        for cells, turn in zip(painted(scales, counts, grid), turns.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(painted(after, counts, grid), expected)
    of_leaf = np.repeat(np.arange(counts.size), counts)
    for frame in range(counts.size):
        one_frame = of_leaf == frame
        assert sorted(after[one_frame]) == sorted(scales[one_frame])


@given(data=st.data(), read=frames())
def test_a_turn_and_its_inverse_leave_a_partition_as_it_was(data, read):
    grid, scales, counts = read
    turns = turns_of(data.draw, counts)
    back = np.array([inverse(turn) for turn in turns.tolist()])
    after = turn_scales(turn_scales(scales, counts, turns, grid), counts, back, grid)
    assert after.dtype == np.uint8
    np.testing.assert_array_equal(after, scales)


@st.composite
def images(draw):
    """An image of few values with invalid pixels and whole invalid blocks, and how to cut it."""
    base, num_scales = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    side = base * 2 ** (num_scales - 1) * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    image = rng.integers(0, NUM_BINS, (2, side, side)).astype(np.float32) / NUM_BINS
    image[:, rng.random((side, side)) < draw(st.sampled_from([0.0, 0.8, 1.0]))] = 0
    valid = rng.random((side, side)) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    for _ in range(draw(st.integers(0, 3))):
        y, x = rng.integers(0, side, 2)
        valid[y : y + side // 2, x : x + side // 2] = False
    share = draw(st.floats(0.1, 1))
    sizes = [base * 2**s for s in range(1, num_scales)]
    thresholds = [share * min(3.0, np.log2(size**2)) for size in sizes]
    settings = {"base_patch_size": base, "num_scales": num_scales, "num_bins": NUM_BINS}
    return image, valid, {**settings, "thresholds": thresholds}


@given(made=images(), turn=st.sampled_from(TURNS))
def test_turning_the_image_and_turning_its_partition_are_the_same(made, turn):
    image, valid, settings = made
    before = partition_image(image, valid=valid, **settings)
    after = partition_image(
        np.ascontiguousarray(turned(image, turn)),
        valid=np.ascontiguousarray(turned(valid, turn)),
        **settings,
    )
    counts = np.array([before.scales.size])
    moved = turn_scales(before.scales, counts, np.array([turn]), before.grid)
    np.testing.assert_array_equal(moved, after.scales)
    assert len(after) == len(before)


@given(num_scales=st.integers(1, 5), side=st.integers(1, 4), turn=st.sampled_from(TURNS))
def test_the_table_of_cells_is_what_the_bits_of_the_morton_code_say(num_scales, side, turn):
    """Reversing an axis flips its bits inside a root, swapping axes swaps neighbouring bits."""
    root = 2 ** (num_scales - 1)
    grid = BaseGrid(side * root, side * root, 1, num_scales)
    codes = np.arange(root**2)
    y_bits = sum(2 << 2 * bit for bit in range(num_scales - 1))
    x_bits = y_bits >> 1
    if turn & 4:
        codes = (codes & x_bits) << 1 | (codes & y_bits) >> 1
    codes = codes ^ (y_bits if turn & 2 else 0) ^ (x_bits if turn & 1 else 0)
    table = moved_cells(grid)[turn].reshape(side**2, root**2)
    assert (table % root**2 == codes).all()
    roots = np.arange(side**2).reshape(side, side)
    went = np.empty(side**2, int)
    went[turned(roots, turn).reshape(-1)] = roots.reshape(-1)
    assert (table // root**2 == went[:, None]).all()


@given(data=st.data(), read=frames(most_roots=4))
def test_cropped_partitions_are_those_of_the_cropped_grids(data, read):
    grid, scales, counts = read
    side = grid.rows // grid.root_cells
    size = data.draw(st.integers(1, side))
    corners = data.draw(
        hnp.arrays(np.int64, (counts.size, 2), elements=st.integers(0, side - size))
    )
    after, left = crop_scales(scales, counts, corners, size, grid)
    small = cropped_grid(grid, size)
    check_frames(after, left, small)
    cells = np.empty((counts.size, small.rows, small.cols), np.uint8)
    unturned = np.full(counts.size, IDENTITY)
    crop_rasters(painted(scales, counts, grid), corners * grid.root_cells, unturned, cells)
    np.testing.assert_array_equal(painted(after, left, small), cells)
    assert small == replace(grid, rows=cells.shape[1], cols=cells.shape[2])


@given(data=st.data())
def test_crops_of_rasters_are_turned_windows(data):
    count, side = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 8))
    inner = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    size = data.draw(st.integers(1, side))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rasters = rng.integers(0, 99, (count, *inner, side, side), np.uint16)
    corners = rng.integers(0, side - size + 1, (count, 2))
    turns = rng.integers(0, NUM_TURNS, count)
    cropped = np.empty((count, *inner, size, size), np.uint16)
    crop_rasters(rasters, corners, turns, cropped)
    for raster, (y, x), turn, window in zip(rasters, corners, turns, cropped, strict=True):
        whole = raster[..., y : y + size, x : x + size]
        np.testing.assert_array_equal(turned(whole, turn), window)


def test_frames_must_be_square():
    with pytest.raises(AssertionError):
        turn_rasters(np.zeros((1, 2, 3)), np.array([1]))
    with pytest.raises(AssertionError):
        moved_cells(BaseGrid(2, 4, 1, 1))
