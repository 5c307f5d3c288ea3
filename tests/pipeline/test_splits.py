"""Splits: no ground in two of them, nor nearer than the buffer; the same whatever else is there."""

import hashlib
import math
from itertools import combinations

import numpy as np
import pytest
import rasterio.warp
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from pipeline.errors import ArchiveError, ConfigError
from pipeline.planning.footprints import footprints
from pipeline.planning.splits import (
    assign_splits,
    block_splits,
    given_splits,
    num_overlapping,
    place_splits,
    split_summary,
    values_by_scene,
)
from pipeline.scenes import Grid, Scene
from pipeline.settings.config import SplitsConfig

# Grids that lie on the same ground: CRS and a position near which they begin.
REGIONS = {
    "two zones": (("EPSG:32632", 7e5, 5.3e6), ("EPSG:32633", 2.5e5, 5.3e6)),
    "antimeridian": (("EPSG:32660", 8e5, 1e6), ("EPSG:32701", 1.7e5, 1.1e7), ("EPSG:3832", 3.3e6, 9e5)),
    "north pole": (("EPSG:3413", 0, 0), ("EPSG:32661", 2e6, 2e6)),
    "south pole": (("EPSG:3031", 0, 0), ("EPSG:32761", 2e6, 2e6)),
    "far north": (("EPSG:3413", -3e5, 5e5), ("EPSG:32624", 5e5, 9.3e6)),
}  # fmt: skip
TILE_PX = 16


def blocks(**settings):
    settings = {"shares": {"train": 0.6, "val": 0.4}, "block_km": 100, **settings}
    return SplitsConfig(by="blocks", **settings)


@st.composite
def regions(draw):
    """Up to 12 x 12 tiles each on grids that overlap, in metres per pixel."""
    grids = []
    for crs, x, y in REGIONS[draw(st.sampled_from(sorted(REGIONS)))]:
        pixel = draw(st.floats(100, 4000))
        tiles = draw(st.integers(1, 12))
        left, top = (at - draw(st.floats(0, 1)) * tiles * TILE_PX * pixel for at in (x, -y))
        side = tiles * TILE_PX - draw(st.integers(0, TILE_PX - 1))
        grids.append(Grid(side, side, crs, (pixel, 0, left, 0, -pixel, -top)))
    return grids


