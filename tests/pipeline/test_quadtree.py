import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from pipeline import partition_image, segments
from pipeline.errors import ConfigError, IntegrityError
from pipeline.grid import BaseGrid, covering_grid
from pipeline.quadtree import partition_scales
from support import grids_and_maps


@st.composite
def maps_and_thresholds(draw):
    grid, maps = draw(grids_and_maps())
    number = grid.num_scales - 1
    threshold = st.one_of(
        st.integers(0, 8).map(lambda eighths: eighths / 8), st.sampled_from([-np.inf, np.inf])
    )
    return grid, maps, draw(st.lists(threshold, min_size=number, max_size=number))


@pytest.mark.parametrize(
    ("base", "thresholds", "counts"),
    [
        (4, (0.8,), [192, 16]),
        (2, (0.5, 0.8), [512, 64, 16]),
        (1, (0.3, 0.5, 0.8), [1024, 256, 64, 16]),
    ],
)
def test_golden_token_counts(golden_image, base, thresholds, counts):
    partition = partition_image(
        golden_image, base_patch_size=base, num_scales=len(counts), thresholds=thresholds
    )
    assert partition.counts_per_scale.tolist() == counts
    assert len(partition) == sum(counts)


@given(maps_and_thresholds())
def test_partition_equals_the_recursive_definition(case):
    grid, maps, thresholds = case
    scales = partition_scales(maps, thresholds, grid)
    table = segments.descriptors(scales, grid, maps)
    found = {(d["y"], d["x"], d["scale"], d["missing"]) for d in table}
    assert found == oracle.leaves(maps, thresholds, grid.num_scales)
    assert len(found) == len(table)


@given(maps_and_thresholds())
def test_leaves_tile_the_grid_exactly_once_in_storage_order(case):
    grid, maps, thresholds = case
    scales = partition_scales(maps, thresholds, grid)
    segments.check(scales, grid, "frame")
    covered = np.zeros((grid.rows, grid.cols), int)
    for leaf in segments.descriptors(scales, grid, maps):
        side = leaf["size"] // grid.base_patch_size
        covered[leaf["y"] : leaf["y"] + side, leaf["x"] : leaf["x"] + side] += 1
    assert (covered == 1).all()


@given(maps_and_thresholds(), st.data())
def test_raising_a_threshold_never_raises_the_count(case, data):
    grid, maps, thresholds = case

    def tokens(limits):
        return np.count_nonzero(~segments.is_missing(partition_scales(maps, limits, grid)))

    raised = [t + data.draw(st.floats(0, 1)) for t in thresholds]
    assert tokens(raised) <= tokens(thresholds)


@given(maps_and_thresholds())
def test_infinite_thresholds_give_all_base_cells_and_all_roots(case):
    grid, maps, thresholds = case
    fine = partition_scales(maps, [-np.inf] * len(thresholds), grid)
    present = segments.levels(fine)[~segments.is_missing(fine)]
    assert present.size == np.count_nonzero(~np.isnan(maps[0]))
    assert (present == 0).all()
    coarse = partition_scales(maps, [np.inf] * len(thresholds), grid)
    assert coarse.size == maps[-1].size
    assert (segments.levels(coarse) == grid.num_scales - 1).all()


@given(st.integers(1, 70), st.integers(1, 70))
def test_an_image_of_any_size_is_covered_to_its_last_pixel(height, width):
    image = np.random.default_rng(height * 100 + width).random((1, height, width))
    partition = partition_image(image, base_patch_size=4, num_scales=3, thresholds=(2.0, 3.0))
    assert partition.grid == covering_grid(height, width, 4, 3)
    covered = np.zeros(partition.grid.shape_px, np.bool_)
    for leaf in partition.descriptors[~partition.descriptors["missing"]]:
        y, x = leaf["y"] * 4, leaf["x"] * 4
        covered[y : y + leaf["size"], x : x + leaf["size"]] = True
    assert covered[:height, :width].all()


def test_invalid_pixels_change_no_present_token():
    rng = np.random.default_rng(0)
    image, valid = rng.random((3, 32, 32)), rng.random((32, 32)) > 0.3
    valid[:16, :16] = False
    other = np.where(valid, image, rng.random((3, 32, 32)))
    first, second = (
        partition_image(i, base_patch_size=2, num_scales=4, thresholds=(1, 2, 3), valid=valid)
        for i in (image, other)
    )
    assert first.descriptors.tobytes() == second.descriptors.tobytes()
    missing = first.descriptors[first.descriptors["missing"]]
    assert (missing[0]["y"], missing[0]["x"], missing[0]["size"]) == (0, 0, 16)


def test_descriptors_of_a_coarse_patch_are_in_base_cells_and_pixels():
    image = np.zeros((1, 32, 32))
    image[:, :16, 16:] = np.random.default_rng(0).random((1, 16, 16))
    partition = partition_image(image, base_patch_size=4, num_scales=3, thresholds=(0.5, 0.5))
    last = partition.descriptors[-1]
    assert last.tolist() == (4, 4, 2, 16, 0.0, 0, False)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ((0.5,), "needs? 2, fine to coarse"),
        ((3.0, 2.0, 0.6), "3 values"),
        ((4.1, 0.5), r"thresholds\[0\] is 4.1; a patch of 4 px scores at most 4 with"),
        ((0.5, 5.5), r"thresholds\[1\] is 5.5; a patch of 8 px scores at most 5 with"),
        ((0.5, float("nan")), "nan"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(thresholds, message):
    with pytest.raises(ConfigError, match=message):
        partition_image(np.zeros((1, 8, 8)), base_patch_size=2, num_scales=3, thresholds=thresholds)


@pytest.mark.parametrize(("num_tokens", "expected"), [(16, 16), (17, 16), (100, 100), (9999, 256)])
def test_a_budget_of_tokens(golden_image, num_tokens, expected):
    partition = partition_image(
        golden_image, base_patch_size=4, num_scales=3, num_tokens=num_tokens
    )
    assert len(partition) == expected


@pytest.mark.parametrize("rules", [{}, {"thresholds": (1, 1), "num_tokens": 9}])
def test_exactly_one_rule_is_given(golden_image, rules):
    with pytest.raises(ConfigError, match="either thresholds or num_tokens"):
        partition_image(golden_image, base_patch_size=4, num_scales=3, **rules)


def test_maps_of_another_grid_are_refused():
    with pytest.raises(ConfigError, match="the grid has"):
        partition_scales([np.zeros((4, 4), np.float32)], [], BaseGrid(8, 8, 2, 1))


@pytest.mark.parametrize(
    "scales",
    [[3], [0, 0, 0], [0, 1, 0, 0, 0], [1] * 5, [0xFF] * 16],
    ids=["unknown scale", "too few", "unaligned", "too many", "never written"],
)
def test_damaged_rows_are_noticed(scales):
    with pytest.raises(IntegrityError, match="frame 7"):
        segments.check(np.array(scales, np.uint8), BaseGrid(4, 4, 2, 2), "frame 7")
