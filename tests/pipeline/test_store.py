import json
import shutil

import numpy as np
import pytest
import xarray as xr

from pipeline import open_store, segments
from pipeline.errors import IntegrityError, StoreError
from support import reseal

pytestmark = pytest.mark.usefixtures("kept_workers")

SET = {"name": "", "bands": ["b"], "dtype": "uint16", "tile_size_px": 128}


@pytest.fixture
def damaged(chip_store, tmp_path):
    """A copy of the chip's store that a test may spoil."""
    return shutil.copytree(chip_store, tmp_path / "copy")


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
    # With the first commit alone, its writer may have been stopped just before it became visible.
    with pytest.raises(StoreError, match="has not finished; run its `aptile preprocess` command"):
        open_store(damaged)
    shutil.copy(damaged / "commits" / "000001.json", damaged / "commits" / "000002.json")
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
