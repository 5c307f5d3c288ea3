"""One Dask task of preprocessing: read, score, partition and write one whole shard of every array."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.cut import fill_partition, leaves, splits_by_budget, splits_by_thresholds
from pipeline.errors import SceneError
from pipeline.jobs.reading import SceneSource, TilePixels, sample_tiles, scene_reader
from pipeline.nodes import node_scores
from pipeline.planning.harmonize import baseline_finding
from pipeline.planning.plan import ModalityPlan, Plan
from pipeline.rules import (
    DEFAULT_QUANTILE,
    QUANTILE_SAMPLE_TILES,
    quantile_thresholds,
    uniform_thresholds,
)
from pipeline.scenes import Access, Scene, asset_of
from pipeline.scorers.config import ExternalConfig
from pipeline.scores import countable, make_scorer
from pipeline.settings.config import ModalitySettings, ValidityConfig
from pipeline.storage.layout import ArraySpec, StoreLayout, write_shard
from pipeline.storage.mending import writer
from pipeline.storage.partitions import DEFAULT_PARTITION, partition_path

# A window read at once stays below this, whatever the width of the scene.
_WINDOW_BYTES = 128 * 2**20
# Of every pixel of a window, beside its bands: what is valid, cloud, nodata, masked; scores from outside.
_FLAG_BYTES, _SCORE_BYTES = 6, 16
# Tiles of a scene whose pixels are compared with its processing baseline.
_BASELINE_SAMPLE_TILES = 16


@dataclass(frozen=True)
class ModalityTask:
    """One modality of a shard. `frames` are its FRAME rows (`pipeline.planning.plan`), but `slot` counts
    from the shard's first and `tile` from its first tile; `scene` indexes `scenes`, whose numbers in the
    plan are `numbers`. `value_ranges` holds one (low, high) per scored plane."""

    settings: ModalitySettings
    layout: StoreLayout
    scored_bands: tuple[int, ...]
    value_ranges: tuple[tuple[float, float], ...]
    scenes: tuple[Scene, ...]
    numbers: tuple[int, ...]
    frames: np.ndarray


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs for one shard; small, because it travels through the scheduler.

    `rows` and `cols` int32 [tile] are the shard's tiles, the leading modality comes first. `excluded` are
    scenes that are not even opened, with the reason for each. `wanted` names the objects to be written,
    with their `bytes` and `sha256`, where a damaged shard is made again.
    """

    store: str
    shard: int
    access: Access
    validity: ValidityConfig
    rows: np.ndarray
    cols: np.ndarray
    modalities: tuple[ModalityTask, ...]
    excluded: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, dict[str, Any]] | None = None


@dataclass
class _Outcome:
    """What a shard came to, for its ledger row (see `pipeline.storage.commit.Ledger`)."""

    objects: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)
    thresholds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    tiles_left_out: list[int] = field(default_factory=list)


def shard_task(
    plan: Plan,
    shard: int,
    store: str,
    access: Access,
    value_ranges: dict[str, tuple[tuple[float, float], ...]],
) -> ShardTask:
    """The task of one shard; `value_ranges` are those of all bands, by modality."""
    tiles = plan.tile_range(shard)
    at = plan.tiles[tiles.start : tiles.stop]
    return ShardTask(
        store=store,
        shard=shard,
        access=access,
        validity=plan.config.validity,
        rows=at["row"].copy(),
        cols=at["col"].copy(),
        modalities=tuple(
            _modality_task(plan, modality, tiles, shard, value_ranges[modality.name])
            for modality in plan.modalities.values()
        ),
    )


def _modality_task(
    plan: Plan,
    modality: ModalityPlan,
    tiles: range,
    shard: int,
    value_ranges: tuple[tuple[float, float], ...],
) -> ModalityTask:
    frames = plan.frames(modality.name, tiles)
    numbers, local = np.unique(frames["scene"], return_inverse=True)
    frames["scene"] = local
    frames["slot"] -= shard * modality.layout.shard_capacity
    frames["tile"] -= tiles.start
    # Scores from outside are one plane that is not scaled.
    external = isinstance(modality.settings.scoring, ExternalConfig)
    scored = tuple(value_ranges[band] for band in modality.scored_bands)
    return ModalityTask(
        settings=modality.settings,
        layout=modality.layout,
        scored_bands=modality.scored_bands,
        value_ranges=((0.0, 1.0),) if external else scored,
        scenes=tuple(modality.scenes[number] for number in numbers.tolist()),
        numbers=tuple(numbers.tolist()),
        frames=frames,
    )


