"""The preprocessing job: plan, prepare the store, run one Dask task per shard, commit.

The store is the only state. A job that was stopped anywhere is completed by running it again; a
finished one is left alone.
"""

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.archive import Scene, Source, find_scenes, read_header, scene_id
from pipeline.cluster import Observer, run_tasks
from pipeline.commit import (
    LEDGER,
    Ledger,
    exclusive,
    read_commit,
    sweep_partials,
    write_commit,
)
from pipeline.config import DataConfig, PreprocessConfig, RunConfig, plain
from pipeline.errors import ArchiveError, SceneError, StoreError
from pipeline.layout import FORMAT_VERSION, StoreLayout, create_arrays, modality_header
from pipeline.layout import read_header as read_store_header
from pipeline.manifest import FrameCounts, encode_manifest
from pipeline.partitions import DEFAULT_PARTITION
from pipeline.plan import Plan, accept, make_plan
from pipeline.reading import check_score_file, input_fingerprint, sample_tiles
from pipeline.scorers.config import ExternalConfig
from pipeline.shard import process_shard, shard_task
from pipeline.stats import configured_ranges, value_ranges_of
from pipeline.store import Store

# Tiles, spread over the archive, from which a value range is estimated.
_RANGE_SAMPLE_TILES = 64
_PROVENANCE = ("aptile", "numpy", "numba", "rasterio", "zarr", "tensorstore", "pyarrow")

ValueRanges = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class JobReport:
    """What a job came to: `inputs = done + len(quarantined)`, always.

    `shards_written` counts this run's shards; 0 means that the store was complete already.
    """

    store: Path
    inputs: int
    quarantined: dict[str, str]
    tiles: int
    shards: int
    shards_written: int

    @property
    def done(self) -> int:
        return self.inputs - len(self.quarantined)


@dataclass(frozen=True)
class Job:
    """A planned job: what will be made of which inputs. `refused` holds reasons by scene id."""

    source: Source
    plan: Plan
    refused: dict[str, str]
    config: PreprocessConfig


def plan_job(source: str, config: PreprocessConfig) -> Job:
    """Find the scenes, check their headers, lay out the tiles; nothing is written.

    Raises ArchiveError where no scene is left or the scenes contradict each other.
    """
    found = find_scenes(source)
    scenes: list[Scene] = []
    refused: dict[str, str] = {}
    for file in found.files:
        try:
            scenes.append(read_header(file, found.root, config.run.max_block_bytes))
        except SceneError as error:
            refused[scene_id(file, found.root)] = str(error)
    accepted, mismatched = accept(config.data(), scenes)
    refused.update(mismatched)
    if isinstance(config.scoring, ExternalConfig):
        accepted, without_scores = _with_scores(accepted, config.scoring, config.run)
        refused.update(without_scores)
    _require_scenes(source, len(found.files), len(accepted), refused)
    return Job(found, make_plan(config.data(), accepted), dict(sorted(refused.items())), config)


def _with_scores(
    scenes: list[Scene], scoring: ExternalConfig, run: RunConfig
) -> tuple[list[Scene], dict[str, str]]:
    """Scenes that have a usable score raster, and the reason for each that has not."""
    accepted, refused = [], {}
    for scene in scenes:
        try:
            check_score_file(scene, scoring, run.max_block_bytes)
            accepted.append(scene)
        except SceneError as error:
            refused[scene.id] = str(error)
    return accepted, refused


def run_job(source: str, store: Path, config: PreprocessConfig, observer: Observer) -> JobReport:
    """Bring the store to completion and commit it.

    Raises StoreError if `store` holds something else or was made with another configuration,
    ArchiveError if there is nothing to read or the archive changed since the store was begun.
    """
    existing = read_store_header(store)
    if existing is None:
        _check_free(store)
        job = plan_job(source, config)
        _create_store(store, job, _value_ranges(job))
    else:
        _check_same_config(store, existing, config.data())
        _check_same_inputs(store, find_scenes(source), config.data())
        finished = _finished_report(store)
        if finished is not None:
            return finished
        job = plan_job(source, config)
        _check_same_refusals(store, job)
    with exclusive(store):
        # Another process may have finished it since we looked.
        report = _finished_report(store) or _complete(store, job, observer)
    created = existing is None
    if report.tiles == 0 and created:
        shutil.rmtree(store)
    _require_scenes(source, report.inputs, report.done, report.quarantined)
    return report


