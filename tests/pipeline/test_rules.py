import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracle
from pipeline import segments
from pipeline.cut import leaves, splits_by_budget, splits_by_thresholds
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.nodes import level_offsets, node_scores, shared_maps, shared_nodes
from pipeline.quadtree import budget_scales, partition_scales
from pipeline.rules import check_thresholds, quantile_thresholds, uniform_thresholds
from pipeline.scorers.config import EntropyConfig
from pipeline.settings.config import DataConfig
from pipeline.settings.loading import validated
from support import grids_and_maps


@pytest.mark.parametrize(("bins", "size", "bits"), [(32, 2, 2), (32, 4, 4), (32, 8, 5), (16, 8, 4)])
def test_attainable_entropy(bins, size, bits):
    assert EntropyConfig(num_bins=bins).attainable(size, num_bands=3) == bits


def attainable(size):
    return EntropyConfig().attainable(size, num_bands=3)


def test_a_threshold_at_the_attainable_maximum_is_reachable():
    check_thresholds([4.0, 5.0], 2, attainable, num_scales=3)


def test_infinite_thresholds_are_allowed():
    check_thresholds([-math.inf, math.inf], 4, attainable, num_scales=3)


@given(
    hnp.arrays(np.float32, (6, 6), elements=st.floats(0, 5, width=32), unique=True),
    st.floats(0.05, 0.95),
)
def test_a_quantile_keeps_that_share_of_the_patches(coarse, quantile):
    fine = np.repeat(np.repeat(coarse, 2, 0), 2, 1)
    (threshold,) = quantile_thresholds([[fine, coarse]], quantile)
    scales = partition_scales([fine, coarse], [threshold], BaseGrid(12, 12, 4, 2))
    kept = np.count_nonzero(scales == 1)
    assert abs(kept - quantile * coarse.size) <= 1


def test_constant_patches_stay_whole_under_any_quantile():
    fine, coarse = np.zeros((4, 4), np.float32), np.zeros((2, 2), np.float32)
    (threshold,) = quantile_thresholds([[fine, coarse]], 0.5)
    assert partition_scales([fine, coarse], [threshold], BaseGrid(4, 4, 4, 2)).tolist() == [1] * 4


def test_patches_without_a_valid_pixel_do_not_count():
    coarse = np.array([[np.nan, 1.0], [2.0, np.nan]], np.float32)
    (threshold,) = quantile_thresholds([[coarse, coarse]], 0.5)
    assert threshold == 2.0


def test_nothing_valid_asks_for_no_split():
    empty = np.full((2, 2), np.nan, np.float32)
    assert quantile_thresholds([[empty, empty]], 0.5) == [math.inf]


def tokens_of(scales):
    return np.count_nonzero(~segments.is_missing(scales))


@given(grids_and_maps(levels=3), st.integers(1, 150))
def test_a_budget_is_spent_as_the_slow_greedy_definition_spends_it(case, budget):
    grid, maps = case
    scales = budget_scales(maps, budget, grid)
    segments.check(scales, grid, "frame")
    table = segments.descriptors(scales, grid, maps)
    found = {(d["y"], d["x"], d["scale"], d["missing"]) for d in table}
    assert found == oracle.budget_leaves(maps, budget, grid.num_scales)


@given(grids_and_maps(), st.integers(1, 150))
def test_no_further_split_fits_into_a_budget(case, budget):
    grid, maps = case
    scales = budget_scales(maps, budget, grid)
    roots = np.count_nonzero(~np.isnan(maps[-1]))
    count = tokens_of(scales)
    assert count <= max(budget, roots)
    for leaf in segments.descriptors(scales, grid, maps):
        if leaf["scale"] and not leaf["missing"]:
            y, x = leaf["y"] >> (leaf["scale"] - 1), leaf["x"] >> (leaf["scale"] - 1)
            children = maps[leaf["scale"] - 1][y : y + 2, x : x + 2]
            assert count - 1 + np.count_nonzero(~np.isnan(children)) > budget


@given(grids_and_maps())
def test_raising_a_budget_never_lowers_the_count(case):
    grid, maps = case
    counts = [tokens_of(budget_scales(maps, budget, grid)) for budget in range(1, 40)]
    assert counts == sorted(counts)
    most = tokens_of(budget_scales(maps, 10**9, grid))
    assert most == np.count_nonzero(~np.isnan(maps[0]))