def process_shard(task: ShardTask) -> dict[str, Any]:
    """Make and write one shard; its ledger row (see `pipeline.storage.commit.Ledger`).

    A scene that cannot be read leaves its slots empty and its reason in the row.
    """
    outcome = _Outcome()
    kept_tiles = np.ones(len(task.rows), np.bool_)
    for number, modality in enumerate(task.modalities):
        blocks = _empty_blocks(modality.layout)
        thresholds = _fill(task, modality, blocks, outcome)
        if number == 0:
            kept_tiles = _kept_tiles(task, modality, blocks, thresholds)
            outcome.tiles_left_out = np.flatnonzero(~kept_tiles).tolist()
        _leave_out(task, modality, blocks, thresholds, kept_tiles, outcome)
        if modality.layout.tokenized:
            _partition(modality, blocks, thresholds)
        arrays = modality.layout.arrays()
        codec = modality.layout.codec
        outcome.objects |= write_shard(
            writer(task.store, task.wanted), arrays, codec, task.shard, blocks
        )
    return {"shard": task.shard, **vars(outcome)}


def try_scene(task: ShardTask, scene_id: str) -> None:
    """Read and score the frames of one scene of a shard, and write nothing."""
    others = {s.id: "" for m in task.modalities for s in m.scenes if s.id != scene_id}
    alone = replace(task, excluded=others)
    for modality in task.modalities:
        if any(scene.id == scene_id for scene in modality.scenes):
            _fill(alone, modality, _empty_blocks(modality.layout), _Outcome())


def _fill(
    task: ShardTask, modality: ModalityTask, blocks: dict[str, np.ndarray], outcome: _Outcome
) -> dict[int, list[float]]:
    """Fill every slot whose scene can be read; its thresholds, by slot in order."""
    source = _source(task, modality)
    by_slot: dict[int, list[float]] = {}
    by_scene = outcome.thresholds.setdefault(modality.settings.name, {})
    for index, (scene, number) in enumerate(zip(modality.scenes, modality.numbers, strict=True)):
        frames = modality.frames[modality.frames["scene"] == index]
        try:
            if scene.id in task.excluded:
                raise SceneError(task.excluded[scene.id])
            finding = _baseline(scene, source) if _holds_first(task, frames) else None
            own = scene_thresholds(modality, scene, source, task.validity)
            for slot, tile in _read_tiles(task, scene, source, frames):
                _fill_slot(modality, blocks, slot, tile)
        except SceneError as error:
            outcome.failed[scene.id] = str(error)
            _empty_slots(modality.layout.arrays(), blocks, frames["slot"])
            continue
        by_scene[str(number)] = own
        by_slot.update(dict.fromkeys(frames["slot"].tolist(), own))
        if finding is not None:
            outcome.findings[scene.id] = finding
    return dict(sorted(by_slot.items()))


def _holds_first(task: ShardTask, frames: np.ndarray) -> bool:
    """Whether frames of a scene are of the first tile of its place: one shard alone looks at all of it."""
    tiles = frames["tile"]
    return bool(((task.rows[tiles] == 0) & (task.cols[tiles] == 0)).any())


def _source(task: ShardTask, modality: ModalityTask) -> SceneSource:
    return SceneSource(modality.settings, modality.layout, modality.scored_bands, task.access)


def _baseline(scene: Scene, source: SceneSource) -> str | None:
    """What contradicts a scene's processing baseline; SceneError if such scenes are refused."""
    config = source.settings.config.baseline
    if config is None:
        return None
    tiles = sample_tiles(scene, source, _BASELINE_SAMPLE_TILES)
    first = [tile.sets[0].pixels[:, tile.valid].ravel() for tile in tiles]
    finding = baseline_finding(scene, source.settings.config, np.concatenate(first) - scene.shift)
    if finding is not None and config.on_disagreement == "refuse":
        raise SceneError(finding)
    return finding


