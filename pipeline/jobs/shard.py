"""One Dask task of preprocessing: read, score, partition and write one whole shard of every array."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.archive import Scene
from pipeline.config import DataConfig
from pipeline.cut import fill_partition, leaves, splits_by_budget, splits_by_thresholds
from pipeline.errors import SceneError
from pipeline.layout import StoreLayout, write_shard
from pipeline.nodes import node_scores
from pipeline.partitions import DEFAULT_PARTITION, partition_path
from pipeline.plan import Plan
from pipeline.reading import TilePixels, sample_tiles, scene_reader
from pipeline.rules import (
    DEFAULT_QUANTILE,
    QUANTILE_SAMPLE_TILES,
    quantile_thresholds,
    uniform_thresholds,
)
from pipeline.scorers.config import ExternalConfig
from pipeline.scores import countable, make_scorer

# A window read at once stays below this, whatever the width of the scene.
_WINDOW_BYTES = 128 * 2**20


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs for one shard; small, because it travels through the scheduler.

    `tiles` are the shard's rows of `Plan.tiles` in slot order, `scenes` those they refer to, and
    `value_ranges` one (low, high) per scored band.
    """

    store: str
    shard: int
    layout: StoreLayout
    config: DataConfig
    scored_bands: tuple[int, ...]
    value_ranges: tuple[tuple[float, float], ...]
    scenes: dict[int, Scene]
    tiles: np.ndarray


def shard_task(
    plan: Plan,
    shard: int,
    store: str,
    layout: StoreLayout,
    value_ranges: tuple[tuple[float, float], ...],
) -> ShardTask:
    """The task of one shard; `value_ranges` are those of all bands."""
    tiles = plan.shard_tiles(shard)
    # Scores from outside are one plane that is not scaled.
    external = isinstance(plan.config.scoring, ExternalConfig)
    scored = ((0.0, 1.0),) if external else tuple(value_ranges[b] for b in plan.scored_bands)
    return ShardTask(
        store=store,
        shard=shard,
        layout=layout,
        config=plan.config,
        scored_bands=plan.scored_bands,
        value_ranges=scored,
        scenes={index: plan.scenes[index] for index in np.unique(tiles["scene"]).tolist()},
        tiles=tiles,
    )


def process_shard(task: ShardTask) -> dict[str, Any]:
    """Make and write one shard; its ledger row (see `pipeline.commit.Ledger`).

    A scene that cannot be read leaves its slots empty and its reason in the row.
    """
    blocks = _empty_blocks(task.layout)
    failed: dict[str, str] = {}
    thresholds: dict[str, list[float]] = {}
    by_slot: dict[int, list[float]] = {}
    for index, scene in task.scenes.items():
        slots = np.flatnonzero(task.tiles["scene"] == index)
        try:
            own = scene_thresholds(task, scene)
            for slot, tile in _read_tiles(task, scene, slots):
                _fill_slot(task, blocks, slot, tile)
        except SceneError as error:
            failed[scene.id] = str(error)
            _empty_slots(task.layout, blocks, slots)
        else:
            thresholds[scene.id] = own
            by_slot.update(dict.fromkeys(slots.tolist(), own))
    _partition(task, blocks, dict(sorted(by_slot.items())))
    return {
        "shard": task.shard,
        "objects": write_shard(Path(task.store), task.layout.arrays(), task.shard, blocks),
        "failed": failed,
        "thresholds": thresholds,
    }


def scene_thresholds(task: ShardTask, scene: Scene) -> list[float]:
    """The configured thresholds, or the scene's own from the scores of a sample of its tiles.

    Empty under a token budget, which has none.
    """
    rule = task.config.partition
    if rule.thresholds is not None:
        return list(rule.thresholds)
    if rule.uniform_px is not None:
        return uniform_thresholds(rule.uniform_px, rule.base_patch_size, rule.num_scales)
    if rule.tokens_per_tile is not None:
        return []
    quantile = DEFAULT_QUANTILE if rule.quantile is None else rule.quantile
    maps = [
        _score(task, tile)
        for tile in sample_tiles(scene, task.config, task.scored_bands, QUANTILE_SAMPLE_TILES)
    ]
    return quantile_thresholds(maps, quantile)


def _score(task: ShardTask, tile: TilePixels) -> list[np.ndarray]:
    """Score maps of one frame, fine to coarse."""
    scoring, grid = task.config.scoring, task.layout.grid
    counted = countable(np.ascontiguousarray(tile.valid), grid, scoring.min_valid_fraction)
    scorer = make_scorer(scoring, task.value_ranges)
    return scorer.maps(np.ascontiguousarray(tile.scored), counted, grid)


