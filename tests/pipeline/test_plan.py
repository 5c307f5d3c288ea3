import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.archive import Scene
from pipeline.config import DataConfig, StoreConfig
from pipeline.errors import ArchiveError
from pipeline.plan import SLOT_MULTIPLE, accept, make_plan, tile_order

SCENE = Scene(
    id="a",
    path="a.tif",
    fingerprint="1-1",
    height=300,
    width=500,
    num_bands=3,
    dtype="uint16",
    nodata=(None,) * 3,
    block_shape=(256, 256),
    crs=None,
    transform=None,
    ground_sample_distance_m=None,
)
sizes = st.integers(1, 1500)


@given(sizes, sizes, st.sampled_from([16, 64, 128]), sizes, sizes)
def test_every_tile_of_a_scene_comes_exactly_once(height, width, tile, block_h, block_w):
    order = tile_order(height, width, tile, (block_h, block_w))
    rows, cols = -(-height // tile), -(-width // tile)
    assert sorted(map(tuple, order.tolist())) == list(np.ndindex(rows, cols))


@given(st.integers(1, 8), st.integers(1, 8))
def test_tiles_of_one_block_are_neighbours_in_the_order(block_rows, block_cols):
    order = tile_order(1024, 1024, 64, (64 * block_rows, 64 * block_cols))
    block = [(row // block_rows, col // block_cols) for row, col in order.tolist()]
    changes = sum(a != b for a, b in itertools.pairwise(block))
    assert changes == len(set(block)) - 1


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=6), st.integers(1, 600))
def test_shards_hold_every_tile_in_a_slot_of_its_own(shapes, shard_tiles):
    config = DataConfig(store=StoreConfig(shard_tiles=shard_tiles))
    scenes = [replace(SCENE, id=str(i), height=h, width=w) for i, (h, w) in enumerate(shapes)]
    plan = make_plan(config, scenes)
    parts = [plan.shard_tiles(shard) for shard in range(plan.num_shards)]
    assert all(0 < len(part) <= plan.shard_capacity for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), plan.tiles)
    assert plan.shard_capacity <= -(-shard_tiles // SLOT_MULTIPLE) * SLOT_MULTIPLE
    ids = [plan.tile_id(tile) for tile in plan.tiles]
    assert len(set(ids)) == len(ids)


def test_shards_are_of_equal_size():
    config = DataConfig(store=StoreConfig(tile_size_px=16, shard_tiles=512))
    plan = make_plan(config, [replace(SCENE, height=320, width=480)])
    assert len(plan.tiles) == 600
    assert [len(plan.shard_tiles(k)) for k in range(plan.num_shards)] == [304, 296]


def test_scenes_that_contradict_each_other_are_refused():
    with pytest.raises(ArchiveError, match=r"number of bands: 3 \(a.tif\), 4 \(b.tif\)"):
        accept(DataConfig(), [SCENE, replace(SCENE, id="b", path="b.tif", num_bands=4)])
    with pytest.raises(ArchiveError, match="pixel type: int16.*uint16"):
        accept(DataConfig(), [SCENE, replace(SCENE, id="b", path="b.tif", dtype="int16")])


def test_a_configured_modality_decides_which_scenes_belong():
    config = DataConfig.model_validate({"modality": {"bands": ["r", "g", "b"]}})
    accepted, refused = accept(config, [SCENE, replace(SCENE, id="b", num_bands=4)])
    assert [scene.id for scene in accepted] == ["a"]
    assert refused == {"b": "has 4 bands; modality image has 3"}


def test_settings_about_bands_are_checked_against_the_scenes():
    with pytest.raises(ArchiveError, match=r"names \['B02'\].*has band_1, band_2, band_3"):
        accept(DataConfig.model_validate({"scoring": {"bands": ["B02"]}}), [SCENE])
    ranges = {"modality": {"value_range": [[0, 1], [0, 1]]}}
    with pytest.raises(ArchiveError, match="has 2 pairs"):
        accept(DataConfig.model_validate(ranges), [SCENE])