def scene_thresholds(
    modality: ModalityTask, scene: Scene, source: SceneSource, validity: ValidityConfig
) -> list[float]:
    """The configured thresholds, or the scene's own from the scores of a sample of its tiles.

    Empty under a token budget, and where nothing is scored.
    """
    rule = modality.settings.partition
    if modality.settings.scoring is None or rule.tokens_per_tile is not None:
        return []
    if rule.thresholds is not None:
        return list(rule.thresholds)
    if rule.uniform_px is not None:
        return uniform_thresholds(rule.uniform_px, rule.base_patch_size, rule.num_scales)
    quantile = DEFAULT_QUANTILE if rule.quantile is None else rule.quantile
    maps = [
        _score(modality, tile)
        for tile in sample_tiles(scene, source, QUANTILE_SAMPLE_TILES)
        if np.mean(tile.valid) >= validity.min_frame_valid_fraction
    ]
    # Nothing is known of a scene without a usable tile, so nothing asks for a split.
    return quantile_thresholds(maps, quantile) if maps else [math.inf] * (rule.num_scales - 1)


def _score(modality: ModalityTask, tile: TilePixels) -> list[np.ndarray]:
    """Score maps of one frame, fine to coarse."""
    scoring, grid = modality.settings.scoring, modality.layout.grid
    assert scoring is not None
    counted = countable(np.ascontiguousarray(tile.valid), grid, scoring.min_valid_fraction)
    scorer = make_scorer(scoring, modality.value_ranges)
    return scorer.maps(np.ascontiguousarray(tile.scored), counted, grid)


def _empty_blocks(layout: StoreLayout) -> dict[str, np.ndarray]:
    return {
        name: np.full(spec.shard, spec.fill_value, np.dtype(spec.dtype))
        for name, spec in layout.arrays().items()
    }


def _empty_slots(
    arrays: dict[str, ArraySpec], blocks: dict[str, np.ndarray], slots: np.ndarray
) -> None:
    for name, spec in arrays.items():
        if spec.dims[0] == "frame":
            blocks[name][slots] = spec.fill_value


def _read_tiles(
    task: ShardTask, scene: Scene, source: SceneSource, frames: np.ndarray
) -> Iterator[tuple[int, TilePixels]]:
    """Slot and pixels of each frame of a scene, from few large block-aligned windows."""
    with scene_reader(scene, source) as read:
        for members, rows, cols in _strips(task, scene, source, frames):
            strip = read(rows, cols)
            for slot, tile in zip(members["slot"].tolist(), members["tile"].tolist(), strict=True):
                row, col = int(task.rows[tile]) - rows[0], int(task.cols[tile]) - cols[0]
                yield slot, strip.cut(row, col, source.layout)


