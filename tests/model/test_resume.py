"""The proof that a run that was stopped sees the same samples as one that was not, written to two files."""

import json
import random
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import DataLoader

from model.data import BatchStream, TileDataset, TokenBatches
from pipeline.errors import StoreError
from streams import numbered, steps_of
from support import aptile, save_scene, textured
from training_processes import SERVER, exit_codes, read_until

SIZES = [{"batch_tiles": 5}, {"batch_tokens": 1500}]
STEPS = 60


def source():
    return numbered(100)


def lines(batches):
    """One line per step: ids of its tiles."""
    return [" ".join(f"t{tile}" for tile in sorted(tiles)) + "\n" for tiles in batches]


def tiles_of(stream, number):
    """Tiles of the next `number` steps."""
    return [batch.tiles for batch in steps_of(stream, number)]


def resumed(state, size, ranks=1, **how):
    """Streams of all ranks at a state that went through a file."""
    kept = None if state is None else json.loads(json.dumps(state))
    streams = [
        BatchStream(source(), seed=2, **size, rank=rank, world_size=ranks, **how)
        for rank in range(ranks)
    ]
    for stream in streams if kept else []:
        stream.load_state_dict(kept)
    return streams


def write_ids(path, parts):
    """Steps of all parts of a run, one after another, into one file."""
    path.write_text("".join(line for part in parts for line in lines(part)))
    return path.read_bytes()


def stop_anywhere(tmp_path, size, number):
    """Runs stopped at random steps, in between and at the ends of epochs, by any number of threads."""
    chance = random.Random(7)  # noqa: S311
    whole = write_ids(tmp_path / "whole.txt", [tiles_of(resumed(None, size)[0], STEPS)])
    for _ in range(number):
        stops = sorted(chance.sample(range(1, STEPS), chance.randint(1, 3)))
        parts, state = [], None
        for begin, end in zip([0, *stops], [*stops, STEPS], strict=True):
            threads = chance.randint(1, 4)
            ranks = chance.choice([1, 1, 2])
            streams = resumed(state, size, ranks, threads=threads, ahead=threads + 1)
            of_ranks = [tiles_of(stream, end - begin) for stream in streams]
            parts.append([sum(step, []) for step in zip(*of_ranks, strict=True)])  # noqa: RUF017
            (state,) = {json.dumps(stream.state_dict()) for stream in streams}
            state = json.loads(state)
            for stream in streams:
                stream.close()
        assert write_ids(tmp_path / "stopped.txt", parts) == whole
    print(f"{number} runs stopped at random steps: {number} files of ids equal, byte for byte")


@pytest.mark.parametrize("size", SIZES, ids=["tiles", "tokens"])
def test_ids_of_stopped_runs_are_those_of_the_one_that_was_not(tmp_path, size):
    stop_anywhere(tmp_path, size, 5)


@pytest.mark.full
@pytest.mark.parametrize("size", SIZES, ids=["tiles", "tokens"])
def test_ids_of_many_stopped_runs_are_those_of_the_one_that_was_not(tmp_path, size):
    stop_anywhere(tmp_path, size, 50)


@pytest.mark.parametrize("size", SIZES, ids=["tiles", "tokens"])
def test_one_rank_then_two_then_four_see_the_same_samples_per_step(tmp_path, size):
    whole = write_ids(tmp_path / "whole.txt", [tiles_of(resumed(None, size)[0], STEPS)])
    parts, state = [], None
    for ranks in (1, 2, 4):
        streams = resumed(state, size, ranks)
        of_ranks = [tiles_of(stream, STEPS // 3) for stream in streams]
        parts.append([sum(step, []) for step in zip(*of_ranks, strict=True)])  # noqa: RUF017
        state = streams[-1].state_dict()
    assert write_ids(tmp_path / "grown.txt", parts) == whole


def test_worker_processes_go_on_where_threads_were(tmp_path):
    whole = write_ids(tmp_path / "whole.txt", [tiles_of(resumed(None, SIZES[0])[0], 20)])
    (stream,) = resumed(None, SIZES[0])
    first = tiles_of(stream, 7)
    dataset = TokenBatches(source(), seed=2, **SIZES[0])
    dataset.load_state_dict(stream.state_dict())
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=SERVER)
    assert write_ids(tmp_path / "stopped.txt", [first, [b.tiles for b in loader]]) == whole


def test_a_killed_process_goes_on_in_another(chip_store, tmp_path):
    """State and ids are written after every step; the process ends without any clean-up."""
    files = [tmp_path / "ids.txt", tmp_path / "state.json"]
    assert exit_codes(read_until, [(chip_store, *files, 12, 7)]) == [9]
    assert exit_codes(read_until, [(chip_store, *files, 12, None)]) == [0]
    whole = ids(BatchStream(TileDataset(chip_store), batch_tiles=2, seed=3), 12)
    assert files[0].read_text() == "".join(" ".join(step) + "\n" for step in whole)


@pytest.fixture
def growing_store(tmp_path):
    """A store of one scene, and a function that appends another one to it."""
    archive, store = tmp_path / "archive", tmp_path / "store"
    save_scene(archive / "a.tif", textured((2, 256, 256), 1))
    (tmp_path / "config.yaml").write_text("store: {tile_size_px: 64}\n")

    def preprocess(*options):
        command = ["preprocess", archive, store, "--config", tmp_path / "config.yaml"]
        assert aptile(*command, "--workers", 1, *options) == 0

    def append():
        save_scene(archive / "b.tif", textured((2, 256, 256), 2))
        preprocess("--append")

    preprocess()
    return store, append


def test_what_is_appended_is_invisible_while_training_and_refused_afterwards(growing_store):
    store, append = growing_store
    expected = ids(BatchStream(TileDataset(store), batch_tiles=3), 12)
    stream = BatchStream(TileDataset(store), batch_tiles=3)
    seen = ids(stream, 4)
    state = stream.state_dict()
    append()
    assert seen + ids(stream, 8) == expected
    newest = TileDataset(store)
    assert len(newest) > len(stream.dataset)
    with pytest.raises(StoreError, match=r"TileDataset\(store, commit=1\), or start anew"):
        BatchStream(newest, batch_tiles=3).load_state_dict(state)
    pinned = BatchStream(TileDataset(store, commit=1), batch_tiles=3)
    pinned.load_state_dict(state)
    assert seen + ids(pinned, 8) == expected


def ids(stream, number):
    """Tile ids of the next steps."""
    names = stream.dataset.tile_ids
    return [names[batch.tile_indices.numpy()].tolist() for batch in steps_of(stream, number)]


def test_pixels_of_a_resumed_run_are_those_of_the_one_that_was_not(chip_store):
    """Memory that is used again holds nothing of the batch before."""

    def pixels(batches):
        return [batch.modalities[0].band_sets[0].pixels.numpy().copy() for batch in batches]

    whole = pixels(BatchStream(TileDataset(chip_store), batch_tiles=2))
    first = BatchStream(TileDataset(chip_store), batch_tiles=2)
    parts = pixels(islice(first, 2))
    second = BatchStream(TileDataset(chip_store), batch_tiles=2, threads=3)
    second.load_state_dict(first.state_dict())
    parts += pixels(second)
    assert all(np.array_equal(a, b) for a, b in zip(parts, whole, strict=True))
