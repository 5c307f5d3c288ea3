"""The plan of a job: which tiles exist, in which order, and which shard and slot each one has.

Pure: from scene headers and a configuration, without reading a pixel or touching the store. Every
tile's place is fixed before any work starts, so the bytes of a store cannot depend on scheduling.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.archive import Scene
from pipeline.config import DataConfig
from pipeline.errors import ArchiveError
from pipeline.grid import BaseGrid
from pipeline.scorers.config import ExternalConfig

# `scene` indexes Plan.scenes; `row`, `col` count tiles from the scene's top left.
TILE = np.dtype([("scene", np.int32), ("row", np.int32), ("col", np.int32)])
# Shards hold a multiple of this many frames, so that their partitions have a common chunk size.
SLOT_MULTIPLE = 16


@dataclass(frozen=True)
class Plan:
    """Tiles in storage order: shard `k` holds tiles `[k * capacity, (k + 1) * capacity)`."""

    config: DataConfig
    scenes: tuple[Scene, ...]
    tiles: np.ndarray
    num_shards: int
    shard_capacity: int
    bands: tuple[str, ...]
    dtype: str

    @property
    def grid(self) -> BaseGrid:
        return tile_grid(self.config)

    @property
    def scored_bands(self) -> tuple[int, ...]:
        """Indices into `bands` of those that are scored; none for scores from outside."""
        if isinstance(self.config.scoring, ExternalConfig):
            return ()
        return tuple(self.bands.index(b) for b in self.config.scored_band_names() or self.bands)

    def shard_tiles(self, shard: int) -> np.ndarray:
        """The tiles of one shard; its slot `i` is frame `shard * shard_capacity + i`."""
        return self.tiles[shard * self.shard_capacity : (shard + 1) * self.shard_capacity]

    def tile_id(self, tile: np.void) -> str:
        return f"{self.scenes[tile['scene']].id}/r{tile['row']}c{tile['col']}"


def make_plan(config: DataConfig, scenes: Sequence[Scene]) -> Plan:
    """Lay out all tiles of all scenes. Scenes must have equal band counts and types (see `accept`)."""
    tile_px = config.store.tile_size_px
    tiles = np.concatenate(
        [_scene_tiles(index, scene, tile_px) for index, scene in enumerate(scenes)]
    )
    num_shards = -(-len(tiles) // config.store.shard_tiles)
    # Equal runs: 600 tiles at 512 per shard are 2 x 300, not 512 + 88.
    capacity = -(-len(tiles) // num_shards)
    if capacity > SLOT_MULTIPLE:
        capacity = -(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE
    return Plan(
        config=config,
        scenes=tuple(scenes),
        tiles=tiles,
        num_shards=-(-len(tiles) // capacity),
        shard_capacity=capacity,
        bands=config.modality.bands or default_bands(scenes[0].num_bands),
        dtype=scenes[0].dtype,
    )


def accept(config: DataConfig, scenes: Sequence[Scene]) -> tuple[list[Scene], dict[str, str]]:
    """Scenes that belong to the configured modality, and the reason for each that does not.

    Raises ArchiveError where the scenes contradict each other and nothing says which are right.
    """
    bands = config.modality.bands
    accepted, refused = [], {}
    for scene in scenes:
        if bands is not None and scene.num_bands != len(bands):
            refused[scene.id] = (
                f"has {scene.num_bands} bands; modality {config.modality.name} has {len(bands)}"
            )
        else:
            accepted.append(scene)
    _refuse_mixture(accepted, "number of bands", [str(scene.num_bands) for scene in accepted])
    _refuse_mixture(accepted, "pixel type", [scene.dtype for scene in accepted])
    if accepted:
        _check_bands_exist(config, accepted[0])
    return accepted, refused


def tile_grid(config: DataConfig) -> BaseGrid:
    """The base grid of one tile."""
    cells = config.store.tile_size_px // config.partition.base_patch_size
    return BaseGrid(cells, cells, config.partition.base_patch_size, config.partition.num_scales)


def default_bands(num_bands: int) -> tuple[str, ...]:
    """Names for the bands of a modality nobody named."""
    return tuple(f"band_{number}" for number in range(1, num_bands + 1))


def tile_order(height: int, width: int, tile_px: int, block_shape: tuple[int, int]) -> np.ndarray:
    """int32 [tile, (row, col)]: every tile of a scene once, grouped by the file's blocks.

    Groups are as large as a block, or one tile if that is larger, and come row by row. A shard, a
    contiguous run of tiles, then cuts through at most two groups and few blocks are decoded twice.
    """
    rows, cols = -(-height // tile_px), -(-width // tile_px)
    group_rows = max(1, block_shape[0] // tile_px)
    group_cols = max(1, block_shape[1] // tile_px)
    row, col = np.indices((rows, cols), dtype=np.int32).reshape(2, -1)
    order = np.lexsort((col, row, col // group_cols, row // group_rows))
    return np.stack([row[order], col[order]], axis=1)


def _scene_tiles(index: int, scene: Scene, tile_px: int) -> np.ndarray:
    order = tile_order(scene.height, scene.width, tile_px, scene.block_shape)
    tiles = np.empty(len(order), TILE)
    tiles["scene"] = index
    tiles["row"], tiles["col"] = order.T
    return tiles


def _refuse_mixture(scenes: Sequence[Scene], what: str, values: Sequence[str]) -> None:
    groups = defaultdict(list)
    for scene, value in zip(scenes, values, strict=True):
        groups[value].append(scene.path)
    if len(groups) > 1:
        found = ", ".join(
            f"{value} ({paths[0]} and {len(paths) - 1} more)"
            if len(paths) > 1
            else f"{value} ({paths[0]})"
            for value, paths in sorted(groups.items())
        )
        raise ArchiveError(
            f"the scenes differ in their {what}: {found}; one modality needs one: give a glob that "
            "selects the scenes of one kind, or a configuration with modality.bands"
        )  # fmt: skip


def _check_bands_exist(config: DataConfig, scene: Scene) -> None:
    scored = config.scored_band_names()
    if config.modality.bands is None and scored is not None:
        names = default_bands(scene.num_bands)
        unknown = [band for band in scored if band not in names]
        if unknown:
            raise ArchiveError(
                f"scoring.bands names {unknown}, but modality.bands is not given and {scene.path} "
                f"has {', '.join(names)}"
            )
    ranges = config.modality.value_ranges()
    if ranges is not None and len(ranges) not in {1, scene.num_bands}:
        raise ArchiveError(
            f"modality.value_range has {len(ranges)} pairs; give one, or one per band: "
            f"{scene.path} has {scene.num_bands} bands"
        )
