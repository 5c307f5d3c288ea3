"""Repair of a finished store: exactly what is damaged is made again, to the very bytes that were committed.

Every batch is planned as it was, on top of the batches before it; of its shards those with a damaged
object run again, and an object is written only if its sha256 is the committed one.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ArchiveError, IntegrityError
from pipeline.jobs.engine import run_tasks
from pipeline.jobs.known import Known, content_of, damage_of, known_objects
from pipeline.jobs.lost_commits import derived_commits
from pipeline.jobs.manifest import encode_manifest
from pipeline.jobs.observer import Observer
from pipeline.jobs.outcome import batch_table
from pipeline.jobs.prepare import begin_ledger
from pipeline.jobs.resume import State, check_same_config, new_files
from pipeline.jobs.shard import ShardTask, process_shard, shard_task
from pipeline.planning.existing import existing_of
from pipeline.planning.inputs import Job, plan_job
from pipeline.settings.canonical import canonical_json
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.run import RunConfig
from pipeline.storage.chain import Chain, read_chain
from pipeline.storage.commit import Batch, Commit
from pipeline.storage.header import grown, layouts_of
from pipeline.storage.history import History
from pipeline.storage.layout import metadata_objects
from pipeline.storage.ledger import Ledger
from pipeline.storage.lock import exclusive
from pipeline.storage.mending import Repaired, differs, remember, remembered
from pipeline.storage.objects import Objects, absolute, entry

# For fewer shards starting worker processes takes longer than the work they would share.
_IN_PROCESS_SHARDS = 3
_ROW = ("shard", "objects", "failed", "findings", "thresholds", "left_out", "tiles_left_out")


def readable_state(
    archive: str, objects: Objects, config: PreprocessConfig, observer: Observer
) -> tuple[State, int]:
    """The state of a store, and how many commits and ledgers were restored so that it can be read.

    Raises IntegrityError where they cannot be restored.
    """
    try:
        return State.read(objects), 0
    except IntegrityError:
        chain = read_chain(objects)
        if chain.newest is None:
            raise
    check_same_config(objects.location, chain.newest.header, config.data())
    with exclusive(objects):
        chain = read_chain(objects)
        number = _restore_commits(objects, chain)
        assert chain.newest is not None
        number += _restore_ledgers(archive, objects, chain.newest, config, observer)
    return State.read(objects), number


def repair(
    archive: str, objects: Objects, state: State, config: PreprocessConfig, observer: Observer
) -> Repaired:
    """Look over a finished store, and make again what is damaged; nothing else is touched.

    Sizes are looked at, records compared, and what `aptile verify` remembered. Raises IntegrityError where
    what is made again differs from what was committed, ArchiveError where the archive gives another plan.
    """
    noted = remembered(objects)
    chain = read_chain(objects)
    suspects = noted | _wrong_sizes(objects, state.history) | _wrong_records(objects, chain)
    if not suspects:
        return Repaired()
    with exclusive(objects):
        work, known = _Repair(archive, objects, state, chain, config), known_objects(objects, chain)
        damaged = {name for name in suspects if _is_damaged(objects, name, chain, known)}
        number = _restore_commits(objects, chain) + work.metadata(damaged)
        mended, shards = work.shards(damaged, observer)
        number += mended + work.manifests(damaged)
        for name, content in derived_commits(objects, read_chain(objects)).items():
            objects.write(name, content)
            number += 1
        after = read_chain(objects)
        left = tuple(sorted(n for n in damaged if _is_damaged(objects, n, after, known)))
        remember(objects, left)
    return Repaired(number, shards, left)


def _is_damaged(objects: Objects, name: str, chain: Chain, known: Known) -> bool:
    """Whether an object is not what was committed; none that no commit names is."""
    if name in chain.damaged:
        return True
    what = known.objects.get(name)
    return what is not None and damage_of(objects, name, what) is not None


def _wrong_sizes(objects: Objects, history: History) -> set[str]:
    rows = history.shards.values()
    said = {name: what["bytes"] for row in rows for name, what in row["objects"].items()}
    found = objects.sizes(said)
    return {name for name, size in said.items() if found.get(name) != size}


def _wrong_records(objects: Objects, chain: Chain) -> set[str]:
    """Damaged commits, manifests and metadata."""
    assert chain.newest is not None
    named = {**chain.newest.metadata, chain.newest.manifest["path"]: chain.newest.manifest}
    wrong = {name for name, what in named.items() if content_of(objects, name, what) is None}
    for commit in chain.intact:
        if objects.size(commit.manifest["path"]) != commit.manifest["bytes"]:
            wrong.add(commit.manifest["path"])
    return wrong | chain.damaged.keys()


def _restore_commits(objects: Objects, chain: Chain) -> int:
    for name, content in chain.restored.items():
        objects.write(name, content)
    return len(chain.restored)


@dataclass(frozen=True)
class _Repair:
    """What is needed to make objects of a store again."""

    archive: str
    objects: Objects
    state: State
    chain: Chain
    config: PreprocessConfig

    @property
    def commit(self) -> Commit:
        assert self.state.commit is not None
        return self.state.commit

    def metadata(self, damaged: set[str]) -> int:
        """Write damaged `zarr.json` objects again; their number."""
        wanted = damaged & self.commit.metadata.keys()
        if not wanted:
            return 0
        header = self.commit.header
        made = metadata_objects(header, layouts_of(header).values(), self.commit.partitions)
        for name in sorted(wanted):
            _write_known(self.objects, name, made.get(name, b""), self.commit.metadata[name])
        return len(wanted)

    def shards(self, damaged: set[str], observer: Observer) -> tuple[int, int]:
        """Make damaged objects of arrays again; how many, of how many shards."""
        numbers = [0, 0]
        for position, ledger in enumerate(self.state.history.ledgers):
            wanted = {
                shard: {n: w for n, w in row["objects"].items() if n in damaged}
                for shard, row in ledger.shards.items()
            }
            wanted = {shard: names for shard, names in wanted.items() if names}
            if not wanted:
                continue
            job = self.planned(position)
            failed = {shard: ledger.shards[shard]["failed"] for shard in wanted}
            tasks = _tasks(self.objects, job, self.commit.header, wanted, failed)
            for row in _remade(tasks, self.objects, self.config.run, job, observer):
                _check_made(self.objects, row, wanted[row["shard"]])
            numbers[0] += sum(map(len, wanted.values()))
            numbers[1] += len(wanted)
        return numbers[0], numbers[1]

    def manifests(self, damaged: set[str]) -> int:
        """Write damaged manifests again; their number."""
        done = set[str]()
        for commit in self.chain.intact:
            name = commit.manifest["path"]
            if name not in damaged or name in done:
                continue
            position = len(commit.batches) - 1
            ledger = self.state.history.ledgers[position]
            before = [c for c in self.chain.intact if len(c.batches) == position]
            if position and not before:
                continue
            table = batch_table(
                self.objects,
                commit.header,
                self.planned(position),
                ledger,
                before[-1] if before else None,
            )
            _write_known(self.objects, name, encode_manifest(table), commit.manifest)
            done.add(name)
        return len(done)

    def planned(self, position: int) -> Job:
        """The plan of a batch, as it was."""
        before = History(self.state.history.ledgers[:position])
        ledger = self.state.history.ledgers[position]
        job = _plan(self.archive, self.config, self.commit.header, before, ledger.inputs())
        made = begin_ledger(job, ledger.number)
        for part in ("head", "places", "scenes"):
            if canonical_json(getattr(made, part)) != canonical_json(getattr(ledger, part)):
                raise ArchiveError(
                    f"{self.objects.location}: {self.archive} gives another plan now than when the store "
                    f"was made ({_first_other(getattr(ledger, part), getattr(made, part))}); restore it, "
                    "or preprocess into a new store path. Nothing was replaced"
                )
        return job


def _plan(
    archive: str,
    config: PreprocessConfig,
    header: dict[str, Any],
    before: History,
    inputs: set[str] | None,
) -> Job:
    """The plan of a batch of these inputs on top of others; of all that are new, without them."""
    only = None if inputs is None else frozenset(inputs)
    if not before.ledgers:
        return plan_job(archive, config, only=only)
    again = frozenset(before.quarantined()) & (only or frozenset())
    existing = existing_of(grown(header, before.num_shards), before, again)
    return plan_job(archive, config, existing, only)


def _first_other(was: Any, now: Any) -> str:
    if isinstance(was, list):
        known = {canonical_json(row): row for row in now}
        other = next((row for row in was if canonical_json(row) not in known), None)
        if other is not None:
            return f"{other.get('scene') or other.get('place')!r:.80} differs"
    return "other shards"


def _tasks(
    objects: Objects,
    job: Job,
    header: dict[str, Any],
    wanted: dict[int, dict[str, Any]],
    failed: dict[int, dict[str, str]],
) -> list[ShardTask]:
    """Tasks that write `wanted` objects by shard, without the scenes that failed there."""
    ranges = {
        name: tuple((float(low), float(high)) for low, high in facts["value_range"])
        for name, facts in header["modalities"].items()
    }
    made = ((n, shard_task(job.plan, n, absolute(objects), job.access, ranges)) for n in wanted)
    return [replace(t, wanted=wanted[n], excluded=failed.get(n, {})) for n, t in made]


def _remade(
    tasks: list[ShardTask], objects: Objects, run: RunConfig, job: Job, observer: Observer
) -> Iterator[dict[str, Any]]:
    """Ledger rows of shards that are made again, by workers where that is worth it."""
    observer.planned(sum(len(task.rows) for task in tasks), 0)
    if run.scheduler is None and len(tasks) <= _IN_PROCESS_SHARDS:
        for task in tasks:
            yield process_shard(task)
            observer.shard_done(len(task.rows))
        return
    results = run_tasks(
        process_shard, iter(tasks), len(tasks), run, objects.location, observer, job.access.roots
    )
    with contextlib.closing(results) as batches:
        for rows in batches:
            for row in rows:
                observer.shard_done(len(job.plan.tile_range(row["shard"])))
            yield from rows


def _check_made(objects: Objects, row: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, what in wanted.items():
        if row["objects"].get(name) != what:
            raise IntegrityError(differs(objects.location, name))


def _write_known(objects: Objects, name: str, content: bytes, what: dict[str, Any]) -> None:
    """Write an object if it is the one that was committed."""
    if entry(content) != {"bytes": what["bytes"], "sha256": what["sha256"]}:
        raise IntegrityError(differs(objects.location, name))
    objects.write(name, content)


def _restore_ledgers(
    archive: str,
    objects: Objects,
    commit: Commit,
    config: PreprocessConfig,
    observer: Observer,
) -> int:
    """Write damaged ledgers of a commit again; their number."""
    found = [_ledger(objects, batch) for batch in commit.batches]
    number = 0
    for position, batch in enumerate(commit.batches):
        if found[position] is not None:
            continue
        before = History(tuple(ledger for ledger in found[:position] if ledger is not None))
        later = History(tuple(ledger for ledger in found[position + 1 :] if ledger is not None))
        lost = _LostLedger(archive, objects, commit, batch, before, later, config, observer)
        found[position] = lost.restored()
        number += 1
    return number


def _ledger(objects: Objects, batch: Batch) -> Ledger | None:
    name = batch.ledger["path"]
    content = content_of(objects, name, batch.ledger)
    return None if content is None else Ledger.parse(content, f"{objects.location}/{name}")


@dataclass(frozen=True)
class _LostLedger:
    """A damaged ledger, and the batches before and after it. Its sha256 is all that is known of it."""

    archive: str
    objects: Objects
    commit: Commit
    batch: Batch
    before: History
    later: History
    config: PreprocessConfig
    observer: Observer

    def restored(self) -> Ledger:
        """Plan the batch and make all of its shards again, without writing them; then write the ledger."""
        legible = self._legible()
        failed = {shard: row.get("failed", {}) for shard, row in legible.shards.items()}
        job = self._planned(legible)
        for excluded in (failed, {}) if any(failed.values()) else ({},):
            ledger = begin_ledger(job, self.batch.number)
            nothing: dict[int, dict[str, Any]] = {shard: {} for shard in self.batch.shards}
            tasks = _tasks(self.objects, job, self.commit.header, nothing, excluded)
            for row in _remade(tasks, self.objects, self.config.run, job, self.observer):
                ledger.shards[row["shard"]] = {key: row[key] for key in _ROW}
            content = ledger.canonical()
            if {"path": self._name, **entry(content)} == self.batch.ledger:
                self.objects.write(self._name, content)
                self._note_damage(ledger)
                return ledger
        raise IntegrityError(differs(self.objects.location, self._name))

    def _note_damage(self, ledger: Ledger) -> None:
        """Nobody could compare the objects that only this ledger names."""
        rows, digest = ledger.shards.values(), self.objects.digest
        named = ((name, what) for row in rows for name, what in row["objects"].items())
        damaged = {name for name, what in named if digest(name) != what}
        remember(self.objects, remembered(self.objects) | damaged)

    @property
    def _name(self) -> str:
        return str(self.batch.ledger["path"])

    def _legible(self) -> Ledger:
        """The rows that can still be read; hints, not facts."""
        ledger = Ledger()
        for line in self.objects.lines(self._name).splitlines(keepends=True):
            try:
                row = Ledger.parse(line, self._name)
            except (IntegrityError, AttributeError):
                continue
            ledger.files += row.files
            ledger.scenes += row.scenes
            ledger.shards |= row.shards
        return ledger

    def _planned(self, legible: Ledger) -> Job:
        header, ids = self.commit.header, legible.inputs()
        retried = frozenset(self.before.quarantined()) & ids
        every = _plan(self.archive, self.config, header, self.before, None)
        inputs = {scene for scenes in every.inputs.values() for scene in scenes} | retried
        inputs -= self.later.inputs() - ids
        job = _plan(self.archive, self.config, header, self.before, inputs)
        known, later = legible.fingerprints(), self.later.fingerprints()
        files = new_files(self.before, job.files)
        kept = {key: f for key, f in files.items() if key not in later or key in known}
        return replace(
            job, files={key: known.get(key, f) if key in later else f for key, f in kept.items()}
        )
