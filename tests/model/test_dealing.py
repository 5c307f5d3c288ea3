"""Dealing tiles to groups: every tile once, groups of about the same weight."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.data.dealing import deal, fit

WEIGHTS = st.one_of(st.integers(1, 9), st.integers(1, 1000), st.sampled_from([1, 64, 10**9]))
ROWS = st.lists(st.lists(WEIGHTS, max_size=60), min_size=1, max_size=6)


def padded(rows):
    """int64 [window, tile], largest first."""
    weights = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, given_weights in zip(weights, rows, strict=True):
        row[: len(given_weights)] = sorted(given_weights, reverse=True)
    return weights


def sums(weights, groups, num_groups):
    return np.array([weights[groups == group].sum() for group in range(num_groups)])


@given(
    rows=ROWS,
    num_groups=st.integers(1, 9),
    even=st.booleans(),
    limit=st.none() | st.integers(1, 999),
)
def test_every_tile_is_dealt_once_and_groups_differ_by_one_tile_at_most(
    rows, num_groups, even, limit
):
    weights = padded(rows)
    dealt = deal(weights, num_groups, limit, even)
    np.testing.assert_array_equal(dealt == -1, weights == 0)
    assert dealt.max(initial=0) < num_groups
    for row, groups in zip(weights, dealt, strict=True):
        loads = sums(row, groups, num_groups)
        assert loads.max() - loads.min() <= row.max(initial=0)
        sizes = np.bincount(groups[groups >= 0], minlength=num_groups)
        assert (sizes > 0).sum() == min(num_groups, (row > 0).sum())
        if even:
            assert sizes.max() - sizes.min() <= 1


@given(rows=ROWS, num_groups=st.integers(1, 9), limit=st.none() | st.integers(1, 2000))
def test_a_window_is_dealt_alone_as_among_others(rows, num_groups, limit):
    weights = padded(rows)
    together = deal(weights, num_groups, limit)
    for row, groups in zip(weights, together, strict=True):
        tiles = np.count_nonzero(row)
        alone = deal(row[None, :tiles], num_groups, limit)[0]
        np.testing.assert_array_equal(groups[:tiles], alone)


@given(rows=ROWS, num_groups=st.integers(1, 9), slack=st.integers(0, 30))
def test_fit_says_what_dealing_will_give(rows, num_groups, slack):
    weights = padded(rows)
    limit = int(-(-weights.sum(1).max() // num_groups)) + slack
    fits, fewest = fit(weights, num_groups, limit)
    for row, groups, fitting, few in zip(
        weights, deal(weights, num_groups, limit), fits, fewest, strict=True
    ):
        assert fitting == (sums(row, groups, num_groups).max() <= limit)
        assert few == min((groups == group).sum() for group in range(num_groups))


def test_one_heavy_tile_gets_few_neighbours():
    dealt = deal(np.array([[90, *[10] * 27]]), 4)[0]
    assert sums(np.array([90, *[10] * 27]), dealt, 4).tolist() == [90] * 4


def test_swaps_reach_what_dealing_alone_does_not():
    # Largest first, always to the emptiest, gives 8 + 5 + 4 and 7 + 6.
    weights = np.array([[8, 7, 6, 5, 4]])
    assert sorted(sums(weights[0], deal(weights, 2, 17)[0], 2)) == [13, 17]
    assert sorted(sums(weights[0], deal(weights, 2, 15)[0], 2)) == [15, 15]


def test_even_groups_swap_but_never_move():
    weights = np.array([[100, 1, 1, 1]])
    dealt = deal(weights, 2, even=True)[0]
    assert np.bincount(dealt).tolist() == [2, 2]
    assert sums(weights[0], deal(weights, 2)[0], 2).tolist() in ([100, 3], [3, 100])


def test_random_windows_come_out_within_a_hundredth():
    rng = np.random.default_rng(0)
    weights = -np.sort(-rng.integers(64, 1025, (50, 512)), axis=1)
    dealt = deal(weights, 32)
    loads = np.array([sums(row, groups, 32) for row, groups in zip(weights, dealt, strict=True)])
    assert (loads.max(1) / loads.mean(1)).max() < 1.01
