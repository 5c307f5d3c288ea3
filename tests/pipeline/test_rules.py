import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.grid import BaseGrid
from pipeline.quadtree import partition_scales
from pipeline.rules import check_thresholds, quantile_thresholds
from pipeline.scorers.config import EntropyConfig


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
