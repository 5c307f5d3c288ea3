"""The order of training, the stream of batches, and tiles of a real store."""

import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data import BatchOrder, BatchStream, TileDataset
from pipeline import segments
from pipeline.errors import ConfigError, StoreError
from pipeline.store import open_store

orders = st.builds(
    BatchOrder,
    num_tiles=st.integers(1, 60),
    batch_tiles=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)


class Recorder:
    """Stands in for a dataset: a batch is the list of its tiles; remembers what was read."""

    def __init__(self, fails_at=None):
        self.read = []
        self.fails_at = fails_at

    def batch(self, tiles):
        self.read.append(tiles.tolist())
        if len(self.read) - 1 == self.fails_at:
            raise OSError("the disk is gone")
        return tiles.tolist()


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("aptile-batches")]


@pytest.fixture(scope="module")
def dataset(chip_store):
    return TileDataset(chip_store)


@given(order=orders, epoch=st.integers(0, 50))
def test_every_tile_comes_exactly_once_per_epoch(order, epoch):
    first = epoch * order.steps_per_epoch
    batches = [order.tiles(first + step) for step in range(order.steps_per_epoch)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(order.num_tiles))
    assert all(len(batch) == order.batch_tiles for batch in batches[:-1])
    assert 0 < len(batches[-1]) <= order.batch_tiles


@given(order=orders, step=st.integers(0, 5000), other=st.integers(0, 5000))
def test_a_batch_depends_on_the_seed_and_the_step_alone(order, step, other):
    expected = order.tiles(step).tolist()
    order.tiles(other)
    again = BatchOrder(order.num_tiles, order.batch_tiles, order.seed)
    assert again.tiles(step).tolist() == expected


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_epochs_and_seeds_shuffle_differently(seed, epoch):
    of_epoch = [BatchOrder(100, 100, seed).tiles(e).tolist() for e in (epoch, epoch + 1)]
    assert of_epoch[0] != of_epoch[1]
    assert BatchOrder(100, 100, seed + 1).tiles(epoch).tolist() != of_epoch[0]


@given(order=orders, stop=st.integers(0, 30), data=st.data())
def test_a_stream_that_starts_late_gives_the_tail(order, stop, data):
    start = data.draw(st.integers(0, stop))
    whole = list(BatchStream(Recorder(), order, 0, stop))
    assert whole == [order.tiles(step).tolist() for step in range(stop)]
    late = BatchStream(Recorder(), order, start, stop)
    assert list(late) == whole[start:]
    assert len(late) == stop


def test_a_stream_can_be_read_twice():
    stream = BatchStream(Recorder(), BatchOrder(10, 3, 0), 0, 6)
    assert list(stream) == list(stream)


class ReadsAtOnce:
    """An executor whose work is done by the time it is submitted."""

    def __init__(self, workers, thread_name_prefix):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, wait, cancel_futures):
        pass


def test_reading_ahead_is_bounded(monkeypatch):
    monkeypatch.setattr("model.data.stream.ThreadPoolExecutor", ReadsAtOnce)
    recorder = Recorder()
    batches = iter(BatchStream(recorder, BatchOrder(10, 3, 0), 0, 1000))
    for taken in range(1, 50):
        next(batches)
        assert taken < len(recorder.read) <= taken + 8


def test_stopping_early_leaves_no_thread_running():
    batches = iter(BatchStream(Recorder(), BatchOrder(10, 3, 0), 0, 1000))
    next(batches)
    assert len(reading_threads()) == 1
    batches.close()
    assert reading_threads() == []


def test_a_failed_read_reaches_the_loop_and_leaves_no_thread_running():
    stream = BatchStream(Recorder(fails_at=2), BatchOrder(10, 3, 0), 0, 1000)
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(stream)
    assert reading_threads() == []


def test_the_dataset_holds_the_tiles_of_the_manifest_in_order(dataset, chip_store):
    store = open_store(chip_store)
    assert len(dataset) == len(store.manifest) == 9
    for i, tile_id in enumerate(store.manifest["id"].to_pylist()):
        tile, expected = dataset[i], store.tile(tile_id)
        assert tile.id == tile_id
        np.testing.assert_array_equal(tile.pixels, expected.pixels)
        np.testing.assert_array_equal(tile.valid, expected.valid)
        np.testing.assert_array_equal(tile.scales[0], expected.scales[0])


