"""Tiles of a real store, and batches of them."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from model.data import BatchStream, TileDataset
from model.data.schedule import Position, Ranks
from pipeline import segments
from pipeline.errors import ConfigError, StoreError
from pipeline.store import open_store


@pytest.fixture(scope="module")
def dataset(chip_store):
    return TileDataset(chip_store)


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
    stream = BatchStream(dataset, batch_tiles=4, seed=1)
    for step, batch in enumerate(stream):
        tiles = stream.schedule.tiles(Position(0, step), Ranks(0, 1))
        expected = dataset.batch(tiles, draw=(1, 0))
        (found,), (wanted,) = batch.modalities, expected.modalities
        assert torch.equal(found.band_sets[0].pixels, wanted.band_sets[0].pixels)
        assert torch.equal(batch.scales, expected.scales)
        assert batch.tile_indices.tolist() == tiles.tolist()
    stream.close()


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
assert "torch._dynamo" not in sys.modules, "reading loads the compiler"
encoder = model.APTEncoder(model.EncoderConfig.for_store(dataset.store))
tokens = encoder(batch).tokens
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
