"""Which split each tile belongs to: drawn by blocks on the ground, drawn by place, or given.

Blocks divide the whole Earth. Latitude is cut into bands of equal height, as near to `block_km` as makes
a whole number; each band into equal blocks of longitude, as many as make them about `block_km` wide in
the middle of the band:

        band 3   |     |     |     |          near the pole: 3 blocks all around
        band 2   |   |   |   |   |   |
        band 1   |  |  |  |  |  |  |  |       at the equator

A block's split is drawn by the hash of the seed and the block's two numbers. So a tile's split depends on
where the tile is alone: not on other tiles, their order, or which archive it is in.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import shapely

from pipeline.errors import ArchiveError, ConfigError
from pipeline.scenes import Scene
from pipeline.settings.config import SplitsConfig
from pipeline.sources.tables import scene_key

# WGS 84: smallest radii of curvature, so that a km is never taken for too few degrees. Along a meridian
# that is a (1 - e^2), at the equator; along a parallel N cos(latitude) with N >= a.
_SEMI_MAJOR_KM = 6378.137
_MERIDIAN_KM = _SEMI_MAJOR_KM * (1 - 0.00669437999014)
_MEAN_RADIUS_KM = 6371.0088
# Degrees, 0.1 mm: more than rounding can shift a border.
_ROUNDING = 1e-9
# Parts of a tile's area; what neighbours share by rounding is far less.
_OVERLAP = 1e-3


def assign_splits(
    config: SplitsConfig | None,
    boxes: np.ndarray | None,
    places: Sequence[str],
    given: Sequence[str | None] | None,
) -> list[str | None]:
    """The split of every tile, None for tiles in none.

    `boxes` are as in `block_splits`, None where no scene has a CRS; `places` names the place of each
    tile; `given` are the splits of tiles' scenes (`given_splits`). Raises ArchiveError or ConfigError
    where these do not allow what the configuration asks for.
    """
    if config is None:
        return [None] * len(places)
    if config.by == "place":
        return list(place_splits(places, config))
    if config.by == "blocks":
        if boxes is None:
            raise ArchiveError(
                "splits.by is blocks, but the scenes have no CRS, so nothing says where their tiles are; "
                "give splits.by place, csv or pattern"
            )
        return block_splits(boxes, config)
    assert given is not None
    if len(given) and not any(given):
        raise ArchiveError(
            f"splits.by is {config.by}, but it gives no scene a split; write {{split}} into "
            "modality.pattern, or fill splits.csv"
        )
    return list(given)


def block_splits(lonlat_boxes: np.ndarray, config: SplitsConfig) -> list[str | None]:
    """Splits of tiles by the blocks that their boxes touch.

    `lonlat_boxes` float64 [tile, (west, south, east, north)] in degrees, west > east across the
    antimeridian, NaN where unknown. Boxes are grown by half of `buffer_km` on every side; a tile whose
    grown box touches blocks of several splits is in none (None), as is one whose box is unknown. Grown
    boxes of different splits share no ground, so tiles are at least `buffer_km` apart on the ellipsoid.

    Raises ConfigError if that leaves no tile in any split, ArchiveError if all boxes are unknown.
    """
    boxes = np.asarray(lonlat_boxes, np.float64).reshape(-1, 4)
    known = np.isfinite(boxes).all(1)
    if len(boxes) and not known.any():
        raise ArchiveError(
            "splits.by is blocks, but no tile has a longitude and latitude; give splits.by place, csv "
            "or pattern"
        )
    assert config.block_km is not None
    assert config.shares is not None
    found = np.full(len(boxes), -1)
    found[known] = _common_split(_grown(boxes[known], config.buffer_km / 2), config)
    if len(boxes) and found.max() < 0:
        raise ConfigError(_none_left(boxes[known], config))
    names = [*config.shares, None]
    return [names[split] for split in found.tolist()]


def place_splits(names: Sequence[str], config: SplitsConfig) -> list[str]:
    """The split of each place, drawn by the hash of its name; places may still overlap on the ground."""
    assert config.shares is not None
    shares = list(config.shares)
    drawn = {
        name: shares[_draw(f"{config.seed}/place/{name}", config)] for name in dict.fromkeys(names)
    }
    return [drawn[name] for name in names]


def given_splits(
    groups: Sequence[Sequence[Scene]], table: Mapping[str, str] | None
) -> list[str | None]:
    """The split that its scenes give each group of them, such as all scenes of a place.

    Scenes have the split of a pattern's `{split}` and of `table`, by scene id with or without suffix; a
    group of scenes without any is in none. Raises ArchiveError where two scenes of a group, or pattern
    and table, disagree, and where the table names no scene at all.
    """
    splits = values_by_scene([scene for group in groups for scene in group], table, "split")
    chosen: list[str | None] = []
    for group in groups:
        first: Scene | None = None
        for scene in group:
            if scene.id not in splits:
                continue
            if first is not None and splits[scene.id] != splits[first.id]:
                raise ArchiveError(
                    f"scenes {first.id} and {scene.id} show the same tiles, but their splits are "
                    f"{splits[first.id]!r} and {splits[scene.id]!r}; give both the same one"
                )
            first = first or scene
        chosen.append(None if first is None else splits[first.id])
    return chosen


def values_by_scene(
    scenes: Sequence[Scene], table: Mapping[str, str] | None, what: Literal["label", "split"]
) -> dict[str, str]:
    """Labels or splits by scene id, from the scenes' names and a table; scenes without one are absent.

    Raises ArchiveError where a scene has two values, or the table names no scene at all.
    """
    listed = {scene_key(scene): value for scene, value in (table or {}).items()}
    values: dict[str, str] = {}
    hits = 0
    for scene in scenes:
        tabled = listed.get(scene_key(scene.id))
        hits += tabled is not None
        for value in (getattr(scene, what), tabled):
            if value is not None and values.setdefault(scene.id, value) != value:
                raise ArchiveError(
                    f"scene {scene.id}: its {what} is both {values[scene.id]!r} and {value!r}; names, "
                    f"folders and {what}s.csv have to agree"
                )
    if listed and scenes and not hits:
        raise ArchiveError(
            f"{what}s.csv names none of the {len(scenes)} scenes: it has {min(listed)!r}, the archive "
            f"{min(scene.id for scene in scenes)!r}; name scenes by their path below the source"
        )
    return values


def split_summary(splits: Sequence[str | None]) -> dict[str, int]:
    """Tiles per split, by name; those in no split are counted as "none", last."""
    counts = Counter(splits)
    unused = counts.pop(None, 0)
    named = {str(split): count for split, count in sorted(counts.items(), key=str)}
    return {**named, "none": unused}


def num_overlapping(geometry: Sequence[bytes | None], splits: Sequence[str | None]) -> int:
    """How many tiles share ground with a tile of another split: 0 by blocks, a leak otherwise.

    `geometry` holds footprints as WKB. Less than a thousandth of the smaller tile's area is rounding.
    """
    shapes = shapely.from_wkb(np.array([*geometry, None], dtype=object)[:-1])
    names = np.array([split or "" for split in splits])
    area = shapely.area(shapes)
    leaking = np.zeros(len(shapes), np.bool_)
    for name in np.unique(names[names != ""]).tolist():
        inside, outside = np.flatnonzero(names == name), np.flatnonzero(names > name)
        tree = shapely.STRtree(shapes[outside])
        first, second = tree.query(shapes[inside], predicate="intersects")
        first, second = inside[first], outside[second]
        shared = shapely.area(shapely.intersection(shapes[first], shapes[second]))
        leaks = shared > _OVERLAP * np.minimum(area[first], area[second])
        leaking[first[leaks]] = leaking[second[leaks]] = True
    return int(leaking.sum())


def _grown(boxes: np.ndarray, by_km: float) -> np.ndarray:
    """Boxes [tile, 4] with `by_km` around; east may exceed 180, all longitudes are -180 to 180."""
    west, south, east, north = boxes.T
    rise = math.degrees(by_km / _MERIDIAN_KM) + _ROUNDING
    # Nowhere on the way is a degree of longitude shorter than here.
    farthest = np.maximum(np.abs(south), np.abs(north)) + rise
    per_radian = _SEMI_MAJOR_KM * np.cos(np.radians(np.minimum(farthest, 90 - _ROUNDING)))
    turn = np.degrees(by_km / per_radian) + _ROUNDING
    east = np.where(west > east, east + 360, east)
    around = (farthest >= 90) | (east - west + 2 * turn >= 360)
    return np.stack(
        [
            np.where(around, -180, west - turn),
            np.maximum(south - rise, -90),
            np.where(around, 180, east + turn),
            np.minimum(north + rise, 90),
        ],
        axis=1,
    )


def _common_split(boxes: np.ndarray, config: SplitsConfig) -> np.ndarray:
    """int64 [tile]: the split of all blocks that a box touches, as a position in `shares`; -1 for several.

    All boxes visit their blocks, row by row, at once; those that met two splits have left.
    """
    west, south, east, north = boxes.T
    band, last_band = _band(south, config), _band(north, config)
    block, last_block = _blocks(band, west, east, config)
    common = np.full(len(boxes), -1)
    todo = np.arange(len(boxes))
    drawn: dict[int, int] = {}
    while todo.size:
        split = _block_split(band[todo], block[todo], config, drawn)
        differs = (common[todo] >= 0) & (common[todo] != split)
        common[todo] = np.where(differs, -1, split)
        todo = todo[~differs]
        row_done = block[todo] == last_block[todo]
        todo = todo[~(row_done & (band[todo] == last_band[todo]))]
        new_row = todo[block[todo] == last_block[todo]]
        block[todo] += 1
        band[new_row] += 1
        block[new_row], last_block[new_row] = _blocks(
            band[new_row], west[new_row], east[new_row], config
        )
    return common


def _band(latitude: np.ndarray, config: SplitsConfig) -> np.ndarray:
    bands = _num_bands(config)
    return np.minimum(np.floor((latitude + 90) / 180 * bands), bands - 1).astype(np.int64)


def _num_bands(config: SplitsConfig) -> int:
    assert config.block_km is not None
    return max(1, round(math.pi * _MEAN_RADIUS_KM / config.block_km))


def _num_blocks(band: np.ndarray, config: SplitsConfig) -> np.ndarray:
    assert config.block_km is not None
    middle = (band + 0.5) / _num_bands(config) * np.pi - np.pi / 2
    around_km = 2 * np.pi * _MEAN_RADIUS_KM * np.cos(middle)
    return np.maximum(1, np.round(around_km / config.block_km)).astype(np.int64)


def _blocks(
    band: np.ndarray, west: np.ndarray, east: np.ndarray, config: SplitsConfig
) -> tuple[np.ndarray, np.ndarray]:
    """First and last block of bands between two longitudes, not yet counted around the Earth."""
    blocks = _num_blocks(band, config)
    first, last = (np.floor((lon + 180) / 360 * blocks).astype(np.int64) for lon in (west, east))
    return first, last


def _block_split(
    band: np.ndarray, block: np.ndarray, config: SplitsConfig, drawn: dict[int, int]
) -> np.ndarray:
    """The splits of blocks, as positions in `shares`; `drawn` keeps those drawn so far."""
    keys, which = np.unique(band << 32 | block % _num_blocks(band, config), return_inverse=True)
    for key in keys.tolist():
        if key not in drawn:
            drawn[key] = _draw(f"{config.seed}/block/{key >> 32}/{key % 2**32}", config)
    return np.array([drawn[key] for key in keys.tolist()])[which]


def _draw(text: str, config: SplitsConfig) -> int:
    """A split, as a position in `shares`.

    The first 8 bytes of blake2b(text), big-endian, are a number in [0, 1); shares lie on that line one
    after the other, in the order given.
    """
    assert config.shares is not None
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") / 2**64
    borders = np.cumsum(list(config.shares.values()))[:-1]
    return int(np.searchsorted(borders, number, side="right"))


def _none_left(boxes: np.ndarray, config: SplitsConfig) -> str:
    heights = np.radians(boxes[:, 3] - boxes[:, 1]) * _MEAN_RADIUS_KM
    tile_km = float(np.median(heights))
    return (
        f"splits.block_km is {config.block_km:g} and splits.buffer_km {config.buffer_km:g}: all tiles "
        f"({tile_km:.3g} km from south to north) touch blocks of several splits, so none is in any; give "
        f"blocks several times as large as {tile_km + config.buffer_km:.3g} km, or a smaller buffer"
    )
