"""Before the first task: value ranges, the store's header and metadata, the batch's ledger."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.bandstats import BandStats
from pipeline.errors import ArchiveError, SceneError
from pipeline.georef import ground_sample_distance
from pipeline.jobs.reading import SceneSource, sample_tiles
from pipeline.planning.inputs import Job, require_scenes
from pipeline.planning.plan import ModalityPlan, Plan
from pipeline.scenes import Access, Scene
from pipeline.settings.canonical import plain
from pipeline.storage.header import modality_header
from pipeline.storage.layout import FORMAT_VERSION
from pipeline.storage.ledger import PLANNED, PLANNED_FACTS, REFUSED, SKIPPED, Ledger

# Tiles, spread over the archive, from which a value range is estimated.
_RANGE_SAMPLE_TILES = 64
# Percentiles of the valid pixels that bound an estimated value range: robust against a few
# saturated or dead pixels, wide enough to tell the rest apart.
RANGE_PERCENTILES = (1.0, 99.0)
_PROVENANCE = ("aptile", "numpy", "numba", "rasterio", "zarr", "numcodecs", "pyarrow")

Pairs = tuple[tuple[float, float], ...]


def new_header(job: Job) -> dict[str, Any]:
    """The header of a new store; reads a sample of pixels where value ranges are to be estimated."""
    config = job.plan.config
    modalities = {}
    for name, modality in job.plan.modalities.items():
        statistics = None
        ranges = modality.configured_ranges()
        if ranges is None:
            estimated = estimated_statistics(modality, job.archive, job.access)
            ranges, statistics = ranges_of(estimated), _by_band(modality, estimated)
        modalities[name] = modality_header(
            modality.layout, _facts(job, modality, ranges, statistics)
        )
    return {
        "format_version": FORMAT_VERSION,
        "config": plain(config.model_dump()),
        "config_digest": config.digest(),
        "modalities": modalities,
        "provenance": {name: _version(name) for name in _PROVENANCE},
    }


def begin_ledger(job: Job, number: int) -> Ledger:
    """The ledger of a batch that was just planned."""
    plan = job.plan
    head = {"batch": number, "first_shard": plan.first_shard, "num_shards": plan.num_shards}
    return Ledger(head, _file_rows(job), place_rows(plan), _scene_rows(job))


def place_rows(plan: Plan) -> list[dict[str, Any]]:
    """The places of a plan, for its ledger."""
    return [
        {
            "place": stack.name,
            "height": stack.grid.height,
            "width": stack.grid.width,
            "crs": stack.grid.crs,
            "transform": None if stack.grid.transform is None else list(stack.grid.transform),
            "scenes": [scene.id for scene in stack.scenes[plan.lead.name] if scene is not None],
        }
        for stack in plan.stacks
    ]


def estimated_statistics(
    modality: ModalityPlan, archive: str, access: Access
) -> tuple[BandStats, ...]:
    """Statistics of the valid pixels of a seeded sample of tiles, one per band set."""
    source = SceneSource(modality.settings, modality.layout, modality.scored_bands, access)
    scenes = modality.scenes
    chosen = np.random.default_rng(len(scenes)).permutation(len(scenes))[:_RANGE_SAMPLE_TILES]
    per_scene = -(-_RANGE_SAMPLE_TILES // len(scenes))
    merged: list[BandStats | None] = [None] * len(modality.layout.band_sets)
    unreadable = {}
    for index in sorted(chosen.tolist()):
        try:
            for tile in sample_tiles(scenes[index], source, per_scene):
                for number, part in enumerate(tile.sets):
                    own = BandStats.of(part.pixels[:, part.valid])
                    known = merged[number]
                    merged[number] = own if known is None else known.merge(own)
        except SceneError as error:
            # It fails in its shard too, and is quarantined there.
            unreadable[scenes[index].id] = str(error)
    if any(stats is None for stats in merged):
        require_scenes(archive, len(scenes), 0, unreadable)
    return tuple(stats for stats in merged if stats is not None)


def ranges_of(statistics: Iterable[BandStats]) -> Pairs:
    """(low, high) per band, set after set: the 1st and 99th percentile of the valid pixels.

    A constant band gets a range of width 1 from its value on. Raises ArchiveError without a pixel.
    """
    try:
        return tuple(
            pair for stats in statistics for pair in stats.value_ranges(*RANGE_PERCENTILES)
        )
    except ValueError:
        raise ArchiveError(
            "no valid pixel in the sampled tiles, so no value range can be estimated; give "
            "modality.value_range, or check modality.nodata"
        ) from None


def _by_band(modality: ModalityPlan, statistics: tuple[BandStats, ...]) -> dict[str, Any]:
    of_sets = zip(modality.layout.band_sets, statistics, strict=True)
    return {band: facts for s, stats in of_sets for band, facts in stats.to_json(s.bands).items()}


def _facts(
    job: Job, modality: ModalityPlan, ranges: Pairs, statistics: dict[str, Any] | None
) -> dict[str, Any]:
    config = modality.settings.config
    return {
        "kind": config.kind,
        "static": config.static,
        "ignore_index": config.ignore_index,
        "value_range": [list(pair) for pair in ranges],
        "statistics": statistics,
        "scale": modality.scale,
        "offset": modality.offset,
        "wavelengths_nm": None if config.wavelengths_nm is None else list(config.wavelengths_nm),
        "ground_sample_distance_m": config.ground_sample_distance_m or _distance(job, modality),
    }


def _distance(job: Job, modality: ModalityPlan) -> float | None:
    """Metres per pixel of the first band set where all places agree."""
    ratio = job.plan.config.store.tile_size_px / modality.layout.band_sets[0].tile_size_px
    leading = {ground_sample_distance(stack.grid) for stack in job.plan.stacks}
    distance = leading.pop() if len(leading) == 1 else None
    return None if distance is None else distance * ratio


def _file_rows(job: Job) -> list[dict[str, Any]]:
    return [
        {"file": name, "modality": modality, "fingerprint": fingerprint}
        for (modality, name), fingerprint in sorted(job.files.items())
    ]


def _scene_rows(job: Job) -> list[dict[str, Any]]:
    rows = []
    for modality, ids in job.inputs.items():
        planned = {scene.id: scene for scene in job.plan.modalities[modality].scenes}
        for name in ids:
            status, reason = PLANNED, None
            if name in job.refused:
                status, reason = REFUSED, job.refused[name]
            elif name in job.skipped:
                status, reason = SKIPPED, job.skipped[name]
            row = {"scene": name, "modality": modality, "status": status, "reason": reason}
            rows.append({**row, **_as_planned(planned.get(name))})
    return rows


def _as_planned(scene: Scene | None) -> dict[str, Any]:
    """What was decided about one scene, for the record."""
    if scene is None:
        return dict.fromkeys(PLANNED_FACTS)
    ways = {asset.resampling for asset in scene.assets if asset.warp_onto is not None}
    facts = (scene.datetime, scene.baseline, scene.shift, ways.pop() if ways else None)
    return dict(zip(PLANNED_FACTS, facts, strict=True))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
