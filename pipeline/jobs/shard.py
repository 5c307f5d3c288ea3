"""One Dask task of preprocessing: read, score, partition and write one whole shard of every array."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.errors import SceneError
from pipeline.jobs.frames import ModalityTask, ShardFrames
from pipeline.jobs.measures import MEASURES, Measures
from pipeline.jobs.reading import (
    SceneSource,
    TilePixels,
    sample_tiles,
    scene_reader,
)
from pipeline.jobs.thresholds import scene_thresholds
from pipeline.planning.harmonize import baseline_finding
from pipeline.planning.memory import WINDOW_BYTES, window_bytes
from pipeline.planning.plan import ModalityPlan, Plan
from pipeline.scenes import Access, Scene, asset_of
from pipeline.scorers.config import ExternalConfig
from pipeline.settings.config import ValidityConfig
from pipeline.storage.mending import writer
from pipeline.storage.sharding import write_shard

# Tiles of a scene whose pixels are compared with its processing baseline.
_BASELINE_SAMPLE_TILES = 16


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
    """Make and write one shard; its ledger row (see `pipeline.storage.commit.Ledger`), with what it took.

    A scene that cannot be read leaves its slots empty and its reason in the row.
    """
    outcome, measures = _Outcome(), Measures()
    kept_tiles = np.ones(len(task.rows), np.bool_)
    for number, modality in enumerate(task.modalities):
        gathered = ShardFrames(modality, measures)
        thresholds = _fill(task, modality, gathered, outcome)
        if number == 0:
            kept_tiles = _kept_tiles(task, modality, gathered, thresholds)
            outcome.tiles_left_out = np.flatnonzero(~kept_tiles).tolist()
        _leave_out(task, modality, gathered, thresholds, kept_tiles, outcome)
        gathered.cut(thresholds)
        with measures.timed("write"):
            place = writer(task.store, task.wanted)
            outcome.objects |= write_shard(place, task.shard, gathered.encoded())
    measures.object_bytes = sum(written["bytes"] for written in outcome.objects.values())
    return {"shard": task.shard, **vars(outcome), MEASURES: vars(measures)}


def try_scene(task: ShardTask, scene_id: str) -> None:
    """Read and score the frames of one scene of a shard, and write nothing."""
    others = {s.id: "" for m in task.modalities for s in m.scenes if s.id != scene_id}
    alone = replace(task, excluded=others)
    for modality in task.modalities:
        if any(scene.id == scene_id for scene in modality.scenes):
            _fill(alone, modality, ShardFrames(modality, Measures()), _Outcome())


def _fill(
    task: ShardTask, modality: ModalityTask, gathered: ShardFrames, outcome: _Outcome
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
            for slot, tile in _read_tiles(task, scene, modality, frames, gathered.measures):
                gathered.put(slot, tile)
                del tile
            tiles = frames["tile"]
            own = scene_thresholds(
                modality,
                scene,
                source,
                np.stack([frames["slot"], task.rows[tiles], task.cols[tiles]], axis=1),
                gathered,
                task.validity.min_frame_valid_fraction,
            )
        except SceneError as error:
            outcome.failed[scene.id] = str(error)
            gathered.clear(frames["slot"])
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


def _read_tiles(
    task: ShardTask, scene: Scene, modality: ModalityTask, frames: np.ndarray, measures: Measures
) -> Iterator[tuple[int, TilePixels]]:
    """Slot and pixels of each frame of a scene, from few large block-aligned windows."""
    groups = list(strips(task, scene, modality, frames))
    with scene_reader(scene, _source(task, modality)) as read:
        parts = measures.reading(read(rows, cols) for _, rows, cols in groups)
        for members, rows, cols in groups:
            strip = next(parts)
            for slot, tile in zip(members["slot"].tolist(), members["tile"].tolist(), strict=True):
                row, col = int(task.rows[tile]) - rows[0], int(task.cols[tile]) - cols[0]
                yield slot, strip.cut(row, col, modality.layout)
            # One strip at a time: the next one is read into the memory of this one.
            del strip


def strips(
    task: ShardTask, scene: Scene, modality: ModalityTask, frames: np.ndarray
) -> Iterator[tuple[np.ndarray, tuple[int, int], tuple[int, int]]]:
    """Groups of frames with the tile rows and columns (half-open) of the window that covers them.

    Tiles come grouped by blocks (`pipeline.planning.plan.tile_order`). A strip is a run of them inside one
    row of blocks, cut where its window would grow beyond `WINDOW_BYTES`: between blocks where it can be.
    """
    layout = modality.layout
    tile_px = layout.band_sets[0].tile_size_px
    tile_bytes = window_bytes(layout, isinstance(modality.settings.scoring, ExternalConfig))
    block_px = asset_of(scene, layout.bands[0])[0].block_shape
    rows, cols = task.rows[frames["tile"]], task.cols[frames["tile"]]
    blocks = rows // max(1, block_px[0] // tile_px), cols // max(1, block_px[1] // tile_px)

    def fits(first: int, last: int) -> bool:
        run = slice(first, last + 1)
        area = int(np.ptp(rows[run]) + 1) * int(np.ptp(cols[run]) + 1)
        return blocks[0][first] == blocks[0][last] and area * tile_bytes <= WINDOW_BYTES

    start = block = 0
    for at in range(1, len(frames) + 1):
        if at == len(frames) or any(number[at] != number[at - 1] for number in blocks):
            block = at
        while start < at and (at == len(frames) or not fits(start, at)):
            end = block if block > start else at
            yield frames[start:end], _extent(rows[start:end]), _extent(cols[start:end])
            start = end


def _extent(numbers: np.ndarray) -> tuple[int, int]:
    return int(numbers.min()), int(numbers.max()) + 1


def _kept_tiles(
    task: ShardTask,
    modality: ModalityTask,
    gathered: ShardFrames,
    thresholds: dict[int, list[float]],
) -> np.ndarray:
    """bool [tile]: tiles whose frames of the leading modality are valid enough on average."""
    least = task.validity.min_tile_valid_fraction
    if least == 0:
        return np.ones(len(task.rows), np.bool_)
    read = np.isin(modality.frames["slot"], list(thresholds))
    frames = modality.frames[read]
    fraction = gathered.valid_fraction(frames["slot"])
    total = np.bincount(frames["tile"], fraction, minlength=len(task.rows))
    number = np.bincount(frames["tile"], minlength=len(task.rows))
    return np.divide(total, number, out=np.zeros_like(total), where=number > 0) >= least


def _leave_out(
    task: ShardTask,
    modality: ModalityTask,
    gathered: ShardFrames,
    thresholds: dict[int, list[float]],
    kept_tiles: np.ndarray,
    outcome: _Outcome,
) -> None:
    """Empty the slots of tiles, and of frames, that are not valid enough."""
    frames = modality.frames
    dropped = ~kept_tiles[frames["tile"]]
    least = task.validity.min_frame_valid_fraction
    if least > 0 and modality.layout.tokenized:
        dropped |= gathered.valid_fraction(frames["slot"]) < least
    slots = [slot for slot in frames["slot"][dropped].tolist() if slot in thresholds]
    gathered.clear(np.array(slots, np.int64))
    for slot in slots:
        del thresholds[slot]
    if slots:
        outcome.left_out[modality.settings.name] = slots
