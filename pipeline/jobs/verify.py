"""Verification: objects, metadata, ledgers, manifests and commits of a store against each other.

What a commit names is compared by size and sha256. What is damaged is remembered in the store, so that
the next `aptile preprocess` or `aptile repartition` mends exactly that.
"""

import os
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.errors import AptileError, StoreError
from pipeline.jobs.crosscheck import manifest_problems, metadata_problems
from pipeline.jobs.known import (
    NO_CURE,
    Cure,
    Damage,
    Known,
    KnownObject,
    damage_of,
    is_ledger,
    known_objects,
)
from pipeline.jobs.leftovers import Beside, beside
from pipeline.jobs.lost_commits import derived_commits
from pipeline.storage.chain import Chain, read_chain
from pipeline.storage.commit import COMMIT, Commit, commit_name, decode
from pipeline.storage.header import check_version, read_header
from pipeline.storage.layout import ROOT_METADATA
from pipeline.storage.ledger import Ledger, ledger_name
from pipeline.storage.mending import remember
from pipeline.storage.objects import Location, Objects, objects_at
from pipeline.store import Store

# Objects that one thread looks at before it says how far it is.
_GROUP = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VerifyReport:
    """What was found. `commit` is the newest commit's number, None where the first is not finished.

    `objects` and `bytes` count what was compared. `under_way` says what is being written or was
    interrupted, with its objects in `unfinished`; `leftovers` are objects that nothing names.
    `remembered` says whether the store holds a note of the damage.
    """

    store: str
    commit: int | None
    objects: int
    bytes: int
    damaged: tuple[Damage, ...]
    under_way: tuple[str, ...]
    unfinished: tuple[str, ...]
    leftovers: tuple[str, ...]
    remembered: bool

    @property
    def intact(self) -> bool:
        return not self.damaged


def verify(
    location: Location, workers: int | None = None, progress: Progress = lambda done, total: None
) -> VerifyReport:
    """Check a whole store with so many threads; `progress` hears the objects done and all there are.

    Raises StoreError where there is no store, or one of another format version.
    """
    objects = objects_at(location)
    chain = read_chain(objects)
    if chain.newest is None and not chain.damaged:
        return _unfinished(objects, workers, progress)
    if chain.newest is None:
        # Nothing says what belongs to the store.
        damaged = tuple(Damage(name, what, NO_CURE) for name, what in chain.damaged.items())
        return _report(objects, None, {}, list(damaged), Beside())
    check_version(objects.location, chain.newest.header)
    derived = derived_commits(objects, chain)
    earlier = {commit.number: commit for commit in map(decode, derived.values())}
    known = known_objects(objects, replace(chain, commits={**earlier, **chain.commits}))
    found = Beside()
    if not known.problems:
        found = beside(objects, chain.newest, known, chain.hidden)
    damaged_objects = [
        damage
        for damage in compare(objects, known.objects, workers, progress)
        # An interrupted commit writes the metadata of the next state first.
        if damage.name not in found.metadata
        or objects.digest(damage.name) != found.metadata[damage.name]
    ]
    if read_chain(objects).newest != chain.newest:
        return verify(location, workers, progress)  # a writer finished meanwhile
    records = [
        *_chain_damage(chain, derived),
        *(Damage(name, *problem) for name, problem in known.problems.items()),
    ]
    if not records and not damaged_objects:
        records = _contradictions(objects, chain.newest)
    every = [*records, *damaged_objects]
    if any(damage.name in chain.damaged or is_ledger(damage.name) for damage in every):
        # What a lost record named must not be taken for rubbish.
        found = replace(found, leftovers=())
    return _report(objects, chain.newest, known.objects, every, found)


def compare(
    objects: Objects,
    known: dict[str, KnownObject],
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Damage]:
    """Objects that are lost, or not what they must be, by name."""
    names = sorted(known)
    groups = [names[start : start + _GROUP] for start in range(0, len(names), _GROUP)]
    damaged: list[Damage] = []
    done = 0
    progress(0, len(names))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            look = pool.map(lambda group: [damage_of(objects, n, known[n]) for n in group], groups)
            for group, found in zip(groups, look, strict=True):
                damaged += [damage for damage in found if damage is not None]
                done += len(group)
                progress(done, len(names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return damaged


def _chain_damage(chain: Chain, derived: Container[str]) -> Iterator[Damage]:
    assert chain.newest is not None
    for name, what in sorted(chain.damaged.items()):
        cure = NO_CURE
        if name in chain.restored:
            cure = Cure("record", commit_name(chain.newest.number) if name == COMMIT else COMMIT)
        elif name in derived:
            cure = Cure("record", "the commit after it")
        yield Damage(name, what, cure)


def _contradictions(objects: Objects, commit: Commit) -> list[Damage]:
    """What records that are all as committed say against each other."""
    found = [Damage(ROOT_METADATA, w, NO_CURE) for w in metadata_problems(objects, commit)]
    try:
        problems = list(manifest_problems(Store(objects, commit.header, commit)))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problems = [f"cannot be used ({' '.join(str(error).split()):.200})"]
    return found + [Damage(commit.manifest["path"], what, NO_CURE) for what in problems]


def _unfinished(objects: Objects, workers: int | None, progress: Progress) -> VerifyReport:
    """A store without a commit: what its ledger says is done."""
    name = ledger_name(1)
    content = objects.lines(name)
    if read_header(objects) is None:
        if not content:
            raise StoreError(
                f"{objects.location}: no aptile store here; make one with `aptile preprocess`"
            )
        what = "cannot be read" if objects.size(ROOT_METADATA) is not None else "is missing"
        return _report(objects, None, {}, [Damage(ROOT_METADATA, what, NO_CURE)], Beside())
    known, damaged = Known(), list[Damage]()
    ledger = Ledger()
    try:
        ledger = Ledger.parse(content, f"{objects.location}/{name}")
        for shard, row in ledger.shards.items():
            for path, what in row["objects"].items():
                known.take(path, what, Cure("shard", "batch 1", shard))
    except (AptileError, KeyError, TypeError, ValueError) as error:
        damaged.append(Damage(name, f"cannot be used ({error})", NO_CURE))
    damaged += compare(objects, known.objects, workers, progress)
    num_shards = ledger.head.get("num_shards", 0)
    text = (
        f"the job that writes it has not finished: {len(ledger.shards)} of {num_shards} shards are done; "
        "run its `aptile preprocess` command again to complete it"
    )
    return _report(objects, None, known.objects, damaged, Beside(under_way=(text,)))


def _report(
    objects: Objects,
    commit: Commit | None,
    known: dict[str, KnownObject],
    damaged: list[Damage],
    found: Beside,
) -> VerifyReport:
    return VerifyReport(
        store=objects.location,
        commit=None if commit is None else commit.number,
        objects=len(known),
        bytes=sum(what.bytes for what in known.values()),
        damaged=tuple(damaged),
        under_way=found.under_way,
        unfinished=found.unfinished,
        leftovers=found.leftovers,
        remembered=_remember(objects, damaged),
    )


def _remember(objects: Objects, damaged: list[Damage]) -> bool:
    """Whether the store holds a note of what is damaged; it may be read-only."""
    try:
        remember(objects, {damage.name for damage in damaged})
    except (StoreError, OSError):
        return False
    return bool(damaged)