def test_a_budget_by_hand():
    fine = np.zeros((4, 4), np.float32)
    fine[0, 2:] = np.nan
    coarse = np.array([[1, 3], [3, 2]], np.float32)
    scales = [
        budget_scales([fine, coarse], n, BaseGrid(4, 4, 4, 2)).tolist() for n in (3, 5, 9, 12)
    ]
    missing = 0x80
    assert scales == [
        [1, 1, 1, 1],  # four roots are more than three
        [1, missing, missing, 0, 0, 1, 1],  # of the two highest, the first in storage order
        [1, missing, missing, 0, 0, 0, 0, 0, 0, 1],  # 8 of 9: three more do not fit
        [1, missing, missing, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_negative_and_infinite_scores_are_in_order():
    coarse = np.array([[-1, -2, -np.inf, np.inf, -0.0, 0.0]], np.float32)
    grid = BaseGrid(2, 12, 4, 2)
    fine = np.zeros((2, 12), np.float32)
    order = []
    for budget in range(9, 25, 3):
        split = segments.starts(budget_scales([fine, coarse], budget, grid))
        order.append(np.bincount(split // 4).tolist())
    first = [next(n for n, counts in enumerate(order) if counts[root] == 4) for root in range(6)]
    assert first == [3, 4, 5, 0, 1, 2]


@given(grids_and_maps(num_frames=3), st.data())
def test_frames_cut_together_are_those_cut_alone(case, data):
    grid, maps = case
    limits = data.draw(
        hnp.arrays(np.float32, (3, grid.num_scales - 1), elements=st.floats(0, 1, width=32))
    )
    nodes = node_scores(maps, grid)
    for splits, alone in (
        (splits_by_thresholds(nodes, limits, grid), partition_scales),
        (splits_by_budget(nodes, 12, grid), budget_scales),
    ):
        cut = leaves(splits, nodes, grid)
        rows = np.split(cut.scales, np.cumsum(cut.counts)[:-1])
        for frame, scales in enumerate(rows):
            rule = list(limits[frame]) if alone is partition_scales else 12
            np.testing.assert_array_equal(scales, alone([m[frame] for m in maps], rule, grid))
            counts = segments.counts_per_scale(scales, grid.num_scales)
            np.testing.assert_array_equal(cut.tokens[frame], counts)


@given(grids_and_maps(), st.data())
def test_uniform_patches_have_that_size(case, data):
    grid, maps = case
    scale = data.draw(st.integers(0, grid.num_scales - 1))
    size = grid.patch_sizes[scale]
    scales = partition_scales(maps, uniform_thresholds(size, 2, grid.num_scales), grid)
    present = scales[~segments.is_missing(scales)]
    assert (present == scale).all()
    assert present.size == np.count_nonzero(~np.isnan(maps[scale]))


@given(grids_and_maps(num_frames=3), st.sampled_from(["max", "mean"]))
def test_shared_maps_are_of_the_valid_frames(case, how):
    _, maps = case
    for level, shared in zip(maps, shared_maps(maps, how), strict=True):
        for y, x in np.ndindex(shared.shape):
            valid = level[:, y, x][~np.isnan(level[:, y, x])].astype(np.float64)
            expected = (
                np.float32(valid.max() if how == "max" else valid.mean()) if valid.size else np.nan
            )
            np.testing.assert_array_equal(shared[y, x], np.float32(expected))


@given(grids_and_maps(num_frames=5), st.sampled_from(["max", "mean"]))
def test_frames_that_share_a_partition_have_one_set_of_boundaries(case, how):
    grid, maps = case
    nodes, starts = node_scores(maps, grid), np.array([0, 2])
    together = shared_nodes(nodes, starts, how)
    first = shared_maps([m[:2] for m in maps], how)
    np.testing.assert_array_equal(together[:1], node_scores([m[None] for m in first], grid))
    splits = splits_by_thresholds(together, [0.5] * (grid.num_scales - 1), grid)
    cut = leaves(np.repeat(splits, [2, 3], axis=0), nodes, grid)
    rows = np.split(cut.scales, np.cumsum(cut.counts)[:-1])
    for tile in (rows[:2], rows[2:]):
        assert all((segments.levels(s) == segments.levels(tile[0])).all() for s in tile)
    for frame, scales in enumerate(rows):
        scores = segments.leaf_scores(scales, grid, [m[frame] for m in maps])
        np.testing.assert_array_equal(segments.is_missing(scales), np.isnan(scores))


def test_nodes_are_in_storage_order():
    grid = BaseGrid(4, 8, 2, 3)
    maps = [
        np.arange(m * n, dtype=np.float32).reshape(1, m, n) for m, n in ((4, 8), (2, 4), (1, 2))
    ]
    nodes = node_scores(maps, grid)
    assert level_offsets(grid).tolist() == [0, 32, 40, 42]
    np.testing.assert_array_equal(nodes[0, :32], grid.storage_order)
    assert nodes[0, 32:].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 0, 1]


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({"quantile": 0.5, "uniform_px": 8}, "uniform_px has no effect beside quantile"),
        ({"thresholds": [1, 1], "tokens_per_tile": 8}, "tokens_per_tile has no effect beside thr"),
        ({"uniform_px": 12}, "uniform_px is 12; this quadtree has patches of 4, 8, 16 px"),
        ({"tokens_per_tile": 0}, "partition.tokens_per_tile is 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(partition, message):
    with pytest.raises(ConfigError, match=message):
        validated(DataConfig, {"partition": partition}, "test")