def test_a_batch_holds_the_tiles_asked_for_in_that_order(dataset):
    chosen = [7, 0, 4, 0]
    batch = dataset.batch(chosen)
    assert batch.tile_indices.tolist() == chosen
    present = [s[~segments.is_missing(s)] for i in chosen for s in dataset[i].scales]
    assert batch.scales.tolist() == np.concatenate(present).tolist()
    assert batch.cu_seqlens.diff().tolist() == [len(scales) for scales in present]


def test_batch_values_are_the_tiles_pixels_at_their_cells(dataset):
    chosen = [8, 2, 4]
    batch = dataset.batch(chosen)
    grid, (values, valid) = batch.modalities[0].grid, batch.cells(0, 0)
    tiles, p = [dataset[i] for i in chosen], grid.base_patch_size
    rows_per_tile = Counter()
    for row, index in enumerate(batch.cell_index(0).tolist()):
        frame, position = divmod(index, grid.num_cells)
        y, x = grid.cell_yx[position] * p
        window = np.s_[y : y + p, x : x + p]
        # Every tile of this store has one frame.
        tile = tiles[frame]
        np.testing.assert_array_equal(values[row].numpy(), tile.pixels[0][:, *window])
        np.testing.assert_array_equal(valid[row].numpy(), tile.valid[0][window])
        rows_per_tile[frame] += 1
    covered = [segments.run_lengths(t.scales[0])[~segments.is_missing(t.scales[0])] for t in tiles]
    assert [rows_per_tile[i] for i in range(3)] == [lengths.sum() for lengths in covered]


def test_every_valid_pixel_of_the_store_is_in_the_batch_of_all_tiles(dataset):
    batch = dataset.batch(range(len(dataset)))
    values, valid = batch.cells(0, 0)
    assert int(valid.sum()) == 300 * 300
    sums = values.numpy().astype(np.int64) * valid.numpy()[:, None]
    pixels = [np.where(tile.valid, tile.pixels[0].astype(np.int64), 0) for tile in dataset]
    assert sums.sum() == sum(tile.sum() for tile in pixels)


def test_a_stream_over_a_store_gives_its_batches(dataset):
    order = BatchOrder(len(dataset), 4, seed=1)
    for step, batch in enumerate(BatchStream(dataset, order, 0, 4)):
        expected = dataset.batch(order.tiles(step))
        assert torch.equal(batch.cells(0, 0)[0], expected.cells(0, 0)[0])
        assert batch.tile_indices.tolist() == order.tiles(step).tolist()


def test_a_dataset_opens_a_path_or_takes_an_open_store(chip_store):
    store = open_store(chip_store)
    assert TileDataset(store).store is store
    assert len(TileDataset(str(chip_store), modalities=store.modalities[0])) == 9


def test_an_unknown_modality_is_refused_with_the_known_ones(chip_store):
    known = open_store(chip_store).modalities[0]
    with pytest.raises(ConfigError, match=f"no modality 'radar'.*{known}"):
        TileDataset(chip_store, modalities="radar")


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no aptile store here"):
        TileDataset(tmp_path)


def test_training_needs_none_of_the_preprocessing_libraries(chip_store):
    script = """
import sys
for name in ("dask", "distributed", "rasterio", "numba", "shapely"):
    sys.modules[name] = None  # import of it now fails
import model
dataset = model.TileDataset(sys.argv[1])
batch = dataset.batch([0, 8])
encoder = model.APTEncoder(model.EncoderConfig.for_store(dataset.store, "image", "nano"))
tokens = encoder(batch)
tokens.square().mean().backward()
on_grid, covered = model.scatter_to_grid(tokens, batch)
print(len(dataset), batch.num_tokens, tuple(on_grid.shape), bool(tokens.isfinite().all()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, chip_store],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    batch = TileDataset(chip_store).batch([0, 8])
    assert done.stdout == f"9 {batch.num_tokens} (2, 32, 32, 128) True\n"