def _complete(store: Path, job: Job, observer: Observer) -> JobReport:
    sweep_partials(store)
    ledger = Ledger.read(store)
    header = read_store_header(store)
    assert header is not None
    opened = Store(store, header, {})
    (layout,) = opened.layouts.values()
    ranges = tuple(tuple(pair) for pair in header["modalities"][layout.modality]["value_range"])
    todo = [shard for shard in range(job.plan.num_shards) if shard not in ledger.shards]
    done_tiles = sum(len(job.plan.shard_tiles(shard)) for shard in ledger.shards)
    observer.planned(len(job.plan.tiles), done_tiles)
    if todo:
        path = str(store.absolute())
        tasks = (shard_task(job.plan, shard, path, layout, ranges) for shard in todo)
        for row in run_tasks(process_shard, tasks, len(todo), job.config.run, str(store)):
            ledger.append(row)
            observer.shard_done(len(job.plan.shard_tiles(row["shard"])))
    quarantined = ledger.quarantined()
    tiles = _commit(store, job.plan, layout, ledger, quarantined)
    return JobReport(store, len(ledger.scenes), quarantined, tiles, job.plan.num_shards, len(todo))


def _commit(
    store: Path, plan: Plan, layout: StoreLayout, ledger: Ledger, quarantined: dict[str, str]
) -> int:
    """Write manifest and COMMIT.json for every tile of every scene that is whole; their number."""
    whole = np.array([scene.id not in quarantined for scene in plan.scenes])
    committed = np.flatnonzero(whole[plan.tiles["scene"]])
    written = Store(store, {"modalities": {}}, {})
    partition = f"partitions/{DEFAULT_PARTITION}"
    counts = FrameCounts(
        num_valid=written.per_frame(layout.modality, "num_valid"),
        num_cells=written.per_frame(layout.modality, "num_cells"),
        tokens=written.per_frame(layout.modality, f"{partition}/tokens"),
    )
    manifest = encode_manifest(plan, layout, committed, counts, ledger.thresholds())
    if len(committed):
        summary = {
            "inputs": len(ledger.scenes),
            "quarantined": len(quarantined),
            "tiles": len(committed),
            "shards": plan.num_shards,
        }
        write_commit(store, ledger, manifest, summary)
    return len(committed)


