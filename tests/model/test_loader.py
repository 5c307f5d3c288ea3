"""The same batches through torch's DataLoader and torchdata's, for any number of worker processes."""

import pickle
import warnings
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from model.data.dataset import TileDataset
from model.data.loader import TokenBatches
from model.data.stream import BatchStream
from pipeline.errors import ConfigError, StoreError
from streams import numbered, taken
from training_processes import SERVER

SIZE = {"batch_tiles": 7, "seed": 4}


# torchdata calls what torch has deprecated; torch counts workers against the cores of the machine.
pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated", "ignore:This DataLoader will create"
)


def batches(**settings):
    return TokenBatches(numbered(100), **SIZE, **settings)


def loader(dataset, workers, kind=DataLoader, start=SERVER):
    context = {"multiprocessing_context": start} if workers else {}
    return kind(dataset, batch_size=None, num_workers=workers, **context)


@pytest.fixture(scope="module")
def expected():
    """Tiles of every step of two epochs, as a stream gives them."""
    stream = BatchStream(numbered(100), **SIZE)
    return [taken(stream), taken(stream)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_gives_the_order_of_the_plan(expected, workers):
    dataset = batches()
    assert len(loader(dataset, workers)) == len(expected[0]) == 15
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert taken(loader(dataset, workers)) == expected[epoch]


def test_without_workers_epochs_follow_each_other(expected):
    dataset = batches()
    assert [taken(loader(dataset, 0)) for _ in range(2)] == expected


def test_workers_that_stay_go_on_to_the_next_epoch(expected):
    staying = DataLoader(
        batches(),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=SERVER,
    )
    assert [taken(staying) for _ in range(2)] == expected


@pytest.mark.parametrize(("first", "then"), [(2, 3), (0, 1), (1, 0)])
def test_another_number_of_workers_goes_on_with_the_same_steps(expected, first, then):
    dataset = batches()
    seen = [batch.tiles for batch in islice(loader(dataset, first), 5)]
    again = batches()
    again.load_state_dict(dataset.state_dict(step=5))
    again.set_epoch(0)
    assert seen + taken(loader(again, then)) == expected[0]


def test_states_of_streams_and_of_loaders_are_the_same(expected):
    stream = BatchStream(numbered(100), **SIZE)
    seen = [batch.tiles for batch in islice(stream, 4)]
    dataset = batches()
    dataset.load_state_dict(stream.state_dict())
    assert dataset.state_dict() == stream.state_dict()
    seen += [batch.tiles for batch in islice(loader(dataset, 0), 3)]
    stream.load_state_dict(dataset.state_dict())
    assert seen + taken(stream) == expected[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 6])
def test_a_stateful_loader_goes_on_where_another_was(expected, workers, stop):
    first = loader(batches(), workers, StatefulDataLoader)
    iterator = iter(first)
    seen = [next(iterator).tiles for _ in range(stop)]
    state = pickle.loads(pickle.dumps(first.state_dict()))  # noqa: S301
    del iterator
    again = loader(batches(), workers, StatefulDataLoader)
    again.load_state_dict(state)
    assert seen + taken(again) == expected[0]


def test_workers_read_what_a_stream_reads(chip_store):
    """Pixels, scales and the tensors derived from them, through shared memory."""
    dataset = TileDataset(chip_store)
    through = DataLoader(
        TokenBatches(dataset, **SIZE),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=SERVER,
    )
    for ours, theirs in zip(BatchStream(dataset, **SIZE), through, strict=True):
        assert torch.equal(ours.tile_indices, theirs.tile_indices)
        assert torch.equal(ours.positions, theirs.positions)
        for own, their in zip(ours.cells(0, 0), theirs.cells(0, 0), strict=True):
            assert torch.equal(own, their)


def test_a_forked_worker_says_what_to_do_instead():
    with warnings.catch_warnings():
        # Python's own advice against forking a process with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        forking = loader(batches(), 1, start="fork")
        with pytest.raises(ConfigError, match='multiprocessing_context="spawn" or "forkserver"'):
            next(iter(forking))


def test_ranks_are_those_of_the_process_that_owns_the_loader():
    parts = [taken(loader(batches(rank=rank, world_size=2), 1)) for rank in range(2)]
    whole = taken(BatchStream(numbered(100), **SIZE))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(t) for t in whole]


@pytest.mark.parametrize(
    ("changed", "error"), [({"fingerprint": "0" * 64}, StoreError), ({"seed": 5}, ConfigError)]
)
def test_a_state_that_does_not_fit_is_refused(changed, error):
    dataset = batches()
    with pytest.raises(error):
        dataset.load_state_dict({**dataset.state_dict(), **changed})
