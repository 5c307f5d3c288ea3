"""Another partition of a store, from its score maps alone; the archive is never opened.

Like preprocessing, one task per shard: resumable, and committed in one atomic step at the end.
"""

import contextlib
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.calibrate import store_curve
from pipeline.errors import ConfigError, StoreError
from pipeline.jobs.engine import run_tasks
from pipeline.jobs.observer import Observer
from pipeline.jobs.recut import repartition_shard, repartition_task
from pipeline.rules import (
    FurtherRule,
    check_thresholds,
    check_uniform,
    rule_entry,
    rule_in_words,
    uniform_thresholds,
)
from pipeline.settings.canonical import canonical_json, plain
from pipeline.settings.config import DataConfig
from pipeline.settings.loading import validated
from pipeline.settings.run import RunConfig
from pipeline.storage.commit import exclusive, sweep_partials
from pipeline.storage.layout import StoreLayout, consolidate_partition, create_partition
from pipeline.storage.partitions import (
    PartitionLedger,
    check_new_name,
    commit_partition,
    ledger_path,
    partition_path,
)
from pipeline.storage.places import Places, places_of
from pipeline.store import Store, open_store

# Below this, starting worker processes takes longer than the work they would share.
_IN_PROCESS_CELLS = 2**24


@dataclass(frozen=True)
class RepartitionReport:
    """What came of it. `shards_written` counts this run's shards; 0 means nothing was left to do.

    `thresholds`, fine to coarse, are None where the rule has none or they differ by scene.
    """

    store: Path
    name: str
    rule: dict[str, Any]
    thresholds: tuple[float, ...] | None
    tiles: int
    mean_tokens: float
    shards: int
    shards_written: int


def repartition(
    path: Path,
    name: str,
    rule: FurtherRule,
    run: RunConfig,
    observer: Observer,
    modality: str | None = None,
) -> RepartitionReport:
    """Bring the partition `name` of a store to completion and commit it.

    It is of the first modality unless one is named. Small work, one shard, and `run.workers` 1 are done
    in this process. Raises StoreError if the store is not committed or the name is taken by another rule,
    ConfigError for a rule that cannot be followed.
    """
    check_new_name(name)
    store = open_store(path)
    layout = _scored_layout(store, modality)
    _check_rule(store, layout, rule)
    if name not in store.partitions(layout.modality):
        with exclusive(path):
            # Another writer may have finished it while we waited for nothing.
            store = open_store(path)
            if name not in store.partitions(layout.modality):
                written = _complete(store, layout, name, rule, run, observer)
                return _report(path, layout, name, written)
    _check_same_rule(name, store.partition(name, layout.modality).rule, rule)
    consolidate_partition(path, layout, name)
    return _report(path, layout, name, 0)


def _scored_layout(store: Store, modality: str | None) -> StoreLayout:
    layout = store.layout_of(modality)
    if not layout.scored:
        scored = [name for name, other in store.layouts.items() if other.scored]
        raise ConfigError(
            f"modality {layout.modality} of {store.path} has no scores to cut by; those with scores: "
            f"{', '.join(scored)}"
        )
    return layout


def _check_rule(store: Store, layout: StoreLayout, rule: FurtherRule) -> None:
    """Raise ConfigError for a rule that has no effect or cannot be followed in this store."""
    grid = layout.grid
    if not rule.ways():
        raise ConfigError(
            "no rule given; give one of --thresholds, --tokens-per-tile, --quantile, --mean-tokens, "
            "--uniform-px"
        )
    if rule.uniform_px is not None:
        check_uniform(rule.uniform_px, grid.base_patch_size, grid.num_scales)
        if rule.shared is not None:
            raise ConfigError("shared has no effect with uniform_px; leave it out")
    if rule.thresholds is not None:
        config = validated(DataConfig, store.header["config"], str(store.path))
        settings = config.settings_of(layout.modality)
        scoring, num_bands = settings.scoring, len(settings.scored_band_names() or layout.bands)
        assert scoring is not None
        check_thresholds(
            rule.thresholds,
            grid.base_patch_size,
            lambda size: scoring.attainable(size, num_bands),
            num_scales=grid.num_scales,
        )
    if rule.shared is not None and places_of(store, layout.modality).num_frames.max() == 1:
        raise ConfigError(
            f"shared {rule.shared} has no effect: every tile of {store.path} has a single timestep; "
            "leave it out"
        )


