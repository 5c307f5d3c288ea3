"""Which tiles form the batch of a step: every tile once, never above the budget, always the same."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.order import block_order
from model.data.plan import BatchPlan
from model.data.sampling import Sampling, class_balanced
from pipeline.errors import ConfigError

COUNTS = st.lists(
    st.one_of(st.integers(0, 9), st.integers(1, 60), st.just(60)), min_size=1, max_size=120
).filter(any)
BATCH = st.one_of(
    st.fixed_dictionaries({"batch_tokens": st.integers(60, 400)}),
    st.fixed_dictionaries({"batch_tiles": st.integers(1, 30)}),
)
SETTINGS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "shuffle": st.booleans(),
        "block_tiles": st.integers(1, 20),
        "window_tiles": st.integers(1, 60),
        "balance": st.sampled_from(["tokens", "squares"]),
    }
)


def steps_of(epoch):
    return [epoch.tiles(step).tolist() for step in range(epoch.num_steps)]


def flat(steps):
    return [tile for tiles in steps for tile in tiles]


@st.composite
def plans(draw, **fixed):
    counts = np.array(draw(COUNTS))
    options = draw(SETTINGS) | draw(BATCH) | fixed
    if draw(st.booleans()):
        options["store_order"] = np.array(draw(st.permutations(range(counts.size))))
    return BatchPlan(counts, **options)


@given(plan=plans(), number=st.integers(0, 3))
def test_every_tile_with_tokens_is_in_one_batch_of_an_epoch(plan, number):
    epoch = plan.epoch(number)
    steps = steps_of(epoch)
    assert sorted(flat(steps)) == np.flatnonzero(plan.counts).tolist()
    assert epoch.num_tiles == len(flat(steps))
    assert epoch.fewest_tiles == min(map(len, steps)) > 0
    if plan.batch_tiles is not None:
        assert {len(tiles) for tiles in steps[:-1]} <= {plan.batch_tiles}
        assert len(steps[-1]) <= plan.batch_tiles
    else:
        assert max(plan.counts[tiles].sum() for tiles in steps) <= plan.batch_tokens


@given(plan=plans(drop_last=True))
def test_drop_last_leaves_out_less_than_a_batch_or_says_there_is_none(plan):
    total, tiles = plan.counts.sum(), np.count_nonzero(plan.counts)
    least = 1 if plan.shuffle or plan.batch_tiles else plan.batch_tokens + 1
    least = max(least, plan.batch_tokens or 0)
    if total < least or tiles < (plan.batch_tiles or 0):
        with pytest.raises(ConfigError, match="fill no batch"):
            plan.epoch(0)
        return
    epoch = plan.epoch(0)
    steps = steps_of(epoch)
    left_out = sorted(set(np.flatnonzero(plan.counts)) - set(flat(steps)))
    assert len(flat(steps)) + len(left_out) == tiles
    assert epoch.fewest_tiles == min(map(len, steps)) > 0
    if plan.batch_tiles:
        assert {len(step) for step in steps} == {plan.batch_tiles}
        assert len(left_out) == tiles % plan.batch_tiles
    else:
        assert max(plan.counts[step].sum() for step in steps) <= plan.batch_tokens
        largest = plan.counts.max() if plan.shuffle else 0
        assert plan.counts[left_out].sum() <= plan.batch_tokens + largest


@given(plan=plans(), number=st.integers(0, 3), data=st.data())
def test_a_step_is_the_same_however_it_is_reached(plan, number, data):
    steps = steps_of(plan.epoch(number))
    start = data.draw(st.integers(0, len(steps) - 1))
    resumed = pickle.loads(pickle.dumps(plan)).epoch(number)  # noqa: S301
    assert [resumed.tiles(step).tolist() for step in range(start, len(steps))] == steps[start:]
    backwards = plan.epoch(number)
    assert [backwards.tiles(step).tolist() for step in range(len(steps))[::-1]] == steps[::-1]


@given(plan=plans(), world_size=st.integers(1, 6))
def test_ranks_share_a_step_and_hold_about_the_same(plan, world_size):
    epoch = plan.epoch(0)
    if epoch.fewest_tiles < world_size:
        with pytest.raises(
            ConfigError, match=rf"{epoch.fewest_tiles} tiles for {world_size} ranks"
        ):
            epoch.tiles_of_rank(epoch.num_steps - 1, 0, world_size)
        return
    for step, whole in enumerate(steps_of(epoch)):
        ranks = [epoch.tiles_of_rank(step, r, world_size).tolist() for r in range(world_size)]
        assert min(map(len, ranks)) > 0
        assert sorted(flat(ranks)) == sorted(whole)
        place = {tile: i for i, tile in enumerate(whole)}
        assert all(part == sorted(part, key=place.__getitem__) for part in ranks)
        power = 2 if plan.balance == "squares" else 1
        held = [(plan.counts[part] ** power).sum() for part in ranks]
        assert max(held) - min(held) <= plan.counts[whole].max() ** power
        if plan.batch_tiles is not None:
            assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@given(plan=plans())
def test_windows_hold_their_steps(plan):
    epoch = plan.epoch(1)
    windows = {tuple(epoch.window_tiles(step).tolist()) for step in range(epoch.num_steps)}
    for step, tiles in enumerate(steps_of(epoch)):
        assert set(tiles) <= set(epoch.window_tiles(step).tolist())
    assert sorted(flat(windows)) == sorted(flat(steps_of(epoch)))


@given(size=st.integers(1, 200), block=st.integers(1, 50), seed=st.integers(0, 9))
def test_blocks_are_runs_of_neighbours(size, block, seed):
    order = block_order(size, block, seed, 0)
    assert sorted(order.tolist()) == list(range(size))
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    # Blocks that come to lie behind their own predecessor make longer runs; but few are shorter.
    assert sum(run.size < min(block, size) for run in runs) <= 2


@given(plan=plans(shuffle=False))
def test_without_shuffle_batches_follow_store_order(plan):
    order = np.arange(plan.counts.size) if plan.store_order is None else plan.store_order
    expected = [tile for tile in order.tolist() if plan.counts[tile]]
    first, second = plan.epoch(0), plan.epoch(7)
    assert flat(steps_of(first)) == flat(steps_of(second)) == expected


def test_store_order_batches_by_hand():
    counts = np.array([4, 4, 0, 3, 8, 1, 9])
    budget = BatchPlan(counts, batch_tokens=9, shuffle=False)
    assert steps_of(budget.epoch(0)) == [[0, 1], [3], [4, 5], [6]]
    tiles = BatchPlan(counts, batch_tiles=4, shuffle=False, store_order=np.arange(7)[::-1])
    assert steps_of(tiles.epoch(0)) == [[6, 5, 4, 3], [1, 0]]
    dropped = BatchPlan(counts, batch_tiles=4, shuffle=False, drop_last=True)
    assert steps_of(dropped.epoch(0)) == [[0, 1, 3, 4]]


def test_shuffled_batches_never_change():
    """Runs that are resumed years later must see the same tiles."""
    counts = np.arange(20) % 7 + 1
    options = {"seed": 5, "block_tiles": 4, "window_tiles": 12}
    assert steps_of(BatchPlan(counts, batch_tokens=20, **options).epoch(2)) == [
        [7, 15, 18, 3, 6],
        [10, 16, 11, 12, 14],
        [8, 17, 13, 1, 4],
        [9, 0, 2, 19, 5],
    ]
    by_tiles = BatchPlan(counts, batch_tiles=7, **options).epoch(2)
    assert steps_of(by_tiles) == [
        [7, 8, 9, 15, 13, 2, 6],
        [10, 16, 17, 11, 1, 19, 3],
        [18, 12, 14, 0, 4, 5],
    ]
    ranks = [by_tiles.tiles_of_rank(1, rank, 3).tolist() for rank in range(3)]
    assert ranks == [[16, 19], [11, 3], [10, 17, 1]]


def test_seed_and_epoch_change_the_order():
    counts = np.full(500, 10)
    orders = [
        flat(steps_of(BatchPlan(counts, batch_tiles=20, seed=seed).epoch(epoch)))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    for order in orders[1:]:
        assert np.mean(np.array(order) == np.array(orders[0])) < 0.05


def realistic(name, size):
    rng = np.random.default_rng(0)
    return {
        "lognormal": lambda: np.clip(rng.lognormal(5.5, 0.7, size), 64, 1024).astype(int),
        "uniform": lambda: rng.integers(64, 1025, size),
        "equal": lambda: np.full(size, 256),
        "two sizes": lambda: rng.choice([64, 1024], size),
        "heavy tail": lambda: np.minimum(64 * (rng.pareto(1.3, size) + 1), 4096).astype(int),
    }[name]()


@pytest.mark.parametrize("name", ["lognormal", "uniform", "equal", "two sizes", "heavy tail"])
@pytest.mark.parametrize("budget", [4096, 16384, 65536])
def test_batches_are_filled_to_0_99(name, budget):
    counts = realistic(name, 60_000)
    epoch = BatchPlan(counts, batch_tokens=budget).epoch(0)
    held = np.array([counts[epoch.tiles(step)].sum() for step in range(epoch.num_steps)])
    assert held.max() <= budget
    assert held.mean() / budget >= 0.99


def test_where_batches_cannot_be_filled_they_come_near_the_best():
    """13 tiles of 300 are 3900 of 4096 tokens, and 14 are too many."""
    epoch = BatchPlan(np.full(50_000, 300), batch_tokens=4096).epoch(0)
    assert 50_000 / epoch.num_steps > 0.99 * 13


def test_an_epoch_of_few_batches_shares_what_is_lacking():
    counts = np.full(100, 10)
    held = [counts[tiles].sum() for tiles in steps_of(BatchPlan(counts, batch_tokens=300).epoch(0))]
    assert sorted(held) == [250] * 4
    full = BatchPlan(counts, batch_tokens=300, drop_last=True).epoch(0)
    assert [counts[tiles].sum() for tiles in steps_of(full)] == [300] * 3


@pytest.mark.parametrize("balance", ["tokens", "squares"])
@pytest.mark.parametrize("batch", [{"batch_tokens": 65536}, {"batch_tiles": 192}])
def test_ranks_come_out_within_a_hundredth(balance, batch):
    counts = realistic("lognormal", 20_000)
    epoch = BatchPlan(counts, balance=balance, **batch).epoch(0)
    power = 2 if balance == "squares" else 1
    for step in range(0, epoch.num_steps, 10):
        held = [(counts[epoch.tiles_of_rank(step, rank, 8)] ** power).sum() for rank in range(8)]
        assert max(held) <= 1.01 * np.mean(held)


def test_the_largest_tile_is_not_always_the_same_ranks():
    counts = realistic("lognormal", 2000)
    epoch = BatchPlan(counts, batch_tokens=16384).epoch(0)
    owners = {
        rank
        for step in range(epoch.num_steps)
        for rank in range(4)
        if counts[epoch.tiles(step)].max() in counts[epoch.tiles_of_rank(step, rank, 4)]
    }
    assert owners == {0, 1, 2, 3}


def test_any_thread_gets_the_same_tiles():
    counts = realistic("uniform", 20_000)
    plan = BatchPlan(counts, batch_tokens=8192, window_tiles=100)
    expected = steps_of(plan.epoch(0))
    epoch = plan.epoch(0)
    jumping = [step * 37 % epoch.num_steps for step in range(epoch.num_steps)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(epoch.tiles, jumping))
    assert [tiles.tolist() for tiles in found] == [expected[step] for step in jumping]


@settings(max_examples=30)
@given(plan=plans(), data=st.data())
def test_a_sampled_epoch_holds_the_copies_that_were_drawn(plan, data):
    weights = data.draw(
        st.lists(st.integers(0, 4), min_size=plan.counts.size, max_size=plan.counts.size)
    )
    if not any(np.array(weights)[plan.counts > 0]):
        weights = [1] * plan.counts.size
    sampling = Sampling(np.array(weights), data.draw(st.none() | st.integers(1, 300)))
    options = {
        name: getattr(plan, name)
        for name in ("batch_tokens", "batch_tiles", "seed", "shuffle", "store_order")
    }
    epoch = BatchPlan(plan.counts, sampling=sampling, **options).epoch(3)
    drawn = sampling.draw(np.flatnonzero(plan.counts), plan.seed, 3)
    # Which tiles are drawn depends on their order; how many does not.
    assert len(flat(steps_of(epoch))) == len(drawn)
    assert set(flat(steps_of(epoch))) <= set(
        np.flatnonzero(np.array(weights) * plan.counts).tolist()
    )
    if plan.store_order is None:
        assert sorted(flat(steps_of(epoch))) == sorted(drawn.tolist())


@pytest.mark.parametrize("window", [1, 2048])
def test_copies_of_a_tile_meet_no_more_often_than_in_a_full_shuffle(window):
    classes = np.repeat([0, 1], [990, 10])
    balanced = class_balanced(classes)
    plan = BatchPlan(np.full(1000, 10), batch_tiles=10, sampling=balanced, window_tiles=window)
    steps = steps_of(plan.epoch(0))
    rare = [sum(tile >= 990 for tile in tiles) for tiles in steps]
    assert sum(rare) == 500
    together = sum(len(tiles) - len(set(tiles)) for tiles in steps)
    # Ten tiles of 50 copies: so many pairs, each in one batch with a chance of 9 in 999.
    by_chance = 10 * 50 * 49 / 2 * 9 / 999
    print(f"{together} pairs of copies share a batch; in a full shuffle {by_chance:.0f} would")
    assert together < by_chance + 4 * np.sqrt(by_chance)


WRONG = {
    "both": (
        {"batch_tokens": 9, "batch_tiles": 9},
        "batch_tokens is 9 and batch_tiles is 9; give one",
    ),
    "neither": ({}, "batch_tokens is None and batch_tiles is None; give one of the two"),
    "no tokens": ({"batch_tokens": 0}, "batch_tokens is 0; it must be at least 1"),
    "no blocks": ({"batch_tiles": 2, "block_tiles": 0}, "block_tiles is 0; it must be at least 1"),
    "balance": ({"batch_tiles": 2, "balance": "cubes"}, "balance is 'cubes'; it is 'tokens' or"),
    "too large": (
        {"batch_tokens": 7},
        "tile 1 has 8 tokens, batch_tokens is 7; raise it, or set max_tokens_per_tile to at most that",
    ),
    "weights": (
        {"batch_tiles": 2, "sampling": Sampling(np.ones(2))},
        "sampling has 2 weights for 3 tiles; give one per tile",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be_are_refused(name):
    options, message = WRONG[name]
    with pytest.raises(ConfigError) as error:
        BatchPlan(np.array([1, 8, 3]), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_store_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="none of the 3 tiles has a token"):
        BatchPlan(np.zeros(3, int), batch_tiles=1)


def test_steps_outside_the_epoch_are_refused():
    epoch = BatchPlan(np.ones(4, int), batch_tiles=2).epoch(0)
    for step in (-1, 2):
        with pytest.raises(IndexError, match=r"steps 0 \.\.\. 1"):
            epoch.tiles(step)
