"""Counter-based random numbers: what they depend on, and that they look random."""

import hashlib
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from model.data import draws

WORD, GAMMA = 2**64 - 1, 0x9E3779B97F4A7C15
INT64 = st.integers(-(2**63), 2**63 - 1)
# The seeds are fixed, so a check fails always or never; a true generator would fail one in a million.
RARE = 1e-6
MANY = 200_000


def mixed(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def by_hand(seed, epoch, key, purpose):
    """The same number in Python's own integers; `key` is a tuple."""
    start = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    for number in (seed, epoch):
        start = (mixed((start + number * GAMMA) & WORD) + GAMMA) & WORD
    state = None
    for part in key:
        state = part if state is None else state + part * GAMMA
        state = mixed(mixed((state * GAMMA + start) & WORD) ^ start)
    return state


@given(seed=INT64, epoch=INT64, keys=st.lists(INT64, min_size=1), purpose=st.text(max_size=9))
def test_bits_are_those_of_plain_arithmetic(seed, epoch, keys, purpose):
    drawn = draws.bits(seed, epoch, np.array(keys), purpose)
    assert drawn.tolist() == [by_hand(seed, epoch, (key,), purpose) for key in keys]
    pairs = draws.bits(seed, epoch, (np.array(keys), 3), purpose)
    assert pairs.tolist() == [by_hand(seed, epoch, (key, 3), purpose) for key in keys]


def test_bits_never_change():
    """Runs that are resumed years later must see the same tiles."""
    zero, keys = np.zeros(1, np.int64), np.arange(3)
    flip = [8562726785576572206, 5167407130878231077, 16257858538458796910]
    assert draws.bits(0, 0, keys, "flip").tolist() == flip
    assert draws.bits(1, 0, zero, "flip").tolist() == [3172149226189163876]
    assert draws.bits(0, 1, zero, "flip").tolist() == [17173223209047828743]
    assert draws.bits(-5, 3, (np.array([7, 8]), 2), "drop dates").tolist() == [
        14732441819225164703,
        12331153956005986573,
    ]
    assert draws.bits(0, 0, np.array([-1]), "").tolist() == [16091375573451876754]
    assert draws.uniform(0, 0, keys, "flip").tolist() == [(word >> 11) * 2.0**-53 for word in flip]
    assert draws.integers(0, 0, np.arange(8), "flip", 8).tolist() == [3, 2, 7, 1, 3, 6, 5, 2]
    assert draws.permutation(7, 3, 10, "blocks").tolist() == [2, 5, 4, 3, 0, 7, 1, 8, 9, 6]


@given(
    keys=st.lists(st.integers(0, 2**40), max_size=50).map(np.array),
    subset=st.randoms(use_true_random=False),
)
def test_a_number_does_not_depend_on_the_other_keys(keys, subset):
    keys = keys.astype(np.int64)
    every = dict(zip(keys.tolist(), draws.bits(3, 1, keys, "a").tolist(), strict=True))
    some = subset.sample(keys.tolist(), len(keys) // 2)
    assert draws.bits(3, 1, np.array(some, np.int64), "a").tolist() == [every[key] for key in some]


def test_large_calls_equal_small_ones_in_every_shape_and_width():
    keys = np.arange(50_000)
    whole = draws.bits(9, 9, keys, "a")
    assert whole.tolist()[49_990:] == draws.bits(9, 9, keys[49_990:], "a").tolist()
    np.testing.assert_array_equal(draws.bits(9, 9, keys.reshape(50, 1000), "a").ravel(), whole)
    np.testing.assert_array_equal(draws.bits(9, 9, keys.astype(np.int32), "a"), whole)
    np.testing.assert_array_equal(draws.bits(9, 9, keys[::7], "a"), whole[::7])
    assert draws.uniform(9, 9, np.array(5), "a").shape == ()
    pairs = draws.bits(9, 9, (keys[:4, None], np.arange(3)), "a")
    assert pairs.shape == (4, 3)
    assert pairs[2, 1] == draws.bits(9, 9, (2, np.array([1])), "a")[0]


STREAMS = {
    "key": lambda keys: draws.uniform(1, 2, keys, "a"),
    "distant keys": lambda keys: draws.uniform(1, 2, keys << 40, "a"),
    "epoch": lambda keys: np.concatenate(
        [draws.uniform(1, e, keys[:20], "a") for e in range(10_000)]
    ),
    "seed": lambda keys: np.concatenate(
        [draws.uniform(s, 2, keys[:20], "a") for s in range(10_000)]
    ),
    "purpose": lambda keys: np.concatenate(
        [draws.uniform(1, 2, keys[:20], f"purpose {p}") for p in range(10_000)]
    ),
    "second key": lambda keys: draws.uniform(1, 2, (keys[:20, None], keys[:10_000]), "a").ravel(),
}


@pytest.mark.parametrize("along", STREAMS)
def test_numbers_are_uniform_and_neighbours_independent(along):
    numbers = STREAMS[along](np.arange(MANY))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.chisquare(np.bincount((numbers * 256).astype(int), minlength=256)).pvalue > RARE
    for lag in (1, 2, 20):
        first, second = (numbers[:-lag] * 16).astype(int), (numbers[lag:] * 16).astype(int)
        assert stats.chisquare(np.bincount(first * 16 + second, minlength=256)).pvalue > RARE


def test_streams_are_independent_of_each_other():
    keys = np.arange(MANY)
    streams = [
        draws.uniform(0, 0, keys, "a"),
        draws.uniform(0, 0, keys, "b"),
        draws.uniform(0, 1, keys, "a"),
        draws.uniform(1, 0, keys, "a"),
        draws.uniform(0, 0, keys + 1, "a"),
        draws.uniform(0, 0, (keys, 0), "a"),
        draws.uniform(0, 0, (keys, 1), "a"),
    ]
    for first, second in combinations([(s * 16).astype(int) for s in streams], 2):
        assert stats.chisquare(np.bincount(first * 16 + second, minlength=256)).pvalue > RARE


def test_every_bit_of_a_word_is_set_half_the_time():
    words = draws.bits(0, 0, np.arange(MANY), "bits")
    for bit in range(64):
        ones = int((words >> np.uint64(bit) & np.uint64(1)).sum())
        assert stats.binomtest(ones, MANY).pvalue > RARE


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 100, 2**32])
def test_integers_are_below_their_bound_and_equally_likely(bound):
    numbers = draws.integers(4, 4, np.arange(MANY), "integers", bound)
    assert numbers.dtype == np.int64
    assert 0 <= numbers.min() <= numbers.max() < bound
    cells = bound if bound <= 100 else 64
    found = np.bincount(numbers * cells // bound, minlength=cells)
    assert cells == 1 or stats.chisquare(found).pvalue > RARE


@given(size=st.integers(0, 300), seed=INT64, epoch=st.integers(0, 9))
def test_a_permutation_holds_every_number_once(size, seed, epoch):
    drawn = draws.permutation(seed, epoch, size, "order")
    assert sorted(drawn.tolist()) == list(range(size))


def test_permutations_of_a_few_are_equally_likely():
    places = [0] * 24
    names = {}
    for epoch in range(24_000):
        order = tuple(draws.permutation(0, epoch, 4, "order").tolist())
        places[names.setdefault(order, len(names))] += 1
    assert len(names) == 24
    assert stats.chisquare(places).pvalue > RARE
