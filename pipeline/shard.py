"""One Dask task: read, score, partition and write one whole shard of every array."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.io import DatasetReader
from rasterio.windows import Window

from pipeline.archive import Scene, open_raster, read_window
from pipeline.commit import write_object
from pipeline.config import DataConfig
from pipeline.errors import SceneError
from pipeline.plan import Plan
from pipeline.quadtree import partition_scales
from pipeline.rules import DEFAULT_QUANTILE, quantile_thresholds
from pipeline.scores import countable, make_scorer
from pipeline.segments import counts_per_scale
from pipeline.store import DEFAULT_PARTITION, StoreLayout, encode_shard, read_array_metadata

# A window read at once stays below this, whatever the width of the scene.
_WINDOW_BYTES = 128 * 2**20
# Tiles of a scene whose scores set its thresholds when none are configured.
_SAMPLE_TILES = 16


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
    return ShardTask(
        store=store,
        shard=shard,
        layout=layout,
        config=plan.config,
        scored_bands=plan.scored_bands,
        value_ranges=tuple(value_ranges[band] for band in plan.scored_bands),
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
    scales: dict[int, np.ndarray] = {}
    for index, scene in task.scenes.items():
        slots = np.flatnonzero(task.tiles["scene"] == index)
        try:
            thresholds[scene.id] = scene_thresholds(task, scene)
            for slot, pixels, valid in _read_tiles(task, scene, slots):
                scales[slot] = _fill_slot(task, blocks, slot, pixels, valid, thresholds[scene.id])
        except SceneError as error:
            failed[scene.id] = str(error)
            thresholds.pop(scene.id, None)
            for slot in slots.tolist():
                scales.pop(slot, None)
                for name, spec in task.layout.arrays().items():
                    if spec.dims[0] == "frame":
                        blocks[name][slot] = spec.fill_value
    _fill_rows(task, blocks, scales)
    return {
        "shard": task.shard,
        "objects": _write(task, blocks),
        "failed": failed,
        "thresholds": thresholds,
    }


def scene_thresholds(task: ShardTask, scene: Scene) -> list[float]:
    """The configured thresholds, or the scene's own from the scores of a sample of its tiles.

    The sample depends on the scene's size alone, so every shard that holds a part of the scene
    comes to the same thresholds.
    """
    rule = task.config.partition
    if rule.thresholds is not None:
        return list(rule.thresholds)
    quantile = DEFAULT_QUANTILE if rule.quantile is None else rule.quantile
    maps = [
        _score(task, pixels, valid)
        for pixels, valid in sample_tiles(scene, task.config, _SAMPLE_TILES)
    ]
    return quantile_thresholds(maps, quantile)


def sample_tiles(
    scene: Scene, config: DataConfig, num_tiles: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pixels [band, y, x] and validity of up to `num_tiles` tiles of a scene, seeded by its size."""
    tile_px = config.store.tile_size_px
    rows, cols = -(-scene.height // tile_px), -(-scene.width // tile_px)
    rng = np.random.default_rng([scene.height, scene.width])
    chosen = np.sort(rng.choice(rows * cols, min(num_tiles, rows * cols), replace=False))
    with open_raster(scene.path) as raster:
        for row, col in zip(*np.divmod(chosen, cols), strict=True):
            yield _read_padded(
                raster, scene, config, (int(row), int(row) + 1), (int(col), int(col) + 1)
            )


def _score(task: ShardTask, pixels: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    """Score maps of one frame, fine to coarse."""
    scoring, grid = task.config.scoring, task.layout.grid
    image = np.ascontiguousarray(pixels[list(task.scored_bands)])
    counted = countable(np.ascontiguousarray(valid), grid, scoring.min_valid_fraction)
    return make_scorer(scoring, task.value_ranges).maps(image, counted, grid)


def _empty_blocks(layout: StoreLayout) -> dict[str, np.ndarray]:
    return {
        name: np.full(spec.shard, spec.fill_value, np.dtype(spec.dtype))
        for name, spec in layout.arrays().items()
    }


def _read_tiles(
    task: ShardTask, scene: Scene, slots: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Slot, pixels [band, y, x] and validity of each tile, from few large block-aligned windows."""
    tile_px = task.config.store.tile_size_px
    with open_raster(scene.path) as raster:
        for members, (row0, row1), (col0, col1) in _strips(task, scene, slots):
            pixels, valid = _read_padded(raster, scene, task.config, (row0, row1), (col0, col1))
            for slot in members:
                y = (int(task.tiles["row"][slot]) - row0) * tile_px
                x = (int(task.tiles["col"][slot]) - col0) * tile_px
                cut = np.s_[..., y : y + tile_px, x : x + tile_px]
                yield slot, pixels[cut], valid[cut]


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


def _read_padded(
    raster: DatasetReader,
    scene: Scene,
    config: DataConfig,
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and validity of whole tiles; what lies beyond the scene is zero and invalid."""
    tile_px = config.store.tile_size_px
    top, left = rows[0] * tile_px, cols[0] * tile_px
    height = min(rows[1] * tile_px, scene.height) - top
    width = min(cols[1] * tile_px, scene.width) - left
    window = Window(left, top, width, height)
    pixels, valid = read_window(raster, scene, config.modality.nodata, window)
    pad = (0, (rows[1] - rows[0]) * tile_px - height), (0, (cols[1] - cols[0]) * tile_px - width)
    return np.pad(pixels, [(0, 0), *pad]), np.pad(valid, pad)


def _fill_slot(
    task: ShardTask,
    blocks: dict[str, np.ndarray],
    slot: int,
    pixels: np.ndarray,
    valid: np.ndarray,
    thresholds: list[float],
) -> np.ndarray:
    """Put one frame into its slot of every per-frame array; its scales."""
    modality, grid = task.layout.modality, task.layout.grid
    partition = f"{modality}/partitions/{DEFAULT_PARTITION}"
    blocks[f"{modality}/pixels"][slot] = pixels
    blocks[f"{modality}/valid"][slot] = valid
    blocks[f"{modality}/num_valid"][slot] = np.count_nonzero(valid)
    maps = _score(task, pixels, valid)
    for size, level_map in zip(grid.patch_sizes, maps, strict=True):
        blocks[f"{modality}/score_{size}"][slot] = level_map
    blocks[f"{modality}/num_cells"][slot] = np.count_nonzero(~np.isnan(maps[0]))
    scales = partition_scales(maps, thresholds, grid)
    blocks[f"{partition}/counts"][slot] = scales.size
    blocks[f"{partition}/tokens"][slot] = counts_per_scale(scales, grid.num_scales)
    return scales


def _fill_rows(
    task: ShardTask, blocks: dict[str, np.ndarray], scales: dict[int, np.ndarray]
) -> None:
    """Partitions of the shard's frames one after another, without gaps, in slot order."""
    rows = blocks[f"{task.layout.modality}/partitions/{DEFAULT_PARTITION}/scales"]
    if scales:
        joined = np.concatenate([scales[slot] for slot in sorted(scales)])
        rows[: joined.size] = joined


def _write(task: ShardTask, blocks: dict[str, np.ndarray]) -> dict[str, Any]:
    store = Path(task.store)
    metadata = read_array_metadata(store, task.layout)
    objects = {}
    for name, spec in task.layout.arrays().items():
        content = encode_shard(metadata[name], blocks.pop(name))
        if content is not None:
            object_name = f"{name}/{spec.shard_key(task.shard)}"
            objects[object_name] = write_object(store / object_name, content)
    return objects
