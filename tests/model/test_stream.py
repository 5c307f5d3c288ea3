"""Streams of batches: their order, their threads, and what stops them."""

import gc
import json
import signal
import subprocess
import sys
import threading
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.schedule import Position, Ranks, Schedule
from model.data.stream import BatchStream
from pipeline.errors import ConfigError, StoreError
from streams import numbered, reading_threads, taken

settings_of_threads = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(
    lambda pair: {"threads": pair[0], "ahead": sum(pair)}
)


def planned(stream, epoch):
    """Tiles of every step, as the plan says."""
    schedule = stream.schedule
    steps = range(schedule.num_steps(epoch))
    return [schedule.tiles(Position(epoch, step), Ranks(0, 1)).tolist() for step in steps]


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Collecting the garbage of torch's own objects takes half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_thread_stays():
    """Every test leaves as many threads as it found: none."""
    yield
    gc.collect()
    assert reading_threads() == []


@settings(max_examples=40)
@given(how=settings_of_threads, num_tiles=st.integers(1, 60), batch_tiles=st.integers(1, 20))
def test_batches_come_in_the_plans_order_for_any_number_of_threads(how, num_tiles, batch_tiles):
    stream = BatchStream(numbered(num_tiles), batch_tiles=batch_tiles, seed=3, **how)
    for epoch in range(3):
        assert len(stream) == len(planned(stream, epoch))
        batches = list(stream)
        assert [batch.tiles for batch in batches] == planned(stream, epoch)
        assert {batch.draw for batch in batches} == {(3, epoch)}
        assert (stream.epoch, stream.step) == (epoch + 1, 0)


def test_a_stream_counts_what_it_handed_out_and_not_what_it_read():
    stream = BatchStream(numbered(100), batch_tiles=10, ahead=4)
    for number, _ in enumerate(stream, start=1):
        position = (1, 0) if number == 10 else (0, number)
        assert (stream.epoch, stream.step) == position
        assert (stream.state_dict()["epoch"], stream.state_dict()["step"]) == position


@pytest.mark.parametrize("token_budget", [False, True])
def test_a_loop_taken_up_again_gives_the_rest_of_the_epoch(token_budget):
    size = {"batch_tokens": 1000} if token_budget else {"batch_tiles": 10}
    stream = BatchStream(numbered(100), **size)
    whole = planned(stream, 0) + planned(stream, 1)
    seen = []
    while len(seen) < len(whole):
        seen += [batch.tiles for batch in islice(stream, 3)]
    assert seen[: len(whole)] == whole


@settings(max_examples=30)
@given(
    stop=st.integers(0, 40),
    first=settings_of_threads,
    second=settings_of_threads,
    tokens=st.booleans(),
)
def test_a_stream_goes_on_where_another_was(stop, first, second, tokens):
    size = {"batch_tokens": 1000} if tokens else {"batch_tiles": 7}
    expected = taken(BatchStream(numbered(50), seed=5, **size), epochs=5)
    interrupted = BatchStream(numbered(50), seed=5, **size, **first)
    seen = []
    while len(seen) < stop:
        seen += [batch.tiles for batch in islice(interrupted, stop - len(seen))]
    state = json.loads(json.dumps(interrupted.state_dict()))
    interrupted.close()
    resumed = BatchStream(numbered(50), seed=5, **size, **second)
    resumed.load_state_dict(state)
    rest = taken(resumed, epochs=5)
    assert (seen + rest)[: len(expected)] == expected


def test_every_window_is_announced_once_before_it_is_read():
    dataset = numbered(9000)
    stream = BatchStream(dataset, batch_tiles=64)
    taken(stream)
    stream.close()
    windows = []
    for step in range(141):
        window = stream.schedule.coming(Position(0, step), Ranks(0, 1)).tolist()
        if window not in windows:
            windows.append(window)
    assert len(windows) == 5
    assert dataset.hinted[:5] == windows


def test_a_rank_announces_its_own_tiles():
    dataset = numbered(100)
    stream = BatchStream(dataset, batch_tiles=10, rank=1, world_size=2, threads=1)
    taken(stream)
    stream.close()
    assert dataset.hinted[:10] == dataset.read[:10]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_smallest_step_has_a_tile_for_every_rank(world_size):
    ranks = {"rank": 0, "world_size": world_size}
    stream = BatchStream(numbered(21), batch_tiles=10, **ranks)
    if world_size == 1:
        assert len(taken(stream)) == 3
    else:
        with pytest.raises(ConfigError, match="a step of 1 tiles for 2 ranks; set drop_last"):
            taken(stream)