def _fixed_thresholds(
    store: Store, layout: StoreLayout, rule: FurtherRule
) -> tuple[float, ...] | None:
    """The thresholds of all frames, where the rule has such."""
    grid = layout.grid
    if rule.uniform_px is not None:
        return tuple(uniform_thresholds(rule.uniform_px, grid.base_patch_size, grid.num_scales))
    if rule.mean_tokens is not None:
        curve = store_curve(store, layout.modality, rule.shared)
        return tuple(curve.thresholds(curve.quantile_for(rule.mean_tokens)))
    return rule.thresholds


def _complete(
    store: Store,
    layout: StoreLayout,
    name: str,
    rule: FurtherRule,
    run: RunConfig,
    observer: Observer,
) -> int:
    """Write the shards that are not done yet, and commit; their number."""
    ledger = _begun(store, layout, name, rule)
    places = places_of(store, layout.modality)
    store.check_shards(places.slots // layout.shard_capacity)
    todo = [shard for shard in range(layout.num_shards) if shard not in ledger.shards]
    left = sum(len(places.shard_tiles(shard)) for shard in todo)
    observer.planned(places.num_tiles, places.num_tiles - left)
    results = _rows(store, layout, ledger, rule, places, todo, run, observer)
    with contextlib.closing(results) as batches:
        for row in chain.from_iterable(batches):
            ledger.append(row)
            observer.shard_done(len(places.shard_tiles(row["shard"])))
    commit_partition(store.path, layout.modality, ledger)
    consolidate_partition(store.path, layout, name)
    return len(todo)


def _begun(store: Store, layout: StoreLayout, name: str, rule: FurtherRule) -> PartitionLedger:
    """The ledger of an interrupted run of the same rule, or a new one beside empty arrays."""
    group = store.path / partition_path(layout.modality, name)
    ledger = PartitionLedger.read(ledger_path(store.path, layout.modality, name))
    if ledger.head:
        _check_same_rule(name, ledger.head["rule"], rule)
        sweep_partials(group)
        return ledger
    thresholds = _fixed_thresholds(store, layout, rule)
    shutil.rmtree(group, ignore_errors=True)
    create_partition(store.path, layout, name)
    ledger.head = plain({"partition": name, "rule": rule_entry(rule), "thresholds": thresholds})
    ledger.create()
    return ledger


def _rows(
    store: Store,
    layout: StoreLayout,
    ledger: PartitionLedger,
    rule: FurtherRule,
    places: Places,
    todo: list[int],
    run: RunConfig,
    observer: Observer,
) -> Generator[list[dict[str, Any]]]:
    """Ledger rows of the shards to do, from workers or from this process."""
    listed = ledger.head["thresholds"]
    thresholds = None if listed is None else tuple(float(t) for t in listed)
    name = ledger.head["partition"]
    tasks = (
        repartition_task(store, layout, name, rule, thresholds, places, shard) for shard in todo
    )
    if _in_process(run, len(todo), sum(len(places.shard_tiles(k)) for k in todo), layout):
        return ([repartition_shard(task)] for task in tasks)
    return run_tasks(repartition_shard, tasks, len(todo), run, str(store.path), observer)


def _in_process(run: RunConfig, num_shards: int, num_tiles: int, layout: StoreLayout) -> bool:
    """Whether workers would cost more than they save; never where the user asked for several."""
    if run.scheduler is not None:
        return False
    if run.workers is not None:
        return run.workers == 1 or num_shards <= 1
    return num_shards <= 1 or num_tiles * layout.grid.num_cells <= _IN_PROCESS_CELLS


def _check_same_rule(name: str, was: dict[str, Any], rule: FurtherRule) -> None:
    now = rule_entry(rule)
    if canonical_json(was) != canonical_json(now):
        raise StoreError(
            f"--name {name}: that partition is made by {rule_in_words(was)}, not by "
            f"{rule_in_words(now)}; use that rule, or give another name"
        )


def _report(path: Path, layout: StoreLayout, name: str, written: int) -> RepartitionReport:
    store = open_store(path)
    made = store.partition(name, layout.modality)
    places = places_of(store, layout.modality)
    frames = places.slots
    return RepartitionReport(
        store=path,
        name=name,
        rule=made.rule,
        thresholds=made.thresholds,
        tiles=places.num_tiles,
        mean_tokens=float(made.tokens[frames].sum()) / places.num_tiles,
        shards=layout.num_shards,
        shards_written=written,
    )
