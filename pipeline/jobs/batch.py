"""A batch of shards at work: run its tasks, keep its ledger, make it a commit."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from pipeline.jobs.engine import run_tasks
from pipeline.jobs.manifest import encode_manifest, manifest_name
from pipeline.jobs.observer import Observer
from pipeline.jobs.outcome import batch_table, summary_of
from pipeline.jobs.quarantine import QuarantineLimit
from pipeline.jobs.resume import State
from pipeline.jobs.shard import process_shard, shard_task
from pipeline.jobs.space import telling_space, warn_if_short
from pipeline.planning.inputs import Job
from pipeline.storage.commit import (
    APPEND,
    PREPROCESS,
    Batch,
    Commit,
    named,
    write_commit,
)
from pipeline.storage.history import History
from pipeline.storage.ledger import Ledger, ledger_name
from pipeline.storage.lock import Held
from pipeline.storage.metadata import write_metadata
from pipeline.storage.objects import Objects, absolute

Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class BatchAtWork:
    """A batch at work: on top of which state, by which plan, how far it has come."""

    objects: Objects
    lock: Held
    before: State
    header: dict[str, Any]
    job: Job
    ledger: Ledger

    @property
    def history(self) -> History:
        """All batches, this one included."""
        return History((*self.before.history.ledgers, self.ledger))


def complete(batch: BatchAtWork, observer: Observer) -> tuple[Commit, int]:
    """Do the shards that are left, and commit; the commit, and how many shards that were.

    Raises StoreError if a disk is full or workers cannot be used, LockedError if the lock was lost.
    """
    objects, ledger, plan = batch.objects, batch.ledger, batch.job.plan
    objects.sweep()
    ranges = {
        name: tuple((float(low), float(high)) for low, high in entry["value_range"])
        for name, entry in batch.header["modalities"].items()
    }
    todo = [shard for shard in plan.shards if shard not in ledger.shards]
    observer.planned(len(plan.tiles), sum(len(plan.tile_range(shard)) for shard in ledger.shards))
    arrays = [spec for m in plan.modalities.values() for spec in m.layout.arrays().values()]
    warn_if_short(objects, ledger.shards.values(), len(todo), arrays)
    with telling_space(ledger.shards.values, plan.num_shards, arrays):
        if todo:
            _run_shards(batch, todo, ranges, observer)
        # Of workers that were killed, or finished late what others had done.
        objects.sweep()
        commit = _commit(batch)
    return commit, len(todo)


def _run_shards(
    batch: BatchAtWork, todo: list[int], ranges: dict[str, Ranges], observer: Observer
) -> None:
    objects, plan, ledger, job = batch.objects, batch.job.plan, batch.ledger, batch.job
    run = job.config.run
    limit = QuarantineLimit(
        objects.location, run.max_quarantine, job.num_inputs, ledger.quarantined()
    )
    tasks = (shard_task(plan, shard, absolute(objects), job.access, ranges) for shard in todo)
    results = run_tasks(
        process_shard, tasks, len(todo), run, objects.location, observer, job.access.roots
    )
    with contextlib.closing(results) as batches:
        for rows in batches:
            batch.lock.check()
            ledger.append(objects, rows)
            for row in rows:
                observer.shard_done(len(plan.tile_range(row["shard"])))
            limit.add(rows)
            observer.quarantined(len(limit.reasons))


def _commit(batch: BatchAtWork) -> Commit:
    """Write manifest and commit for every tile that has a frame.

    Where a new store has no tile nothing is written; the caller says why.
    """
    objects, plan, ledger, before = batch.objects, batch.job.plan, batch.ledger, batch.before.commit
    table = batch_table(objects, batch.header, batch.job, ledger, before)
    manifest = encode_manifest(table)
    own = Batch(ledger.number, plan.first_shard, plan.num_shards, {})
    commit = Commit(
        number=1,
        kind=PREPROCESS,
        parent=None,
        header=batch.header,
        manifest=named(manifest_name(ledger.number), manifest),
        batches=(replace(own, ledger=named(ledger_name(ledger.number), ledger.canonical())),),
        summary=summary_of(batch.history, table["split"].to_pylist(), batch.header["config"]),
        metadata={},
    )
    if before is not None:
        commit = before.after(
            APPEND,
            header=commit.header,
            manifest=commit.manifest,
            batches=(*before.batches, *commit.batches),
            summary=commit.summary,
        )
    if before is None and not len(table):
        return commit
    batch.lock.check()
    metadata = write_metadata(objects, commit.header, commit.partitions)
    objects.write(commit.manifest["path"], manifest)
    objects.write(ledger_name(ledger.number), ledger.canonical())
    commit = replace(commit, metadata=metadata)
    write_commit(objects, commit, before)
    return commit