def test_reading_ahead_is_bounded():
    dataset = numbered(1000)
    stream = BatchStream(dataset, batch_tiles=2, threads=2, ahead=5)
    for number, _ in enumerate(stream, start=1):
        assert number <= len(dataset.read) <= number + 5
    stream.close()


def test_the_next_epoch_is_being_read_when_one_ends():
    dataset = numbered(20)
    stream = BatchStream(dataset, batch_tiles=5, threads=1, ahead=3)
    first = taken(stream)
    second = iter(stream)
    next(second)
    stream.close()
    assert dataset.read[:4] == first
    assert all(len(batch) == 5 for batch in dataset.read)
    # Nothing was read twice, as it would be if the end of the epoch had thrown batches away.
    assert dataset.read[4:8] == planned(stream, 1)[: len(dataset.read[4:8])]


@pytest.mark.parametrize("how", ["break", "error", "close", "del", "interrupt"])
def test_leaving_a_loop_early_ends_the_threads(how):
    stream = BatchStream(numbered(), batch_tiles=3, threads=2)
    caught = None
    try:
        for batch in stream:
            assert reading_threads()
            assert batch.tiles
            if how == "break":
                break
            if how == "error":
                raise RuntimeError("the loop's own")
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)
            if how == "close":
                stream.close()
                break
            if how == "del":
                del stream
                break
    except (RuntimeError, KeyboardInterrupt) as error:
        caught = type(error)
    assert caught == {"error": RuntimeError, "interrupt": KeyboardInterrupt}.get(how)
    assert reading_threads() == []


def test_a_stream_in_a_reference_cycle_ends_with_the_garbage():
    stream = BatchStream(numbered(), batch_tiles=3)
    batches = iter(stream)
    next(batches)
    cycle = {"stream": stream, "batches": batches}
    cycle["cycle"] = cycle
    del stream, batches, cycle
    gc.collect()


def test_the_garbage_may_be_collected_in_one_of_the_stream_s_own_threads():
    collecting = threading.Event()

    class Collects(type(numbered())):
        def batch(self, indices, **how):
            if collecting.is_set():
                gc.collect()
            return super().batch(indices, **how)

    gc.disable()
    try:
        for _ in range(10):
            collecting.clear()
            stream = BatchStream(Collects(numbered().counts), batch_tiles=1, threads=2)
            batches = iter(stream)
            next(batches)
            cycle = [stream, batches]
            cycle.append(cycle)
            other = BatchStream(Collects(numbered().counts), batch_tiles=10, threads=2)
            del stream, batches, cycle
            collecting.set()
            assert len(list(other)) == 10
            other.close()
    finally:
        gc.enable()


def test_what_a_reader_raises_comes_at_its_step_and_the_stream_can_go_on():
    dataset = numbered(40)
    stream = BatchStream(dataset, batch_tiles=4, threads=3, ahead=4)
    whole = planned(stream, 0)
    dataset.fails = {whole[5][2]}
    seen = []
    for _ in range(3):
        with pytest.raises(OSError, match=f"tile {whole[5][2]}: the disk is gone"):
            seen += (batch.tiles for batch in stream)
        assert (stream.epoch, stream.step) == (0, 5)
        assert reading_threads() == []
    dataset.fails = set()
    assert seen + taken(stream) == whole


def test_tiles_that_are_skipped_are_counted_and_change_nothing_else():
    dataset = numbered(40, fails={3, 17, 20})
    stream = BatchStream(dataset, batch_tiles=4, on_error="skip-tile")
    expected = [[t for t in tiles if t not in dataset.fails] for tiles in planned(stream, 0)]
    assert taken(stream) == expected
    assert stream.skipped == 3


def test_only_the_newest_iterator_goes_on():
    stream = BatchStream(numbered(30), batch_tiles=3)
    whole = planned(stream, 0)
    old = iter(stream)
    seen = [next(old).tiles]
    new = iter(stream)
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(old)
    assert seen + [batch.tiles for batch in new] == whole


def test_an_iterator_that_is_never_asked_changes_nothing():
    """Lightning makes one more than it uses."""
    stream = BatchStream(numbered(30), batch_tiles=3)
    iter(stream)
    unused = iter(stream)
    assert reading_threads() == []
    assert taken(stream) == planned(stream, 0)
    del unused


