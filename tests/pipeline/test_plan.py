import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError
from pipeline.planning.bands import conform
from pipeline.planning.plan import SHARD_BYTES, SLOT_MULTIPLE, make_plan, tile_order
from pipeline.planning.stacks import make_stacks
from pipeline.scenes import Asset, Grid, Plane, Scene
from pipeline.settings.config import DataConfig
from support import header

UNKNOWN = (None, None)
sizes = st.integers(1, 1500)


def plan_of(config, scenes):
    stacks = make_stacks(config, scenes).stacks
    return make_plan(config, stacks, dict.fromkeys(scenes, UNKNOWN))


def config(**sections):
    return DataConfig.model_validate(sections)


def utm(height, width, size=10):
    return Grid(height, width, "EPSG:32632", (size, 0, 5e5, 0, -size, 5e6))


@given(sizes, sizes, st.sampled_from([16, 64, 128]), sizes, sizes)
def test_every_tile_of_a_place_comes_exactly_once(height, width, tile, block_h, block_w):
    order = tile_order(height, width, tile, (block_h, block_w))
    rows, cols = -(-height // tile), -(-width // tile)
    assert sorted(map(tuple, order.tolist())) == list(np.ndindex(rows, cols))


@given(st.integers(1, 8), st.integers(1, 8))
def test_tiles_of_one_block_are_neighbours_in_the_order(block_rows, block_cols):
    order = tile_order(1024, 1024, 64, (64 * block_rows, 64 * block_cols))
    block = [(row // block_rows, col // block_cols) for row, col in order.tolist()]
    changes = sum(a != b for a, b in itertools.pairwise(block))
    assert changes == len(set(block)) - 1


place = st.tuples(sizes, sizes, st.lists(st.booleans(), min_size=1, max_size=4))


@given(st.lists(place, min_size=1, max_size=5), st.integers(1, 60))
def test_every_frame_has_a_slot_of_its_own_in_its_tiles_shard(places, shard_tiles):
    """Places of any size, each with its own dates; the second modality lacks some of them."""
    settings = config(
        modalities={"s2": {}, "s1": {"adaptive": False}}, store={"shard_tiles": shard_tiles}
    )
    scenes = {"s2": [], "s1": []}
    for number, (height, width, dates) in enumerate(places):
        for day, has_s1 in enumerate(dates, start=1):
            facts = {
                "grid": Grid(height, width, None, None),
                "datetime": f"2020-01-{day:02}T00:00:00Z",
                "place": f"p{number}",
            }
            scenes["s2"].append(header(f"s2:{number}-{day}", modality="s2", **facts))
            if has_s1:
                scenes["s1"].append(header(f"s1:{number}-{day}", modality="s1", **facts))
    if not scenes["s1"]:
        return
    plan = plan_of(settings, scenes)
    assert plan.shard_tiles <= -(-shard_tiles // SLOT_MULTIPLE) * SLOT_MULTIPLE
    ids = [plan.tile_id(tile) for tile in range(len(plan.tiles))]
    assert len(set(ids)) == len(ids) == sum(-(-h // 128) * -(-w // 128) for h, w, _ in places)
    for name in ("s2", "s1"):
        capacity = plan.modalities[name].layout.shard_capacity
        for shard in range(plan.num_shards):
            tiles = plan.tile_range(shard)
            frames = plan.frames(name, tiles)
            assert (frames["slot"] // capacity == shard).all()
            assert len(np.unique(frames["slot"])) == len(frames)
            expected = {
                (tile, timestep, scene.id)
                for tile in tiles
                for timestep, scene in enumerate(
                    plan.stacks[plan.tiles[tile]["stack"]].scenes[name]
                )
                if scene is not None
            }
            used = plan.modalities[name].scenes
            found = [(f["tile"], f["timestep"], used[f["scene"]].id) for f in frames]
            assert set(found) == expected
            # A tile's frames are neighbours, in the order of time.
            assert found == sorted(found, key=lambda f: (f[0], f[1]))


alike = st.tuples(st.sampled_from([40, 100]), st.sampled_from([60, 90]), st.sampled_from([16, 64]))


@given(st.lists(st.tuples(alike, st.integers(1, 3)), min_size=1, max_size=8), st.integers(1, 20))
def test_places_that_are_alike_have_the_tiles_and_frames_of_each_alone(places, shard_tiles):
    settings = config(store={"tile_size_px": 16, "shard_tiles": shard_tiles})
    scenes = [
        header(f"{number}-{day}", grid=Grid(height, width, None, None), block=(block, block),
               place=f"p{number}", datetime=f"2020-01-{day:02}T00:00:00Z")
        for number, ((height, width, block), days) in enumerate(places)
        for day in range(1, days + 1)
    ]  # fmt: skip
    plan = plan_of(settings, {"image": scenes})
    for number, ((height, width, block), _) in enumerate(places):
        own = plan.tiles[plan.tiles["stack"] == number]
        order = tile_order(height, width, 16, (block, block))
        assert np.array_equal(np.stack([own["row"], own["col"]], axis=1), order)
    assert (np.diff(plan.tiles["stack"]) >= 0).all()
    whole = plan.frames("image", range(len(plan.tiles)))
    parts = [plan.frames("image", plan.tile_range(shard)) for shard in plan.shards]
    assert whole.tobytes() == b"".join(part.tobytes() for part in parts)


def travelled(thing):
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 (what this very line made)


@given(st.builds(Scene))
def test_scenes_travel_whole(scene):
    assert repr(travelled(scene)) == repr(scene)


def test_what_scenes_share_travels_once():
    shared = utm(300, 500)
    first, second = (header(name, grid=shared) for name in "ab")
    first, second = travelled((first, second))
    assert first.assets[0].grid is second.assets[0].grid
    assert first.assets[0].grid == shared


def test_shards_are_of_equal_size():
    settings = config(store={"tile_size_px": 16, "shard_tiles": 512})
    plan = plan_of(settings, {"image": [header("a", grid=Grid(320, 480, None, None))]})
    assert len(plan.tiles) == 600
    assert [len(plan.tile_range(shard)) for shard in range(plan.num_shards)] == [304, 296]


def test_long_series_get_smaller_shards():
    scenes = [
        header(f"a{day}", bands=("b",) * 1, grid=Grid(4096, 4096, None, None), place="p",
               datetime=f"2020-01-{day:02}T00:00:00Z")
        for day in range(1, 29)
    ]  # fmt: skip
    plan = plan_of(config(), {"image": scenes})
    layout = plan.modalities["image"].layout
    assert plan.shard_tiles == 512
    assert layout.shard_capacity * layout.frame_bytes <= SHARD_BYTES * 1.1
    many = config(store={"tile_size_px": 1024})
    plan = plan_of(many, {"image": scenes})
    layout = plan.modalities["image"].layout
    assert plan.shard_tiles * 28 * layout.frame_bytes <= SHARD_BYTES


def native(name="a", **grids):
    assets = tuple(
        Asset(f"/{band}.tif", "raster", grid, "uint16", (Plane(band, 0),), (256, 256), "1-1")
        for band, grid in grids.items()
    )
    return Scene(name, "image", assets)


NATIVE = {
    "modality": {
        "bands": ["B02", "B05", "B09"],
        "band_sets": {"10m": ["B02"], "20m": ["B05"], "60m": ["B09"]},
    },
    "scoring": {"bands": ["B02"]},
    "store": {"tile_size_px": 96},
}


def test_bands_of_several_resolutions_keep_their_grids():
    scene = native(B02=utm(1200, 1200), B05=utm(600, 600, 20), B09=utm(200, 200, 60))
    layout = plan_of(config(**NATIVE), {"image": [scene]}).modalities["image"].layout
    shapes = [(s.name, s.bands, s.tile_size_px) for s in layout.band_sets]
    assert shapes == [("", ("B02",), 96), ("20m", ("B05",), 48), ("60m", ("B09",), 16)]
    assert layout.grid.shape_px == (96, 96)


def test_scoring_happens_on_the_grid_of_the_chosen_bands():
    scene = native(B02=utm(1200, 1200), B05=utm(600, 600, 20), B09=utm(200, 200, 60))
    coarse = {**NATIVE, "scoring": {"bands": ["B05"]}}
    layout = plan_of(config(**coarse), {"image": [scene]}).modalities["image"].layout
    assert [(s.bands, s.tile_size_px) for s in layout.band_sets] == [
        (("B05",), 48), (("B02",), 96), (("B09",), 16),
    ]  # fmt: skip
    assert layout.grid.shape_px == (48, 48)
    mixed = {**NATIVE, "scoring": {"bands": ["B02", "B05"]}}
    with pytest.raises(
        ArchiveError, match="lie on several grids; choose bands of one: 10m has B02"
    ):
        plan_of(config(**mixed), {"image": [scene]})


def test_tiles_that_cut_through_pixels_are_refused():
    scene = native(B02=utm(1200, 1200), B05=utm(600, 600, 20), B09=utm(200, 200, 60))
    odd = {**NATIVE, "store": {"tile_size_px": 128}}
    with pytest.raises(ArchiveError, match=r"holds 21.3333 px of modality image.*multiple of 6 px"):
        plan_of(config(**odd), {"image": [scene]})
    coarse = {**NATIVE, "scoring": {"bands": ["B09"]}}
    with pytest.raises(
        ArchiveError, match="tile of modality image is 16 px wide.*scoring|16 px wide"
    ):
        plan_of(config(**{**coarse, "partition": {"base_patch_size": 16}}), {"image": [scene]})


def accept(sections, scenes):
    (settings,) = config(**sections).all_modalities()
    return conform(settings, scenes)


def test_bands_on_several_grids_need_band_sets():
    scene = native(B02=utm(1200, 1200), B05=utm(600, 600, 20))
    accepted, refused = accept({}, [scene])
    assert accepted == []
    assert "its bands lie on several grids (1200 x 1200 px" in refused["a"]
    assert "give modality.band_sets" in refused["a"]


def test_scenes_that_contradict_each_other_are_refused():
    with pytest.raises(ArchiveError, match=r"differ in their bands: r \(a\), r, g \(b\)"):
        accept({}, [header("a", bands=("r",)), header("b", bands=("r", "g"))])
    with pytest.raises(ArchiveError, match=r"pixel type: int16 \(b\), uint16 \(a\)"):
        accept({}, [header("a"), header("b", dtype="int16")])


def test_settings_about_bands_are_checked_against_the_scenes():
    scenes = [header("a", bands=("band_1", "band_2"))]
    with pytest.raises(ArchiveError, match=r"names \['B02'\]; a has band_1, band_2"):
        accept({"scoring": {"bands": ["B02"]}}, scenes)
    with pytest.raises(ArchiveError, match="has 3 pairs; give one, or one per band: a has 2 bands"):
        accept({"modality": {"value_range": [[0, 1]] * 3}}, scenes)


def test_a_modality_of_mixed_resolution_is_refused():
    scenes = {
        "s2": [header("s2:a", grid=utm(256, 256), place="p"),
               header("s2:b", grid=utm(256, 256), place="q")],
        "s1": [header("s1:a", grid=utm(128, 128, 20), place="p"),
               header("s1:b", grid=utm(256, 256), place="q")],
    }  # fmt: skip
    with pytest.raises(ArchiveError, match="have pixels 1 and 2 times as long"):
        plan_of(config(modalities={"s2": {}, "s1": {"adaptive": False}}), scenes)
