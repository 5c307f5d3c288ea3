"""Another partition of a store, from its score maps alone; the archive is never opened.

Like preprocessing, one task per shard: resumable, and committed in one atomic step at the end.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.calibrate import store_curve
from pipeline.errors import ConfigError, StoreError
from pipeline.jobs.engine import run_tasks
from pipeline.jobs.observer import Observer
from pipeline.jobs.recut import repartition_shard, repartition_task
from pipeline.jobs.repair_partition import repair_partition
from pipeline.jobs.space import telling_space
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
from pipeline.storage.commit import REPARTITION, Batch, named, write_commit
from pipeline.storage.layout import StoreLayout
from pipeline.storage.lock import Held, exclusive, tidy
from pipeline.storage.mending import Repaired
from pipeline.storage.metadata import write_metadata
from pipeline.storage.objects import Location
from pipeline.storage.partitions import PartitionLedger, check_new_name, partition_ledger_name
from pipeline.storage.places import Places, places_of
from pipeline.store import Store, open_store

# Below this, starting worker processes takes longer than the work they would share.
_IN_PROCESS_CELLS = 2**24


@dataclass(frozen=True)
class RepartitionReport:
    """What came of it. `shards_written` counts this run's shards; `committed` says whether it committed,
    for which it can be that no shard was left to do.

    `thresholds`, fine to coarse, are None where the rule has none or they differ by scene. `repaired`
    counts damaged objects that were written anew, and the shards they are of.
    """

    store: str
    name: str
    rule: dict[str, Any]
    thresholds: tuple[float, ...] | None
    tiles: int
    mean_tokens: float
    shards: int
    shards_written: int
    committed: bool
    repaired: tuple[int, int] = (0, 0)


def repartition(
    location: Location,
    name: str,
    rule: FurtherRule,
    run: RunConfig,
    observer: Observer,
    modality: str | None = None,
) -> RepartitionReport:
    """Bring the partition `name` of a store to completion and commit it.

    It is of the first modality unless one is named. Where scenes were appended since it was made, their
    shards are added by the same thresholds. Small work, one shard, and `run.workers` 1 are done in this
    process. Raises StoreError if the store is not committed or the name is taken by another rule,
    ConfigError for a rule that cannot be followed.
    """
    check_new_name(name)
    store = open_store(location)
    layout = _scored_layout(store, modality)
    _check_rule(store, layout, rule)
    written, committed, repaired = 0, False, Repaired()
    known = store.commit.partitions.get(layout.modality, {}).get(name)
    if known is not None:
        _check_same_rule(name, known["rule"], rule)
        repaired = repair_partition(store, layout, name, rule)
    if _missing_batches(store, layout, name):
        with exclusive(store.objects) as lock:
            # Another writer may have finished it while we looked.
            store = open_store(location)
            if _missing_batches(store, layout, name):
                written = _complete(store, lock, layout, name, rule, run, observer)
                committed = True
    else:
        tidy(store.objects)
    _check_same_rule(name, open_store(location).partition(name, layout.modality).rule, rule)
    report = _report(location, layout, name)
    return replace(
        report,
        shards_written=written,
        committed=committed,
        repaired=(repaired.objects, repaired.shards),
    )


def _missing_batches(store: Store, layout: StoreLayout, name: str) -> list[Batch]:
    """Batches of shards that a partition has not got."""
    entry = store.commit.partitions.get(layout.modality, {}).get(name)
    known = [] if entry is None else [what["batch"] for what in entry["ledgers"]]
    return [batch for batch in store.commit.batches if batch.number not in known]


def _scored_layout(store: Store, modality: str | None) -> StoreLayout:
    layout = store.layout_of(modality)
    if not layout.scored:
        scored = [name for name, other in store.layouts.items() if other.scored]
        raise ConfigError(
            f"modality {layout.modality} of {store.location} has no scores to cut by; those with scores: "
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
        config = validated(DataConfig, store.header["config"], store.location)
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
            f"shared {rule.shared} has no effect: every tile of {store.location} has a single timestep; "
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
    lock: Held,
    layout: StoreLayout,
    name: str,
    rule: FurtherRule,
    run: RunConfig,
    observer: Observer,
) -> int:
    """Write the shards that are not done yet, and commit; their number."""
    objects, places = store.objects, places_of(store, layout.modality)
    ledgers = _begun(store, layout, name, rule)
    store.check_shards(places.slots // layout.shard_capacity)
    of_shard = {
        shard: ledgers[batch.number]
        for batch in store.commit.batches
        if batch.number in ledgers
        for shard in batch.shards
    }
    todo = [shard for shard, ledger in of_shard.items() if shard not in ledger.shards]
    left = sum(len(places.shard_tiles(shard)) for shard in todo)
    observer.planned(places.num_tiles, places.num_tiles - left)
    head, arrays = next(iter(ledgers.values())).head, layout.partition_arrays(name).values()
    with telling_space(lambda: _rows_of(ledgers), len(of_shard), arrays):
        results = _rows(store, layout, head, rule, places, todo, run, observer)
        with contextlib.closing(results) as batches:
            for rows in batches:
                lock.check()
                for ledger in ledgers.values():
                    own = [row for row in rows if of_shard[row["shard"]] is ledger]
                    if own:
                        ledger.append(objects, own)
                for row in rows:
                    observer.shard_done(len(places.shard_tiles(row["shard"])))
        lock.check()
        # Of workers that were killed.
        objects.sweep()
        _commit(store, layout, head, ledgers)
    return len(todo)


def _rows_of(ledgers: dict[int, PartitionLedger]) -> list[dict[str, Any]]:
    """Rows of all finished shards."""
    return [row for ledger in ledgers.values() for row in ledger.shards.values()]


def _begun(
    store: Store, layout: StoreLayout, name: str, rule: FurtherRule
) -> dict[int, PartitionLedger]:
    """Ledgers of the missing batches by number: of an interrupted run of the same rule, or new ones."""
    objects, modality = store.objects, layout.modality
    objects.sweep()
    missing = _missing_batches(store, layout, name)
    ledgers = {
        batch.number: PartitionLedger.read(
            objects, partition_ledger_name(modality, name, batch.number)
        )
        for batch in missing
    }
    begun = [ledger.head for ledger in ledgers.values() if ledger.head]
    committed = store.commit.partitions.get(modality, {}).get(name)
    if committed is not None:
        if rule.shared is not None:
            raise StoreError(
                f"--name {name}: scenes were appended since it was made, and shared {rule.shared} would "
                "cut what is there anew; give another name"
            )
        begun.append(committed)
    if begun:
        _check_same_rule(name, begun[0]["rule"], rule)
        thresholds = begun[0]["thresholds"]
    else:
        thresholds = plain(_fixed_thresholds(store, layout, rule))
    head = {"partition": name, "rule": plain(rule_entry(rule)), "thresholds": thresholds}
    for number, ledger in ledgers.items():
        if not ledger.head:
            ledger.head = {**head, "batch": number}
            ledger.create(objects)
    return ledgers


def _commit(
    store: Store, layout: StoreLayout, head: dict[str, Any], ledgers: dict[int, PartitionLedger]
) -> None:
    """Make a finished partition visible to readers, in one atomic step."""
    objects, before, modality = store.objects, store.commit, layout.modality
    partitions = {name: dict(made) for name, made in before.partitions.items()}
    own = partitions.setdefault(modality, {})
    known = own.get(head["partition"], {}).get("ledgers", [])
    added = []
    for number, ledger in sorted(ledgers.items()):
        content = ledger.canonical()
        objects.write(ledger.name, content)
        added.append({"batch": number, **named(ledger.name, content)})
    own[head["partition"]] = {
        "rule": head["rule"],
        "thresholds": head["thresholds"],
        "ledgers": [*known, *added],
    }
    metadata = write_metadata(objects, before.header, partitions)
    write_commit(
        objects, before.after(REPARTITION, partitions=partitions, metadata=metadata), before
    )


def _rows(
    store: Store,
    layout: StoreLayout,
    head: dict[str, Any],
    rule: FurtherRule,
    places: Places,
    todo: list[int],
    run: RunConfig,
    observer: Observer,
) -> Generator[list[dict[str, Any]]]:
    """Ledger rows of the shards to do, from workers or from this process."""
    listed = head["thresholds"]
    thresholds = None if listed is None else tuple(float(t) for t in listed)
    tasks = (
        repartition_task(store, layout, head["partition"], rule, thresholds, places, shard)
        for shard in todo
    )
    if _in_process(run, len(todo), sum(len(places.shard_tiles(k)) for k in todo), layout):
        return ([repartition_shard(task)] for task in tasks)
    return run_tasks(repartition_shard, tasks, len(todo), run, store.location, observer)


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


def _report(location: Location, layout: StoreLayout, name: str) -> RepartitionReport:
    """What is there, of a run that has done nothing."""
    store = open_store(location)
    made = store.partition(name, layout.modality)
    places = places_of(store, layout.modality)
    frames = places.slots
    return RepartitionReport(
        store=str(location),
        name=name,
        rule=made.rule,
        thresholds=made.thresholds,
        tiles=places.num_tiles,
        mean_tokens=float(made.tokens[frames].sum()) / places.num_tiles,
        shards=layout.num_shards,
        shards_written=0,
        committed=False,
    )