def _empty_blocks(layout: StoreLayout) -> dict[str, np.ndarray]:
    return {
        name: np.full(spec.shard, spec.fill_value, np.dtype(spec.dtype))
        for name, spec in layout.arrays().items()
    }


def _empty_slots(layout: StoreLayout, blocks: dict[str, np.ndarray], slots: np.ndarray) -> None:
    for name, spec in layout.arrays().items():
        if spec.dims[0] == "frame":
            blocks[name][slots] = spec.fill_value


def _read_tiles(
    task: ShardTask, scene: Scene, slots: np.ndarray
) -> Iterator[tuple[int, TilePixels]]:
    """Slot and pixels of each tile, from few large block-aligned windows."""
    tile_px = task.config.store.tile_size_px
    with scene_reader(scene, task.config, task.scored_bands) as read:
        for members, rows, cols in _strips(task, scene, slots):
            strip = read(rows, cols)
            for slot in members:
                y = (int(task.tiles["row"][slot]) - rows[0]) * tile_px
                x = (int(task.tiles["col"][slot]) - cols[0]) * tile_px
                yield slot, strip.cut(y, x, tile_px)


def _strips(
    task: ShardTask, scene: Scene, slots: np.ndarray
) -> Iterator[tuple[list[int], tuple[int, int], tuple[int, int]]]:
    """Groups of slots with the tile rows and columns (half-open) of the window that covers them.

    Tiles come grouped by blocks (`pipeline.plan.tile_order`). A strip is a run of them inside one
    row of blocks, cut where its window would grow beyond `_WINDOW_BYTES`.
    """
    tile_px = task.config.store.tile_size_px
    tile_bytes = tile_px**2 * scene.num_bands * np.dtype(scene.dtype).itemsize
    group_rows = max(1, scene.block_shape[0] // tile_px)
    rows, cols = task.tiles["row"], task.tiles["col"]
    members: list[int] = []
    for slot in slots.tolist():
        grown = [*members, slot]
        same_blocks = rows[slot] // group_rows == rows[grown[0]] // group_rows
        area = np.ptp(rows[grown]) + 1, np.ptp(cols[grown]) + 1
        if members and not (same_blocks and int(np.prod(area)) * tile_bytes <= _WINDOW_BYTES):
            yield members, *_extent(rows[members], cols[members])
            grown = [slot]
        members = grown
    if members:
        yield members, *_extent(rows[members], cols[members])


def _extent(rows: np.ndarray, cols: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    return (int(rows.min()), int(rows.max()) + 1), (int(cols.min()), int(cols.max()) + 1)


def _fill_slot(task: ShardTask, blocks: dict[str, np.ndarray], slot: int, tile: TilePixels) -> None:
    """Put pixels, validity and scores of one frame into its slot."""
    modality, grid = task.layout.modality, task.layout.grid
    blocks[f"{modality}/pixels"][slot] = tile.pixels
    blocks[f"{modality}/valid"][slot] = tile.valid
    blocks[f"{modality}/num_valid"][slot] = np.count_nonzero(tile.valid)
    maps = _score(task, tile)
    for size, level_map in zip(grid.patch_sizes, maps, strict=True):
        blocks[f"{modality}/score_{size}"][slot] = level_map
    blocks[f"{modality}/num_cells"][slot] = np.count_nonzero(~np.isnan(maps[0]))


def _partition(
    task: ShardTask, blocks: dict[str, np.ndarray], thresholds: dict[int, list[float]]
) -> None:
    """Cut every filled slot, all at once; `thresholds` by slot, in slot order."""
    modality, grid = task.layout.modality, task.layout.grid
    slots = np.array(list(thresholds), np.int64)
    nodes = node_scores(
        [blocks[f"{modality}/score_{size}"][slots] for size in grid.patch_sizes], grid
    )
    budget = task.config.partition.tokens_per_tile
    if budget is not None:
        splits = splits_by_budget(nodes, budget, grid)
    else:
        limits = np.array(list(thresholds.values()), np.float32).reshape(
            len(slots), grid.num_scales - 1
        )
        splits = splits_by_thresholds(nodes, limits, grid)
    fill_partition(
        blocks, partition_path(modality, DEFAULT_PARTITION), slots, leaves(splits, nodes, grid)
    )