def _create_store(store: Path, job: Job, ranges: ValueRanges) -> None:
    """Make the empty store under another name and move it into place whole."""
    plan, config = job.plan, job.config.data()
    layout = StoreLayout(
        modality=config.modality.name,
        bands=plan.bands,
        dtype=plan.dtype,
        grid=plan.grid,
        num_shards=plan.num_shards,
        shard_capacity=plan.shard_capacity,
        codec=config.store.codec,
    )
    distances = {scene.ground_sample_distance_m for scene in plan.scenes}
    distance = config.modality.ground_sample_distance_m
    if distance is None and len(distances) == 1:
        distance = distances.pop()
    header = {
        "format_version": FORMAT_VERSION,
        "config": plain(config.model_dump()),
        "config_digest": config.digest(),
        "modalities": {layout.modality: modality_header(layout, ranges, distance)},
        "provenance": {name: _version(name) for name in _PROVENANCE},
    }
    rows = _ledger_scenes(job.source, job.refused, config)
    unfinished = store.with_name(f"{store.name}.{os.getpid()}.partial")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        create_arrays(unfinished, layout, header)
        Ledger(unfinished / LEDGER, rows).create()
        unfinished.replace(store)
    except OSError as error:
        raise StoreError(
            f"{store}: cannot create a store here: {error.strerror}; give a path you may write to"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _value_ranges(job: Job) -> ValueRanges:
    """The configured range of every band, or one estimated from a sample of the archive's tiles."""
    plan = job.plan
    configured = configured_ranges(plan.config, len(plan.bands))
    if configured is not None:
        return configured
    rng = np.random.default_rng(len(plan.scenes))
    chosen = rng.permutation(len(plan.scenes))[:_RANGE_SAMPLE_TILES]
    tiles_per_scene = -(-_RANGE_SAMPLE_TILES // len(plan.scenes))
    samples = []
    unreadable = {}
    for index in sorted(chosen.tolist()):
        scene = plan.scenes[index]
        try:
            tiles = sample_tiles(scene, plan.config, plan.scored_bands, tiles_per_scene)
            samples += [tile.pixels[:, tile.valid] for tile in tiles]
        except SceneError as error:
            # It fails in its shard too, and is quarantined there.
            unreadable[scene.id] = str(error)
    if not samples:
        _require_scenes(str(job.source.root), len(job.source.files), 0, unreadable)
    return value_ranges_of(samples)


def _ledger_scenes(
    source: Source, refused: dict[str, str], config: DataConfig
) -> list[dict[str, Any]]:
    rows = []
    for file in source.files:
        name = scene_id(file, source.root)
        rows.append(
            {
                "scene": name,
                "path": file.relative_to(source.root).as_posix(),
                "fingerprint": input_fingerprint(file, name, config.scoring),
                "refused": refused.get(name),
            }
        )
    return rows


def _check_free(store: Path) -> None:
    if store.absolute() == Path.cwd():
        raise StoreError(
            f"{store} is the current folder; give a name for the store, such as ./store"
        )
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file; give a path for a new store")
    if store.is_dir() and any(store.iterdir()):
        raise StoreError(
            f"{store} exists and is no aptile store (it holds {next(store.iterdir()).name!r}); give a "
            "new path or an empty folder"
        )
    above = next(folder for folder in [store, *store.parents] if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(f"{store}: cannot create a store in {above}; give a path you may write to")


def _check_same_config(store: Path, header: dict[str, Any], config: DataConfig) -> None:
    if header["config_digest"] != config.digest():
        was, now = header["config"], plain(config.model_dump())
        raise StoreError(
            f"{store} was made with another configuration: {_first_difference(was, now)}; use that "
            "configuration, or give a new store path"
        )


def _first_difference(was: Any, now: Any, key: str = "") -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                path = f"{key}.{name}" if key else name
                return _first_difference(was.get(name), now.get(name), path)
    return f"{key} is {was} there and {now} now"


def _check_same_inputs(store: Path, source: Source, config: DataConfig) -> None:
    planned = {row["scene"]: row["fingerprint"] for row in Ledger.read(store).scenes}
    names = {scene_id(file, source.root): file for file in source.files}
    found = {name: input_fingerprint(file, name, config.scoring) for name, file in names.items()}
    if planned != found:
        differing = [
            name for name in sorted(planned | found) if planned.get(name) != found.get(name)
        ]
        example = differing[0]
        change = (
            "is new"
            if example not in planned
            else "is gone"
            if example not in found
            else "was changed"
        )
        raise ArchiveError(
            f"the archive is not the one {store} was begun with: {len(differing)} of its scenes differ, "
            f"{example} {change}; restore it, or preprocess into a new store path"
        )


def _check_same_refusals(store: Path, job: Job) -> None:
    """The tiles' slots follow from which scenes are in, so the rest of a job needs the same ones."""
    before = {row["scene"]: row["refused"] for row in Ledger.read(store).scenes if row["refused"]}
    differing = sorted(before.keys() ^ job.refused.keys())
    if differing:
        name = differing[0]
        was, now = before.get(name, "accepted"), job.refused.get(name, "accepted")
        raise ArchiveError(
            f"{store} was begun with another choice of scenes: {name}: {was} then, {now} now; use the "
            "same run.max_block_bytes, or preprocess into a new store path"
        )


def _finished_report(store: Path) -> JobReport | None:
    commit = read_commit(store)
    if commit is None:
        return None
    ledger, summary = Ledger.read(store), commit["summary"]
    return JobReport(
        store, summary["inputs"], ledger.quarantined(), summary["tiles"], summary["shards"], 0
    )


def _require_scenes(source: str, inputs: int, usable: int, reasons: dict[str, str]) -> None:
    if usable == 0:
        name, reason = next(iter(reasons.items()))
        raise ArchiveError(
            f"{source}: none of the {inputs} scenes can be used; the first, {name}: {reason}"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
