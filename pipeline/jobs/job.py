"""The preprocessing job: plan, prepare the store, run one Dask task per shard, commit.

The store is the only state. A job that was stopped anywhere is completed by running it again; a
finished one is left alone.
"""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ArchiveError, StoreError
from pipeline.jobs.engine import run_tasks
from pipeline.jobs.manifest import ModalityOutcome, encode_manifest, present_frames
from pipeline.jobs.observer import Observer
from pipeline.jobs.prepare import create_store
from pipeline.jobs.quarantine import QuarantineLimit
from pipeline.jobs.resume import (
    check_apart,
    check_free,
    check_same_choice,
    check_same_config,
    check_same_files,
)
from pipeline.jobs.shard import process_shard, shard_task
from pipeline.planning.inputs import Job, archive_files, plan_job, require_scenes
from pipeline.planning.plan import Plan
from pipeline.planning.splits import split_summary
from pipeline.settings.config import PreprocessConfig
from pipeline.storage.commit import exclusive, read_commit, sweep_partials, write_commit
from pipeline.storage.header import read_header
from pipeline.storage.ledger import SKIPPED, Ledger
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.store import Store


@dataclass(frozen=True)
class JobReport:
    """What a job came to: `inputs = done + len(quarantined) + len(skipped)`, always.

    `findings` are remarks on scenes that are in the store, `notes` on what was decided in this run.
    `tiles_left_out` and `frames_left_out` count those with too few valid pixels; `splits` counts tiles by
    split, and `shards_written` this run's shards: 0 means that the store was complete already.
    """

    store: Path
    inputs: int
    quarantined: dict[str, str]
    skipped: dict[str, str]
    findings: dict[str, str]
    notes: tuple[str, ...]
    tiles: int
    tiles_left_out: int
    frames_left_out: int
    splits: dict[str, int]
    shards: int
    shards_written: int

    @property
    def done(self) -> int:
        return self.inputs - len(self.quarantined) - len(self.skipped)


def run_job(archive: str, store: Path, config: PreprocessConfig, observer: Observer) -> JobReport:
    """Bring the store to completion and commit it.

    Raises StoreError if `store` holds something else or was made with another configuration,
    ArchiveError if there is nothing to read or the archive changed since the store was begun.
    """
    existing = read_header(store)
    if existing is None:
        check_free(store)
        job = plan_job(archive, config)
        check_apart(store, job)
        create_store(store, job)
    else:
        check_same_config(store, existing, config.data())
        check_same_files(store, archive_files(archive, config))
        finished = _finished_report(store)
        if finished is not None:
            return finished
        job = plan_job(archive, config)
        check_same_choice(store, job)
    created = existing is None
    with exclusive(store):
        try:
            # Another process may have finished it since we looked.
            report = _finished_report(store) or _complete(store, job, observer)
        except StoreError:
            if created and not Ledger.read(store).shards:
                shutil.rmtree(store)
            raise
    if report.tiles == 0 and created:
        shutil.rmtree(store)
    _require_tiles(archive, report)
    return report


def _require_tiles(archive: str, report: JobReport) -> None:
    if report.tiles == 0:
        if report.tiles_left_out or report.frames_left_out:
            key = "tile" if report.tiles_left_out else "frame"
            raise ArchiveError(
                f"{archive}: no tile is left, as every {key} has too few valid pixels; lower "
                f"validity.min_{key}_valid_fraction"
            )
        require_scenes(archive, report.inputs, 0, {**report.skipped, **report.quarantined})


def _complete(store: Path, job: Job, observer: Observer) -> JobReport:
    sweep_partials(store)
    ledger, plan = Ledger.read(store), job.plan
    header = read_header(store)
    assert header is not None
    ranges = {
        name: tuple((float(low), float(high)) for low, high in entry["value_range"])
        for name, entry in header["modalities"].items()
    }
    todo = [shard for shard in range(plan.num_shards) if shard not in ledger.shards]
    observer.planned(len(plan.tiles), sum(len(plan.tile_range(shard)) for shard in ledger.shards))
    run = job.config.run
    limit = QuarantineLimit(str(store), run.max_quarantine, job.num_inputs, ledger.quarantined())
    if todo:
        path = str(store.absolute())
        tasks = (shard_task(plan, shard, path, job.access, ranges) for shard in todo)
        results = run_tasks(process_shard, tasks, len(todo), run, str(store), observer)
        with contextlib.closing(results) as batches:
            for rows in batches:
                for row in rows:
                    ledger.append(row)
                    observer.shard_done(len(plan.tile_range(row["shard"])))
                limit.add(rows)
                observer.quarantined(len(limit.reasons))
    summary = _commit(store, job, ledger, Store(store, header, {}))
    return _report(store, ledger, summary, len(todo), (*job.notes, *job.facts.notes))


