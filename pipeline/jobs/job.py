"""The preprocessing job: plan, prepare the store, run one Dask task per shard, commit.

The store is the only state. A job that was stopped anywhere is completed by running it again; a
finished one is left alone, unless further scenes are to be appended.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import ArchiveError, LockedError, NoSpaceError, StoreError
from pipeline.jobs.batch import BatchAtWork, complete
from pipeline.jobs.observer import Observer
from pipeline.jobs.prepare import begin_ledger, new_header
from pipeline.jobs.repair import readable_state, repair
from pipeline.jobs.resume import (
    State,
    check_apart,
    check_free,
    check_same_batch,
    check_same_choice,
    check_same_config,
    check_same_files,
    check_unchanged,
    new_files,
)
from pipeline.planning.existing import existing_of
from pipeline.planning.inputs import NothingNewError, archive_files, plan_job, require_scenes
from pipeline.settings.config import PreprocessConfig
from pipeline.storage.commit import Commit
from pipeline.storage.header import grown
from pipeline.storage.history import History
from pipeline.storage.layout import ROOT_METADATA
from pipeline.storage.lock import LOCK, Held, exclusive, tidy
from pipeline.storage.mending import Repaired
from pipeline.storage.metadata import write_metadata
from pipeline.storage.objects import LocalObjects, Location, Objects, objects_at


@dataclass(frozen=True)
class JobReport:
    """What a store came to: `inputs = done + len(quarantined) + len(skipped)`, always.

    `findings` are remarks on scenes that are in the store, `notes` on what was decided in this run.
    `tiles_left_out` and `frames_left_out` count those with too few valid pixels; `splits` counts tiles by
    split, and `shards_written` this run's shards. `commit` is the number of the commit that holds all of
    it, and `committed` whether this run made it: it can be that nothing else was left to do. `repaired`
    counts damaged objects that were written anew, and the shards they are of.
    """

    store: str
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
    commit: int
    committed: bool
    repaired: tuple[int, int] = (0, 0)

    @property
    def done(self) -> int:
        return self.inputs - len(self.quarantined) - len(self.skipped)


def run_job(
    archive: str,
    store: Location,
    config: PreprocessConfig,
    observer: Observer,
    *,
    append: bool = False,
    retry_quarantined: bool = False,
) -> JobReport:
    """Bring the store to completion and commit it.

    With `append`, scenes that a finished store has not got become its next commit; `retry_quarantined`
    takes those in once more that could not be read before. Raises StoreError if `store` holds something
    else or was made with another configuration, ArchiveError if there is nothing to read or the archive
    changed since the store was begun, LockedError if another process writes it.
    """
    objects = objects_at(store)
    state, restored = (
        (State.read(objects), 0) if append else readable_state(archive, objects, config, observer)
    )
    if state.header is None:
        if append:
            raise StoreError(
                f"{store}: no store to append to; leave out --append to make a new one"
            )
        return _begin(archive, store, objects, config, observer)
    check_same_config(str(store), state.header, config.data())
    if state.commit is not None and not append:
        _require_no_append_under_way(store, state)
        check_same_files(str(store), state.history, archive_files(archive, config))
        tidy(objects)
        repaired = repair(archive, objects, state, config, observer)
        return _mended(_report(store, state.history, state.commit), repaired, restored)
    with exclusive(objects) as lock:
        # Another process may have finished it, or appended, since we looked.
        state = State.read(objects)
        if state.commit is not None and not append:
            return _report(store, state.history, state.commit)
        if state.commit is None and append:
            raise StoreError(
                f"{store}: its job has not finished; complete it first, without --append"
            )
        if append:
            return _append(archive, objects, lock, state, config, observer, retry_quarantined)
        return _resume(archive, objects, lock, state, config, observer)


def _begin(
    archive: str, store: Location, objects: Objects, config: PreprocessConfig, observer: Observer
) -> JobReport:
    """Make a new store; nothing is left of one that could not be begun, or has no tile."""
    check_free(store)
    made = _missing_folders(objects)
    with exclusive(objects) as lock, _nothing_left(objects, made) as keep:
        state = State.read(objects)
        if state.header is not None:
            raise LockedError(
                f"{store} was made by another process just now; run the command again"
            )
        check_free(store, begun=False)
        job = plan_job(archive, config)
        check_apart(store, job)
        header, ledger = new_header(job), begin_ledger(job, 1)
        objects.sweep()
        ledger.create(objects)
        write_metadata(objects, header, {})
        keep()
        batch = BatchAtWork(objects, lock, state, header, job, ledger)
        try:
            report = _completed(batch, observer)
        except (LockedError, NoSpaceError):
            raise  # another's, or begun: workers elsewhere may be writing still
        except StoreError:
            if not ledger.shards:
                _clear(objects)
            raise
        if report.tiles == 0:
            _clear(objects)
            _refuse_empty(archive, report)
        return report


def _missing_folders(objects: Objects) -> list[Path]:
    """Folders that come into being with a store, the innermost first."""
    if not isinstance(objects, LocalObjects):
        return []
    return [f for f in (objects.folder, *objects.folder.parents) if not f.exists()]


@contextlib.contextmanager
def _nothing_left(objects: Objects, made: list[Path]) -> Iterator[Any]:
    """Removes what was made inside if that fails, until the function it yields is called."""
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    except LockedError:
        raise  # what is there is another's
    except BaseException:
        if not kept:
            _clear(objects)
            for folder in made[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def _clear(objects: Objects) -> None:
    """Remove all of a store: what says that it is one first, the lock last, so that this can be resumed."""
    objects.remove([ROOT_METADATA])
    objects.remove(name for name in objects.names() if name != LOCK)
    objects.clear()


def _resume(
    archive: str,
    objects: Objects,
    lock: Held,
    state: State,
    config: PreprocessConfig,
    observer: Observer,
) -> JobReport:
    """Complete the first batch of a store."""
    header, ledger = state.header, state.under_way
    assert header is not None
    if ledger is None:
        raise StoreError(
            f"{objects.location}: its ledger is missing, so what was done is unknown; remove the store "
            "and preprocess again"
        )
    first = History((ledger,))
    check_same_files(objects.location, first, archive_files(archive, config))
    job = plan_job(archive, config)
    check_same_choice(objects.location, ledger, job)
    report = _completed(BatchAtWork(objects, lock, state, header, job, ledger), observer)
    if report.tiles == 0:
        _clear(objects)
        _refuse_empty(archive, report)
    return report


def _append(
    archive: str,
    objects: Objects,
    lock: Held,
    state: State,
    config: PreprocessConfig,
    observer: Observer,
    retry_quarantined: bool,
) -> JobReport:
    """Add the scenes a store has not got as its next commit."""
    assert state.commit is not None
    assert state.header is not None
    ledger, history = state.under_way, state.history
    found = archive_files(archive, config)
    lost = frozenset(history.quarantined())
    if ledger is not None:
        check_same_batch(objects.location, ledger, history, found)
        retry_quarantined = bool(lost & ledger.inputs())
    existing = existing_of(state.header, history, lost if retry_quarantined else frozenset())
    try:
        job = plan_job(archive, config, existing)
    except NothingNewError:
        return _report(objects.location, history, state.commit)
    check_unchanged(job, history)
    job = replace(job, files=new_files(history, job.files))
    if ledger is None:
        ledger = begin_ledger(job, len(history.ledgers) + 1)
        ledger.create(objects)
    else:
        check_same_choice(objects.location, ledger, job)
    header = grown(state.header, job.plan.first_shard + job.plan.num_shards)
    return _completed(BatchAtWork(objects, lock, state, header, job, ledger), observer)


def _mended(report: JobReport, repaired: Repaired, restored: int) -> JobReport:
    """The report of a finished store that was looked over."""
    notes = report.notes
    if repaired.left:
        notes = (
            *notes,
            f"{len(repaired.left)} objects are still damaged, such as {repaired.left[0]}; `aptile verify` "
            "says what to do",
        )
    number = repaired.objects + restored
    return replace(report, notes=notes, repaired=(number, repaired.shards))


def _require_no_append_under_way(store: Location, state: State) -> None:
    if state.under_way is not None:
        raise StoreError(
            f"{store}: scenes are being appended, and that was interrupted; complete it with --append"
        )


def _refuse_empty(archive: str, report: JobReport) -> None:
    if report.tiles_left_out or report.frames_left_out:
        key = "tile" if report.tiles_left_out else "frame"
        raise ArchiveError(
            f"{archive}: no tile is left, as every {key} has too few valid pixels; lower "
            f"validity.min_{key}_valid_fraction"
        )
    require_scenes(archive, report.inputs, 0, {**report.skipped, **report.quarantined})


def _completed(batch: BatchAtWork, observer: Observer) -> JobReport:
    """Do what is left of a batch, commit it, and say what the store came to."""
    commit, written = complete(batch, observer)
    notes = (*batch.job.notes, *batch.job.facts.notes)
    report = _report(batch.objects.location, batch.history, commit)
    return replace(report, notes=notes, shards_written=written, committed=True)


def _report(store: Location, history: History, commit: Commit) -> JobReport:
    """What is there, of a run that has done nothing."""
    summary = commit.summary
    return JobReport(
        store=str(store),
        inputs=summary["inputs"],
        quarantined=history.quarantined(),
        skipped=history.skipped(),
        findings=history.findings(),
        notes=(),
        tiles=summary["tiles"],
        tiles_left_out=summary["tiles_left_out"],
        frames_left_out=summary["frames_left_out"],
        splits=summary["splits"],
        shards=summary["shards"],
        shards_written=0,
        commit=commit.number,
        committed=False,
    )
