"""Weighted epochs: exact numbers of copies, in proportion to the weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.data.sampling import Sampling, class_balanced, class_weights
from pipeline.errors import ConfigError

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-300, 1.7e308), st.floats(0.1, 10), st.just(1.0)),
    min_size=1,
    max_size=60,
).filter(any)


@given(
    weights=WEIGHTS.map(np.array),
    number=st.integers(1, 500),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
)
def test_copies_are_the_floor_or_ceiling_of_what_is_expected(weights, number, seed, epoch):
    tiles = np.arange(weights.size) * 3
    everywhere = np.zeros(tiles[-1] + 1)
    everywhere[tiles] = weights
    drawn = Sampling(everywhere, number).draw(tiles, seed, epoch)
    assert drawn.size == number
    copies = np.bincount(drawn, minlength=everywhere.size)
    assert copies.sum() == copies[tiles].sum()
    shares = weights / weights.max()
    expected = shares / shares.sum() * number
    np.testing.assert_array_less(np.abs(copies[tiles] - expected), 1)
    assert not copies[everywhere == 0].any()


def test_equal_weights_give_every_tile_once():
    tiles = np.array([4, 2, 9, 0])
    for epoch in range(20):
        assert Sampling(np.full(10, 0.1)).draw(tiles, 0, epoch).tolist() == tiles.tolist()


def test_over_many_epochs_tiles_come_as_often_as_their_weights_say():
    weights = np.random.default_rng(0).lognormal(0, 1, 200)
    sampling, epochs = Sampling(weights, 150), 2000
    copies = sum(
        np.bincount(sampling.draw(np.arange(200), 0, epoch), minlength=200)
        for epoch in range(epochs)
    )
    expected = weights / weights.sum() * 150 * epochs
    # A tile's copies of an epoch vary by a coin toss at most: 0.5 is their standard deviation.
    assert np.abs(copies - expected).max() < 5 * 0.5 * np.sqrt(epochs)


def test_neighbours_are_drawn_independently_of_each_other():
    """Every other tile on average, but not every other tile in turn."""
    sampling = Sampling(np.ones(1000), 500)
    both = [
        np.isin(np.arange(1000), sampling.draw(np.arange(1000), 0, epoch)) for epoch in range(200)
    ]
    together = np.mean([drawn[1:] & drawn[:-1] for drawn in both])
    assert together == pytest.approx(0.25, abs=0.01)


def test_first_copies_come_first():
    drawn = Sampling(np.array([3.0, 1.0, 2.0]), 6).draw(np.array([2, 0, 1]), 0, 0)
    assert drawn.tolist() == [2, 0, 1, 2, 0, 0]


def test_class_weights_by_hand():
    classes = np.array([0, 0, 0, 0, 3, 3, 1, 1])
    np.testing.assert_allclose(class_weights(classes), [2 / 3, 4 / 3, 0, 4 / 3])
    np.testing.assert_allclose(class_weights(classes, 0), [1, 1, 0, 1])
    root = class_weights(classes, 0.5)
    assert root[1] / root[0] == pytest.approx(np.sqrt(2))
    assert root[classes].mean() == pytest.approx(1)


@given(classes=st.lists(st.integers(0, 5), min_size=1, max_size=200).map(np.array))
def test_balanced_classes_are_drawn_equally_often(classes):
    present = np.unique(classes)
    sampling = class_balanced(classes, tiles_per_epoch=60 * present.size)
    drawn = classes[sampling.draw(np.arange(classes.size), 0, 0)]
    copies = np.bincount(drawn, minlength=6)[present]
    # Every tile is off by less than one copy.
    assert np.all(np.abs(copies - 60) < np.bincount(classes)[present])


WRONG = {
    "negative": (lambda: Sampling(np.array([1, -2])), "the weight of tile 1 is -2.0"),
    "nan": (lambda: Sampling(np.array([np.nan])), "the weight of tile 0 is nan"),
    "none": (lambda: Sampling(np.ones(3), 0), "tiles_per_epoch is 0; it must be at least 1"),
    "nothing": (
        lambda: Sampling(np.zeros(3)).draw(np.arange(2), 0, 0),
        "the weights of all 2 tiles with tokens are 0",
    ),
    "unknown class": (lambda: class_balanced(np.array([0, -1])), "tile 1 has class -1"),
    "float classes": (lambda: class_balanced(np.array([0.5])), "classes are float64 of shape (1,)"),
    "no classes": (lambda: class_balanced(np.array([], int)), "of shape (0,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_cannot_be_are_refused(name):
    make, message = WRONG[name]
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)