@settings(max_examples=30)
@given(world_size=st.integers(1, 5), num_tiles=st.sampled_from([30, 35, 59, 60]))
def test_the_ranks_of_a_step_read_its_tiles_each_once(world_size, num_tiles):
    whole = planned(BatchStream(numbered(num_tiles), batch_tiles=10), 0)
    of_ranks = [
        taken(BatchStream(numbered(num_tiles), batch_tiles=10, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    together = [sorted(chain(*step)) for step in zip(*of_ranks, strict=True)]
    assert together == [sorted(tiles) for tiles in whole]


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"fingerprint": "0" * 64}, StoreError, r"other data.*open the same store"),
        (
            {"fingerprint": "0" * 64, "commits": [7]},
            StoreError,
            r"other data.*TileDataset\(store, commit=7\)",
        ),
        ({"version": 2}, ConfigError, "version 2; this aptile reads version 1"),
        ({"seed": 1}, ConfigError, "made with seed=1, this stream has seed=0"),
        ({"batch_tiles": 8}, ConfigError, "batch_tiles=8, this stream has batch_tiles=10"),
        ({"shuffle": False}, ConfigError, "give shuffle=False, or start anew"),
        ({"drop_last": True}, ConfigError, "drop_last=True"),
        ({"epoch": -1}, ConfigError, "epoch -1"),
        ({"step": 10}, ConfigError, "step 10"),
        ({"step": None}, ConfigError, "step None"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(changed, error, said):
    stream = BatchStream(numbered(100), batch_tiles=10)
    seen = [batch.tiles for batch in islice(stream, 4)]
    state = stream.state_dict()
    with pytest.raises(error, match=said) as refused:
        stream.load_state_dict({**state, **changed})
    assert "\n" not in str(refused.value)
    assert stream.state_dict() == state
    assert seen + taken(stream) == planned(stream, 0)


def test_a_state_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="version None"):
        BatchStream(numbered(), batch_tiles=10).load_state_dict({})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "give both"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
        ({"rank": -1, "world_size": 2}, "0 <= rank < world_size"),
        ({"threads": 0}, "1 <= threads <= ahead"),
        ({"threads": 4, "ahead": 3}, "1 <= threads <= ahead"),
        ({"ahead": 0}, "1 <= threads <= ahead"),
        ({"on_error": "ignore"}, "on_error is 'ignore'.*'raise' or 'skip-tile'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        BatchStream(numbered(), batch_tiles=10, **settings)


STARTS_AND_STOPS = """
import gc, signal, sys, threading
from itertools import islice
sys.path[:0] = {path!r}
from model.data.stream import BatchStream
from streams import numbered, reading_threads

gc.collect()
gc.freeze()  # collecting torch's own objects takes half a second each time

def interrupted(stream):
    timer = threading.Timer(0.001, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        while True:
            for batch in stream:
                pass
    except KeyboardInterrupt:
        pass

stream, counts = None, {{}}
for number in range({number}):
    how = ("break", "close", "garbage", "whole epoch", "error", "Ctrl-C")[number % 6]
    counts[how] = counts.get(how, 0) + 1
    stream = BatchStream(numbered(40), batch_tiles=4, threads=1 + number % 4, ahead=4)
    if how == "Ctrl-C":
        interrupted(stream)
        continue
    batches = iter(stream)
    seen = list(islice(batches, number % 5))
    if how == "close":
        stream.close()
    elif how == "garbage":
        cycle = [stream, batches]
        cycle.append(cycle)
        del stream, batches, cycle
        gc.collect()
        assert reading_threads() == [], reading_threads()
    elif how == "whole epoch":
        list(batches)
    elif how == "error":
        stream.dataset.fails = set(range(40))
        try:
            list(batches)
        except OSError:
            pass
        assert reading_threads() == [], reading_threads()
left_over = iter(BatchStream(numbered(1000), batch_tiles=1))
next(left_over)
print(sum(counts.values()), "starts and stops:", counts, "0 hangs")
"""


def start_and_stop(number):
    script = STARTS_AND_STOPS.format(number=number, path=sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        # Not a limit of speed: a process that hangs would never end.
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    print(done.stdout)
    assert done.stdout.startswith(f"{number} starts and stops")


def test_no_start_and_stop_hangs_nor_does_the_end_of_the_process():
    start_and_stop(30)


@pytest.mark.full
def test_no_start_and_stop_hangs_in_many():
    start_and_stop(200)


def test_a_schedule_is_asked_by_many_threads_at_once():
    schedule = Schedule(numbered(200), batch_tiles=10, seed=0)
    expected = {
        epoch: planned(BatchStream(numbered(200), batch_tiles=10), epoch) for epoch in range(4)
    }
    wrong = []

    def ask(first):
        for number in range(200):
            at = Position((first + number) % 4, number % 20)
            if schedule.tiles(at, Ranks(0, 1)).tolist() != expected[at.epoch][at.step]:
                wrong.append(at)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
