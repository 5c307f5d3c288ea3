"""Commits: what makes written objects a state that readers see, and keeps every earlier state readable.

A commit names everything a reader needs: the header, the manifest, the ledger of every batch of shards,
further partitions. Objects that a commit names never change; the next commit adds others. COMMIT.json
is the newest one, `commits/` keeps all. Order of writes: the objects of a shard, its ledger row, the
metadata, the manifest, the ledger in canonical order, the commit under its number, COMMIT.json.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.settings.canonical import canonical_json, plain
from pipeline.storage.objects import Objects, entry

COMMIT = "COMMIT.json"
COMMITS = "commits"
PREPROCESS, APPEND, REPARTITION = "preprocess", "append", "repartition"
MEND = "the store is damaged; `aptile verify` says what is, and how to mend it"


@dataclass(frozen=True)
class Batch:
    """Shards that one run of preprocessing planned: `[first_shard, first_shard + num_shards)`.

    `ledger` names its ledger (`path`, `bytes`, `sha256`).
    """

    number: int
    first_shard: int
    num_shards: int
    ledger: dict[str, Any]

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + self.num_shards)


@dataclass(frozen=True)
class Commit:
    """One committed state of a store. `kind` says what made it, `parent` is the sha256 of the one before.

    `header` is `pipeline.storage.header`'s; `manifest` and `metadata` name objects with `bytes` and
    `sha256`; `partitions` has, by modality and name, `rule`, `thresholds` and one of `ledgers` per batch.
    """

    number: int
    kind: str
    parent: str | None
    header: dict[str, Any]
    manifest: dict[str, Any]
    batches: tuple[Batch, ...]
    summary: dict[str, Any]
    metadata: dict[str, dict[str, Any]]
    partitions: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        return sum(batch.num_shards for batch in self.batches)

    def encode(self) -> bytes:
        """The commit as it is stored; its last field is the sha256 of the others."""
        # Not sorted: the header's first modality leads.
        content = plain(asdict(self))
        content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json.dumps(content, indent=2).encode() + b"\n"

    def after(self, kind: str, **changes: Any) -> "Commit":
        """The next commit, with some of its fields changed."""
        parent = hashlib.sha256(self.encode()).hexdigest()
        return replace(self, number=self.number + 1, kind=kind, parent=parent, **changes)


def decode(content: bytes) -> Commit:
    """The commit in some bytes; ValueError where a single byte is not as it was written."""
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        batches = tuple(Batch(**batch) for batch in fields.pop("batches"))
        commit = Commit(**fields, batches=batches)
        same = commit.encode() == content
        _check_kinds(commit)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no commit") from error
    if not same:
        raise ValueError("its checksum does not match")
    return commit


def _check_kinds(commit: Commit) -> None:
    """Raise ValueError, KeyError or TypeError unless numbers are numbers and objects are named."""
    made = [entry for names in commit.partitions.values() for entry in names.values()]
    ledgers = [ledger for entry in made for ledger in entry["ledgers"]]
    with_path = [commit.manifest, *(batch.ledger for batch in commit.batches), *ledgers]
    numbers = [commit.number, *(ledger["batch"] for ledger in ledgers)]
    numbers += [n for b in commit.batches for n in (b.number, b.first_shard, b.num_shards)]
    texts = [what["path"] for what in with_path]
    for what in (*with_path, *commit.metadata.values()):
        numbers.append(what["bytes"])
        texts.append(what["sha256"])
    if not all(type(n) is int for n in numbers) or not all(type(t) is str for t in texts):
        raise ValueError("no commit")


def commit_name(number: int) -> str:
    """Where the commit of a number is kept."""
    return f"{COMMITS}/{number:06d}.json"


def read_commit(objects: Objects, number: int | None = None) -> Commit | None:
    """The newest commit of a store, or one by its number; None if there is none.

    Raises IntegrityError where it is damaged.
    """
    name = COMMIT if number is None else commit_name(number)
    try:
        content = objects.read(name)
    except (FileNotFoundError, NotADirectoryError):
        # The first one alone may be there: its writer was stopped just before it became visible.
        if number is None and objects.size(commit_name(2)) is not None:
            raise IntegrityError(f"{objects.location}/{name} is missing; {MEND}") from None
        return None
    try:
        return decode(content)
    except ValueError as error:
        raise IntegrityError(
            f"{objects.location}/{name} is not a commit ({error}); {MEND}"
        ) from None


def write_commit(objects: Objects, commit: Commit, before: Commit | None) -> None:
    """Make a commit visible to readers, in one atomic step; everything it names is durable already.

    Raises LockedError, and changes nothing, where another process made a commit since `before`.
    """
    content, seen = commit.encode(), None if before is None else before.encode()
    name = commit_name(commit.number)
    # What a crash left under the number is replaced, but not what another process commits meanwhile.
    left = _content(objects, name)
    if _content(objects, COMMIT) != seen:
        raise LockedError(
            f"{objects.location}/{COMMIT} was written by another process meanwhile; run the same command "
            "again"
        )
    objects.swap(name, content, left)
    objects.swap(COMMIT, content, seen)


def _content(objects: Objects, name: str) -> bytes | None:
    try:
        return objects.read(name)
    except FileNotFoundError:
        return None


def all_commits(objects: Objects) -> Iterator[Commit]:
    """Every commit from the first to the newest. Raises IntegrityError where one is missing or damaged."""
    newest = read_commit(objects)
    for number in range(1, newest.number if newest is not None else 0):
        commit = read_commit(objects, number)
        if commit is None:
            raise IntegrityError(f"{objects.location}/{commit_name(number)} is missing; {MEND}")
        yield commit
    if newest is not None:
        yield newest


def named(name: str, content: bytes) -> dict[str, Any]:
    """How a commit names an object."""
    return {"path": name, **entry(content)}


def read_named(objects: Objects, what: dict[str, Any]) -> bytes:
    """The object a commit names by `path`; IntegrityError if it is lost or another one."""
    try:
        content = objects.read(what["path"])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        content = None
    if content is None or hashlib.sha256(content).hexdigest() != what["sha256"]:
        found = "is missing" if content is None else "differs from what was committed"
        raise IntegrityError(f"{objects.location}/{what['path']} {found}; {MEND}")
    return content


def encode_rows(rows: Iterable[dict[str, Any]]) -> bytes:
    """The rows of a ledger, one JSON object per line."""
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def take_rows(content: bytes, where: str, take: Callable[[dict[str, Any]], None]) -> None:
    """Hand every row of a ledger to `take`.

    Raises IntegrityError where a line is no JSON, or `take` cannot use it.
    """
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            take(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise IntegrityError(f"{where}: line {number} is not a ledger row; {MEND}") from None


def require_commit(objects: Objects, number: int | None) -> Commit:
    """A commit that must be there; StoreError, which lists the numbers there are, if it is not."""
    commit = read_commit(objects, number)
    if commit is None:
        newest = read_commit(objects)
        there = "none" if newest is None else f"1 to {newest.number}"
        raise StoreError(
            f"{objects.location}: no commit {number}; there are {there}, see `aptile log`"
        )
    return commit