def _strips(
    task: ShardTask, scene: Scene, source: SceneSource, frames: np.ndarray
) -> Iterator[tuple[np.ndarray, tuple[int, int], tuple[int, int]]]:
    """Groups of frames with the tile rows and columns (half-open) of the window that covers them.

    Tiles come grouped by blocks (`pipeline.planning.plan.tile_order`). A strip is a run of them inside one
    row of blocks, cut where its window would grow beyond `_WINDOW_BYTES`.
    """
    layout = source.layout
    external = isinstance(source.settings.scoring, ExternalConfig)
    beside = _FLAG_BYTES + _SCORE_BYTES * external
    block_rows = asset_of(scene, layout.bands[0])[0].block_shape[0]
    group_rows = max(1, block_rows // layout.band_sets[0].tile_size_px)
    rows, cols = task.rows[frames["tile"]], task.cols[frames["tile"]]
    tile_bytes = layout.frame_bytes + layout.band_sets[0].tile_size_px ** 2 * beside
    start = 0
    for end in range(1, len(frames) + 1):
        grown = slice(start, end + 1)
        if end < len(frames):
            same_blocks = rows[end] // group_rows == rows[start] // group_rows
            area = (np.ptp(rows[grown]) + 1) * (np.ptp(cols[grown]) + 1)
            if same_blocks and int(area) * tile_bytes <= _WINDOW_BYTES:
                continue
        yield frames[start:end], _extent(rows[start:end]), _extent(cols[start:end])
        start = end


def _extent(numbers: np.ndarray) -> tuple[int, int]:
    return int(numbers.min()), int(numbers.max()) + 1


def _fill_slot(
    modality: ModalityTask, blocks: dict[str, np.ndarray], slot: int, tile: TilePixels
) -> None:
    """Put pixels, validity and scores of one frame into its slot."""
    layout, name = modality.layout, modality.settings.name
    for band_set, pixels in zip(layout.band_sets, tile.sets, strict=True):
        blocks[f"{name}/pixels{band_set.suffix}"][slot] = pixels.pixels
        blocks[f"{name}/valid{band_set.suffix}"][slot] = pixels.valid
    blocks[f"{name}/num_valid"][slot] = np.count_nonzero(tile.valid)
    blocks[f"{name}/num_cloud"][slot] = np.count_nonzero(tile.cloud)
    blocks[f"{name}/num_nodata"][slot] = np.count_nonzero(tile.nodata)
    if not layout.tokenized:
        return
    if layout.scored:
        maps = _score(modality, tile)
        for size, level_map in zip(layout.grid.patch_sizes, maps, strict=True):
            blocks[f"{name}/score_{size}"][slot] = level_map
        blocks[f"{name}/num_cells"][slot] = np.count_nonzero(~np.isnan(maps[0]))
    else:
        blocks[f"{name}/num_cells"][slot] = np.count_nonzero(occupied(tile.valid, layout))


def occupied(valid: np.ndarray, layout: StoreLayout) -> np.ndarray:
    """bool [..., cell_y, cell_x]: base cells with a valid pixel, from validity [..., y, x]."""
    grid, p = layout.grid, layout.grid.base_patch_size
    blocks = valid.reshape(*valid.shape[:-2], grid.rows, p, grid.cols, p)
    return np.asarray(blocks.any(axis=(-3, -1)))


def _kept_tiles(
    task: ShardTask,
    modality: ModalityTask,
    blocks: dict[str, np.ndarray],
    thresholds: dict[int, list[float]],
) -> np.ndarray:
    """bool [tile]: tiles whose frames of the leading modality are valid enough on average."""
    least = task.validity.min_tile_valid_fraction
    if least == 0:
        return np.ones(len(task.rows), np.bool_)
    read = np.isin(modality.frames["slot"], list(thresholds))
    frames = modality.frames[read]
    fraction = _valid_fraction(modality, blocks, frames["slot"])
    total = np.bincount(frames["tile"], fraction, minlength=len(task.rows))
    number = np.bincount(frames["tile"], minlength=len(task.rows))
    return np.divide(total, number, out=np.zeros_like(total), where=number > 0) >= least


def _leave_out(
    task: ShardTask,
    modality: ModalityTask,
    blocks: dict[str, np.ndarray],
    thresholds: dict[int, list[float]],
    kept_tiles: np.ndarray,
    outcome: _Outcome,
) -> None:
    """Empty the slots of tiles, and of frames, that are not valid enough."""
    frames = modality.frames
    dropped = ~kept_tiles[frames["tile"]]
    least = task.validity.min_frame_valid_fraction
    if least > 0 and modality.layout.tokenized:
        dropped |= _valid_fraction(modality, blocks, frames["slot"]) < least
    slots = [slot for slot in frames["slot"][dropped].tolist() if slot in thresholds]
    _empty_slots(modality.layout.arrays(), blocks, np.array(slots, np.int64))
    for slot in slots:
        del thresholds[slot]
    if slots:
        outcome.left_out[modality.settings.name] = slots


def _valid_fraction(
    modality: ModalityTask, blocks: dict[str, np.ndarray], slots: np.ndarray
) -> np.ndarray:
    """float64: share of valid pixels of the frames in some slots."""
    pixels = modality.layout.band_sets[0].tile_size_px ** 2
    return blocks[f"{modality.settings.name}/num_valid"][slots] / pixels


def _partition(
    modality: ModalityTask, blocks: dict[str, np.ndarray], thresholds: dict[int, list[float]]
) -> None:
    """Cut every filled slot, all at once; `thresholds` by slot, in slot order."""
    name, grid = modality.settings.name, modality.layout.grid
    slots = np.array(list(thresholds), np.int64)
    if modality.layout.scored:
        maps = [blocks[f"{name}/score_{size}"][slots] for size in grid.patch_sizes]
    else:
        present = occupied(blocks[f"{name}/valid"][slots], modality.layout)
        maps = [np.where(present, np.float32(0), np.float32(np.nan))]
    nodes = node_scores(maps, grid)
    budget = modality.settings.partition.tokens_per_tile
    if budget is not None:
        splits = splits_by_budget(nodes, budget, grid)
    else:
        limits = np.array(list(thresholds.values()), np.float32)
        splits = splits_by_thresholds(nodes, limits.reshape(len(slots), grid.num_scales - 1), grid)
    group = partition_path(name, DEFAULT_PARTITION)
    fill_partition(blocks, group, slots, leaves(splits, nodes, grid))
