"""Every object that the commits of a store name, with what it must be and how it is made again."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.storage.chain import Chain
from pipeline.storage.commit import COMMIT, Batch, Commit
from pipeline.storage.header import layouts_of
from pipeline.storage.layout import ArraySpec
from pipeline.storage.ledger import Ledger
from pipeline.storage.objects import Objects
from pipeline.storage.partitions import PartitionLedger, is_partition_name


@dataclass(frozen=True)
class Cure:
    """How an object is mended. `kind` is `shard` (made again from the archive), `partition` (cut again
    from the scores), `record` (written again from what the store holds) or `none`; `of` says of which
    partition, or from what it is restored; `shard` which shard it belongs to."""

    kind: str
    of: str = ""
    shard: int | None = None


NO_CURE = Cure("none")


@dataclass(frozen=True)
class KnownObject:
    """What an object must be."""

    bytes: int
    sha256: str
    cure: Cure

    @property
    def entry(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class Damage:
    """One object that is not what it must be: what it is, and how that is mended."""

    name: str
    what: str
    cure: Cure


@dataclass
class Known:
    """All objects of a chain of commits by name.

    `problems` are contradictions between records, by the name of the record: `what` and `cure`.
    """

    objects: dict[str, KnownObject] = field(default_factory=dict)
    problems: dict[str, tuple[str, Cure]] = field(default_factory=dict)

    def take(self, name: str, what: dict[str, Any], cure: Cure) -> None:
        """Add an object; two that cannot both be there are a contradiction."""
        found = KnownObject(what["bytes"], what["sha256"], cure)
        before = self.objects.setdefault(name, found)
        if before.entry != found.entry:
            self.problems[name] = ("is named twice, with different contents", NO_CURE)


def known_objects(objects: Objects, chain: Chain) -> Known:
    """What all intact commits name; damaged ledgers are left for whoever compares the objects."""
    known = Known()
    assert chain.newest is not None
    for name, what in chain.newest.metadata.items():
        known.take(name, what, Cure("record", "the commit's header"))
    for commit in chain.intact:
        _take_commit(objects, commit, known)
    return known


def _take_commit(objects: Objects, commit: Commit, known: Known) -> None:
    try:
        specs = _specs(commit)
        manifest = commit.manifest
        known.take(manifest["path"], manifest, Cure("record", "the shards and the archive"))
        for batch in commit.batches:
            _take_batch(objects, batch, specs, known)
        for modality, made in commit.partitions.items():
            for name in made:
                _take_partition(objects, commit, modality, name, known)
    except (IntegrityError, KeyError, TypeError, AttributeError) as error:
        known.problems[COMMIT] = (f"cannot be used ({' '.join(str(error).split()):.200})", NO_CURE)


def _specs(commit: Commit) -> dict[str, ArraySpec]:
    arrays: dict[str, ArraySpec] = {}
    for layout in layouts_of(commit.header).values():
        arrays |= layout.arrays()
    return arrays


def _take_batch(objects: Objects, batch: Batch, specs: dict[str, ArraySpec], known: Known) -> None:
    name = batch.ledger["path"]
    seen = name in known.objects
    known.take(name, batch.ledger, Cure("record", "the archive"))
    content = None if seen else content_of(objects, name, batch.ledger)
    if content is None:
        return
    ledger = Ledger.parse(content, f"{objects.location}/{name}")
    expected = {
        "batch": batch.number,
        "first_shard": batch.first_shard,
        "num_shards": batch.num_shards,
    }
    if ledger.head != expected or ledger.shards.keys() != set(batch.shards):
        known.problems[name] = ("is of other shards than its commit says", NO_CURE)
    for shard, row in ledger.shards.items():
        cure = Cure("shard", f"batch {batch.number}", shard)
        _take_row(name, row, {f"{a}/{s.shard_key(shard)}" for a, s in specs.items()}, cure, known)


def _take_partition(
    objects: Objects, commit: Commit, modality: str, name: str, known: Known
) -> None:
    layout = layouts_of(commit.header).get(modality)
    if layout is None or not layout.tokenized or not is_partition_name(name):
        known.problems[COMMIT] = (f"names a partition {name!r:.80} of {modality!r:.80}", NO_CURE)
        return
    specs, of = layout.partition_arrays(name), f"{modality}/{name}"
    for what in commit.partitions[modality][name]["ledgers"]:
        path = what["path"]
        seen = path in known.objects
        known.take(path, what, Cure("partition", of))
        content = None if seen else content_of(objects, path, what)
        if content is None:
            continue
        for shard, row in PartitionLedger.parse(path, content, objects.location).shards.items():
            allowed = {f"{array}/{spec.shard_key(shard)}" for array, spec in specs.items()}
            _take_row(path, row, allowed, Cure("partition", of, shard), known)


def _take_row(
    ledger: str, row: dict[str, Any], allowed: set[str], cure: Cure, known: Known
) -> None:
    """The objects of one shard; all of them belong to it."""
    for name, what in row["objects"].items():
        if name not in allowed:
            known.problems[ledger] = (
                f"names {name!r:.80}, which is no object of its shard",
                NO_CURE,
            )
        else:
            known.take(name, what, cure)


def content_of(objects: Objects, name: str, what: dict[str, Any]) -> bytes | None:
    """A record's content if it is the one that was committed."""
    if objects.size(name) != what["bytes"]:
        return None
    content = objects.read(name)
    return content if hashlib.sha256(content).hexdigest() == what["sha256"] else None


def is_ledger(name: str) -> bool:
    """Whether an object is a ledger: while it is damaged, what it names is unknown."""
    return name.endswith(".jsonl")


def damage_of(objects: Objects, name: str, known: KnownObject) -> Damage | None:
    """What is wrong with an object, if anything is."""
    try:
        found = objects.digest(name)
    except OSError as error:
        return Damage(name, f"cannot be read ({error.strerror or error})", known.cure)
    except IntegrityError:
        return Damage(name, "is no name below the store", NO_CURE)
    if found == known.entry:
        return None
    what = "differs from what was committed"
    if found is None:
        what = "is missing"
    elif found["bytes"] != known.bytes:
        what = f"is {found['bytes']} bytes long, {known.bytes} were committed"
    return Damage(name, what, known.cure)