def _commit(store: Path, job: Job, ledger: Ledger, opened: Store) -> dict[str, Any]:
    """Write manifest and COMMIT.json for every tile that has a frame; the commit's summary."""
    plan, quarantined = job.plan, ledger.quarantined()
    outcomes = {name: _outcome(plan, name, ledger, quarantined, opened) for name in plan.modalities}
    kept = _kept_tiles(plan, outcomes, ledger)
    facts = job.facts.select(kept)
    summary = {
        "inputs": job.num_inputs,
        "quarantined": len(quarantined),
        "skipped": len(ledger.with_status(SKIPPED)),
        "tiles": len(kept),
        "tiles_left_out": sum(len(row["tiles_left_out"]) for row in ledger.shards.values()),
        "frames_left_out": sum(
            len(slots) for row in ledger.shards.values() for slots in row["left_out"].values()
        ),
        "splits": split_summary(facts.splits) if plan.config.splits else {},
        "shards": plan.num_shards,
    }
    manifest = encode_manifest(plan, outcomes, kept, facts)
    # Without a tile there is nothing to commit; the caller says why.
    if len(kept):
        write_commit(store, ledger.canonical(), manifest, summary)
    return summary


def _outcome(
    plan: Plan, name: str, ledger: Ledger, quarantined: dict[str, str], opened: Store
) -> ModalityOutcome:
    modality = plan.modalities[name]
    capacity = modality.layout.shard_capacity
    left_out = [
        shard * capacity + slot
        for shard, row in sorted(ledger.shards.items())
        for slot in row["left_out"].get(name, ())
    ]
    counts = {
        what: opened.per_frame(name, what) for what in ("num_valid", "num_cloud", "num_nodata")
    }
    if modality.layout.tokenized:
        counts["num_cells"] = opened.per_frame(name, "num_cells")
        counts["tokens"] = opened.per_frame(name, f"partitions/{DEFAULT_PARTITION}/tokens")
    thresholds = ledger.thresholds(name)
    return ModalityOutcome(
        lost=np.array([scene.id in quarantined for scene in modality.scenes], np.bool_),
        left_out=np.array(left_out, np.int64),
        counts=counts,
        thresholds=[thresholds.get(number) for number in range(len(modality.scenes))],
    )


def _kept_tiles(plan: Plan, outcomes: dict[str, ModalityOutcome], ledger: Ledger) -> np.ndarray:
    """int64: tiles with a frame of some image modality that were not left out."""
    has_frame = np.zeros(len(plan.tiles), np.bool_)
    for name, outcome in outcomes.items():
        if plan.modalities[name].layout.tokenized:
            frames, present = present_frames(plan, name, outcome)
            has_frame[frames["tile"][present]] = True
    for shard, row in ledger.shards.items():
        has_frame[plan.tile_range(shard).start + np.array(row["tiles_left_out"], np.int64)] = False
    return np.flatnonzero(has_frame)


def _finished_report(store: Path) -> JobReport | None:
    commit = read_commit(store)
    return None if commit is None else _report(store, Ledger.read(store), commit["summary"], 0)


def _report(
    store: Path,
    ledger: Ledger,
    summary: dict[str, Any],
    written: int,
    notes: tuple[str, ...] = (),
) -> JobReport:
    return JobReport(
        store=store,
        inputs=summary["inputs"],
        quarantined=ledger.quarantined(),
        skipped=ledger.with_status(SKIPPED),
        findings=ledger.findings(),
        notes=notes,
        tiles=summary["tiles"],
        tiles_left_out=summary["tiles_left_out"],
        frames_left_out=summary["frames_left_out"],
        splits=summary["splits"],
        shards=summary["shards"],
        shards_written=written,
    )
