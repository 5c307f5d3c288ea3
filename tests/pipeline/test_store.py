import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import open_store, segments
from pipeline.errors import IntegrityError, StoreError
from pipeline.grid import BaseGrid
from pipeline.storage.layout import (
    BandSet,
    StoreLayout,
    array_metadata,
    encode_shard,
    metadata_objects,
)
from support import reseal

LAYOUT = StoreLayout(
    modality="image",
    band_sets=(
        BandSet("", ("red", "nir"), "int16", 16),
        BandSet("20m", ("swir",), "uint8", 8),
    ),
    grid=BaseGrid(4, 4, 4, 2),
    num_shards=2,
    shard_capacity=3,
    codec="lz4",
)


SET = {"name": "", "bands": ["b"], "dtype": "uint16", "tile_size_px": 128}


def written(path):
    for name, content in metadata_objects({}, [LAYOUT], {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


@pytest.fixture
def damaged(chip_store, tmp_path):
    """A copy of the chip's store that a test may spoil."""
    return shutil.copytree(chip_store, tmp_path / "copy")


def test_zarr_reads_what_a_shard_was_encoded_from(tmp_path):
    written(tmp_path / "store")
    rng = np.random.default_rng(0)
    for name, spec in LAYOUT.arrays().items():
        block = rng.integers(0, 2 if spec.dtype == "bool" else 100, spec.shard).astype(spec.dtype)
        path = tmp_path / "store" / name / spec.shard_key(1)
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_shard(array_metadata(spec, "lz4"), block))
        array = zarr.open_array(tmp_path / "store" / name, mode="r")
        np.testing.assert_array_equal(array[spec.shard[0] :], block)
        first = array[: spec.shard[0]]
        np.testing.assert_array_equal(first, np.full_like(first, spec.fill_value))
        assert array.metadata.dimension_names == spec.dims


def test_a_block_of_fill_values_needs_no_object():
    for spec in LAYOUT.arrays().values():
        block = np.full(spec.shard, spec.fill_value, spec.dtype)
        assert encode_shard(array_metadata(spec, "lz4"), block) is None


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["lz4", "zstd"]))
def test_equal_values_encode_to_equal_bytes(seed, codec):
    metadata = array_metadata(LAYOUT.arrays()["image/pixels"], codec)
    block = np.random.default_rng(seed).integers(0, 9, (3, 2, 16, 16)).astype(np.int16)
    assert encode_shard(metadata, block) == encode_shard(metadata, block.copy())


def test_xarray_opens_a_modality_without_a_warning(chip_store):
    dataset = xr.open_zarr(chip_store, group="image")
    assert dataset["pixels"].dims == ("frame", "band", "y", "x")
    assert dataset["valid"].dtype == bool
    assert dataset["score_8"].shape[1:] == (16, 16)
    assert dataset.attrs["bands"] == ["band_1", "band_2", "band_3", "band_4"]
    store = open_store(chip_store)
    tile = store.tile("sentinel2_chip/r0c1")
    np.testing.assert_array_equal(dataset["pixels"][1], tile.pixels[0])


def test_a_tile_comes_with_everything(chip_store):
    store = open_store(chip_store)
    tile = store.tile("sentinel2_chip/r2c2")
    assert tile.pixels.shape == (1, 4, 128, 128)
    assert tile.valid.sum() == (300 - 256) ** 2
    assert [m.shape for m in tile.score_maps] == [(1, 32, 32), (1, 16, 16), (1, 8, 8)]
    leaves = tile.descriptors()
    assert (np.isnan(leaves["score"]) == leaves["missing"]).all()
    row = store.manifest.filter(np.array(store.manifest["id"].to_pylist()) == tile.id).to_pylist()[
        0
    ]
    counts = segments.counts_per_scale(tile.scales[0], 3).tolist()
    assert row["image"]["tokens"] == counts
    assert row["image"]["base_cells"] == np.count_nonzero(~np.isnan(tile.score_maps[0]))
    assert row["image"]["valid_fraction"] == [tile.valid.mean()]
    assert row["image"]["nodata_fraction"] == [1 - tile.valid.mean()]
    assert row["image"]["cloud_fraction"] == [0]


def test_frames_come_in_the_order_asked_for(chip_store):
    store = open_store(chip_store)
    order = np.array([5, 0, 8, 1, 2])
    together = store.read_frames("image", order)
    for position, frame in enumerate(order):
        alone = store.read_frames("image", np.array([frame]))
        np.testing.assert_array_equal(together.pixels[position], alone.pixels[0])
        np.testing.assert_array_equal(together.valid[position], alone.valid[0])
        np.testing.assert_array_equal(together.scales[position], alone.scales[0])


def test_an_unknown_tile_is_named(chip_store):
    with pytest.raises(StoreError, match="no tile 'x'; there are 9, from 'sentinel2_chip/r0c0'"):
        open_store(chip_store).tile("x")


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no aptile store here; make one"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {}}')
    with pytest.raises(StoreError, match="no aptile store here"):
        open_store(tmp_path)


def test_another_format_version_is_refused(damaged):
    file = damaged / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"]["aptile"]["format_version"] = "9.0"
    file.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"format version '9.0'; this aptile reads '0.3'"):
        open_store(damaged)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("../../elsewhere", {}),
        ("image", {"band_sets": [{**SET, "tile_size_px": 2**30}]}),
        ("image", {"band_sets": [{**SET, "tile_size_px": 127}]}),
        ("image", {"band_sets": [{**SET, "name": "20m"}]}),
        ("image", {"band_sets": [SET, {**SET, "name": "../a"}]}),
        ("image", {"band_sets": []}),
        ("image", {"shard_capacity": -1}),
        ("image", {"band_sets": [{**SET, "dtype": "object"}]}),
        ("image", {"band_sets": [{**SET, "bands": ["../b"]}]}),
        ("image", {"num_scales": None}),
    ],
)
def test_a_header_that_names_paths_or_absurd_sizes_is_refused(damaged, name, change):
    header = open_store(damaged).header
    modalities = {name: {**header["modalities"]["image"], **change}}
    reseal(damaged, header={**header, "modalities": modalities})
    with pytest.raises(IntegrityError, match="header cannot be used"):
        open_store(damaged).tile("sentinel2_chip/r0c0")


def test_a_commit_that_names_a_path_as_partition_is_refused(damaged):
    reseal(damaged, partitions={"image": {"../../elsewhere": {"ledgers": []}}})
    with pytest.raises(IntegrityError, match=r"names a partition '../../elsewhere'"):
        open_store(damaged).tile("sentinel2_chip/r0c0")


def test_an_unfinished_store_is_refused(damaged):
    (damaged / "COMMIT.json").unlink()
    with pytest.raises(IntegrityError, match=r"COMMIT.json is missing; the store is damaged"):
        open_store(damaged)
    shutil.rmtree(damaged / "commits")
    with pytest.raises(StoreError, match="has not finished; run its `aptile preprocess` command"):
        open_store(damaged)


@pytest.mark.parametrize("name", ["pixels/c/0/0/0/0", "partitions/default/scales/c/0"])
@pytest.mark.parametrize("damage", ["lost", "truncated"])
def test_a_lost_or_truncated_shard_is_no_data(damaged, name, damage):
    path = damaged / "image" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-10])
    with pytest.raises(IntegrityError, match=r"(is missing|bytes long); the ledger says"):
        open_store(damaged).tile("sentinel2_chip/r0c0")


def test_a_flipped_bit_is_no_data(damaged):
    path = damaged / "image" / "pixels" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="the store is damaged"):
        open_store(damaged).read_frames("image", np.arange(9))