def all_tiles(grid):
    count = -(-grid.height // TILE_PX)
    return np.indices((count, count)).reshape(2, -1)


def boxes_of(grids):
    return np.concatenate([footprints(g, *all_tiles(g), TILE_PX).lonlat_box for g in grids])


def ground_of(grids, points_per_side=9):
    """Earth-centred coordinates in km [tile, point, 3] on a lattice over every tile, edges included.

    Straight lines between them are shorter than any way along the ellipsoid.
    """
    step = np.linspace(0, TILE_PX, points_per_side)
    x, y = (axis.ravel() for axis in np.meshgrid(step, step))
    found = []
    for grid in grids:
        rows, cols = all_tiles(grid)
        a, _, c, _, e, f = grid.transform
        px = np.minimum(cols[:, None] * TILE_PX + x, grid.width)
        py = np.minimum(rows[:, None] * TILE_PX + y, grid.height)
        lons, lats = rasterio.warp.transform(
            grid.crs, "OGC:CRS84", (a * px + c).ravel(), (e * py + f).ravel()
        )
        found.append(earth_centred(np.radians(lons), np.radians(lats)).reshape(len(rows), -1, 3))
    return np.concatenate(found)


def earth_centred(lon, lat):
    """WGS 84: EPSG Guidance Note 7-2, section 4.1.1, at height 0."""
    eccentricity_squared = 0.00669437999014
    radius = 6378.137 / np.sqrt(1 - eccentricity_squared * np.sin(lat) ** 2)
    return np.stack(
        [
            radius * np.cos(lat) * np.cos(lon),
            radius * np.cos(lat) * np.sin(lon),
            radius * (1 - eccentricity_squared) * np.sin(lat),
        ],
        axis=-1,
    )


def nearest_km(splits, ground):
    """The least distance between tiles of different splits; infinite where there is only one."""
    names = sorted({split for split in splits if split})
    points = {name: ground[[split == name for split in splits]].reshape(-1, 3) for name in names}
    pairs = combinations(names, 2)
    return min((cKDTree(points[a]).query(points[b])[0].min() for a, b in pairs), default=math.inf)


def splits_or_none(boxes, config):
    try:
        return block_splits(boxes, config)
    except ConfigError:
        return [None] * len(boxes)


@given(regions(), st.floats(20, 300), st.floats(0, 50), st.integers(0, 99))
def test_tiles_of_different_splits_are_further_apart_than_the_buffer(grids, block, buffer, seed):
    config = blocks(block_km=block, buffer_km=buffer, seed=seed)
    splits = splits_or_none(boxes_of(grids), config)
    assert nearest_km(splits, ground_of(grids)) >= buffer


@pytest.mark.parametrize("region", sorted(REGIONS))
def test_the_buffer_is_what_keeps_splits_apart(region):
    grids = [
        Grid(480, 480, crs, (500, 0, x - 120_000, 0, -500, y + 120_000))
        for crs, x, y in REGIONS[region]
    ]
    boxes, ground = boxes_of(grids), ground_of(grids)
    for buffer in (0, 10):
        splits = block_splits(boxes, blocks(block_km=60, buffer_km=buffer))
        assert {"train", "val"} <= set(splits)
        # Tiles are 8 km wide.
        assert buffer <= nearest_km(splits, ground) < buffer + 16


@given(regions(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_split_depends_neither_on_the_order_nor_on_other_tiles(grids, seed, random):
    boxes, config = boxes_of(grids), blocks(seed=seed, buffer_km=2)
    splits = splits_or_none(boxes, config)
    chosen = random.sample(range(len(boxes)), random.randint(1, len(boxes)))
    assert splits_or_none(boxes[chosen], config) == [splits[tile] for tile in chosen]


lons = st.floats(-180, 180, exclude_max=True)


def steps(low, high):
    """Degrees in hundredths, none of which is the border of a block."""
    return st.integers(100 * low, 100 * high).map(lambda n: n / 100 + 0.0037)


@given(
    st.lists(st.tuples(steps(-180, 179), steps(-90, 89), steps(0, 358), steps(0, 30)), min_size=1),
    st.sampled_from([300, 1000, 5000]),
    st.sampled_from([0, 100]),
)
def test_splits_are_those_of_the_blocks_a_box_touches(corners, block_km, buffer_km):
    boxes = []
    for west, south, width, height in corners:
        east = west + width if west + width <= 180 else west + width - 360
        boxes.append([west, south, east, min(south + height, 90)])
    config = blocks(block_km=block_km, buffer_km=buffer_km, shares={"a": 0.7, "b": 0.2, "c": 0.1})
    splits = splits_or_none(np.array(boxes), config)
    for split, box in zip(splits, boxes, strict=True):
        assert {split} == touched(box, config) or (split is None and len(touched(box, config)) > 1)


def touched(box, config):
    """Splits of all blocks that touch a box with its buffer, block by block.

    Block borders within a micrometre of the box count as touched on both sides, so splits may differ
    only where that decides; the boxes of this test are not that close to any.
    """
    west, south, east, north = box
    east += 360 if west > east else 0
    rise = math.degrees(config.buffer_km / 2 / 6335.4393272928)
    farthest = max(abs(south), abs(north)) + rise
    turn = 360
    if farthest < 90 - 1e-6:
        turn = math.degrees(config.buffer_km / 2 / (6378.137 * math.cos(math.radians(farthest))))
    bands = round(math.pi * 6371.0088 / config.block_km)
    found = set()
    for band in range(bands):
        low, high = (180 / bands * edge - 90 for edge in (band, band + 1))
        if low > north + rise + 1e-9 or high < south - rise - 1e-9:
            continue
        around_km = 2 * math.pi * 6371.0088 * math.cos(math.radians((low + high) / 2))
        count = max(1, round(around_km / config.block_km))
        for block in range(count):
            left, right = (360 / count * edge - 180 for edge in (block, block + 1))
            if any(
                left + lap <= east + turn + 1e-9 and right + lap >= west - turn - 1e-9
                for lap in (-720, -360, 0, 360, 720)
            ):
                found.add(drawn(f"{config.seed}/block/{band}/{block}", config))
    return found


def drawn(text, config):
    """The split of a text, as the documentation says."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    for name, share in config.shares.items():
        if number < share:
            return name
        number -= share
    return name


def test_tiles_without_a_position_are_in_no_split():
    boxes = np.array([[10, 20, 10.1, 20.1], [np.nan] * 4])
    splits = block_splits(boxes, blocks(shares={"all": 1}))
    assert splits == ["all", None]
    assert split_summary(splits) == {"all": 1, "none": 1}


def test_blocks_are_drawn_in_their_shares():
    lon, lat = np.meshgrid(np.arange(-179.99, 180, 0.5), np.arange(-59.99, 60, 0.5))
    boxes = np.stack([lon, lat, lon, lat], axis=-1).reshape(-1, 4)
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    counts = split_summary(block_splits(boxes, blocks(block_km=50, shares=shares)))
    inside = sum(counts[name] for name in shares)
    assert {name: counts[name] / inside for name in shares} == pytest.approx(shares, abs=0.02)
    assert counts["none"] == 0


def test_blocks_too_small_for_the_buffer_are_an_error():
    grid = Grid(160, 160, "EPSG:32632", (100, 0, 5e5, 0, -100, 5e6))
    with pytest.raises(
        ConfigError, match=r"block_km is 2 and splits.buffer_km 5: all tiles \(1.6 km"
    ):
        block_splits(boxes_of([grid]), blocks(block_km=2, buffer_km=5))


def test_place_splits_depend_on_name_and_seed_alone():
    names = [f"T{number:05d}" for number in range(5000)]
    config = SplitsConfig(by="place", shares={"train": 0.75, "val": 0.25})
    splits = place_splits(names, config)
    assert splits == [drawn(f"0/place/{name}", config) for name in names]
    assert place_splits(names[::-1], config) == splits[::-1]
    assert splits.count("train") / len(names) == pytest.approx(0.75, abs=0.02)
    other = place_splits(names, config.model_copy(update={"seed": 1}))
    assert 0.3 < sum(a != b for a, b in zip(splits, other, strict=True)) / len(names) < 0.45


def scene(scene_id, split=None):
    return Scene(scene_id, "s2", (), split=split)


def test_given_splits_come_from_names_and_tables():
    groups = [[scene("a/1", "train"), scene("a/2")], [scene("b/1"), scene("b/2")], [scene("c/1")]]
    table = {"b/1.tif": "val", "b/2": "val", "elsewhere": "test"}
    assert given_splits(groups, table) == ["train", "val", None]
    assert given_splits(groups, None) == ["train", None, None]


def test_scenes_of_one_tile_with_different_splits_are_an_error():
    with pytest.raises(ArchiveError, match="scenes a and c show the same tiles.*'train' and 'val'"):
        given_splits([[scene("a", "train"), scene("b"), scene("c", "val")]], None)


def test_a_scene_with_two_splits_is_an_error():
    with pytest.raises(ArchiveError, match="scene a: its split is both 'train' and 'val'"):
        given_splits([[scene("a", "train")]], {"a.tif": "val"})


def test_a_table_that_names_no_scene_is_an_error():
    with pytest.raises(
        ArchiveError, match="splits.csv names none of the 1 scenes: it has 'x', the arc"
    ):
        values_by_scene([scene("deep/x")], {"x.tif": "val"}, "split")


def test_assign_splits_follows_the_configuration():
    boxes = np.array([[10, 20, 10.1, 20.1], [50, 20, 50.1, 20.1]])
    places, given = ["p", "q"], ["train", None]
    assert assign_splits(None, boxes, places, given) == [None, None]
    assert assign_splits(blocks(), boxes, places, None) == block_splits(boxes, blocks())
    by_place = SplitsConfig(by="place", shares={"x": 0.5, "y": 0.5})
    assert assign_splits(by_place, None, places, None) == place_splits(places, by_place)
    assert assign_splits(SplitsConfig(by="pattern"), None, places, given) == given


@pytest.mark.parametrize("boxes", [None, np.full((2, 4), np.nan)])
def test_blocks_without_a_crs_are_an_error(boxes):
    with pytest.raises(ArchiveError, match="splits.by is blocks, but .* give splits.by place, csv"):
        assign_splits(blocks(), boxes, ["p", "q"], None)


def test_a_pattern_without_any_split_is_an_error():
    with pytest.raises(ArchiveError, match="splits.by is pattern, but it gives no scene a split"):
        assign_splits(SplitsConfig(by="pattern"), None, ["p", "q"], [None, None])


def test_overlapping_tiles_of_different_splits_are_counted():
    grids = [
        Grid(64, 64, "EPSG:32632", (10, 0, 5e5 + shift, 0, -10, 5e6)) for shift in (0, 560, 5000)
    ]
    geometry = [wkb for g in grids for wkb in footprints(g, *all_tiles(g), TILE_PX).geometry]
    # The second grid covers the last column of the first, by half a tile.
    assert num_overlapping([*geometry, None], ["a"] * 16 + ["b"] * 32 + ["a"]) == 8
    assert num_overlapping(geometry, ["a"] * 32 + ["b"] * 16) == 0
    # Neighbours that share a side are no overlap.
    assert num_overlapping(geometry[:16], ["a", "b", "c", None] * 4) == 0
    assert num_overlapping([], []) == 0
