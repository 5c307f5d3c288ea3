"""What lies in a store beside what its commits name: work under way, and leftovers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import AptileError
from pipeline.jobs.known import Known
from pipeline.jobs.manifest import manifest_name
from pipeline.storage.commit import COMMIT, Commit, commit_name
from pipeline.storage.header import grown, layouts_of
from pipeline.storage.layout import metadata_objects
from pipeline.storage.ledger import Ledger, ledger_name
from pipeline.storage.lock import LOCK
from pipeline.storage.mending import DAMAGED
from pipeline.storage.objects import Objects, entry

# What every store may hold beside the objects of its commits.
_OWN = frozenset({COMMIT, LOCK, DAMAGED})
_PARTITION = re.compile(
    r"(?P<modality>[^/]+)/partitions/(?P<name>[^/]+)/"
    r"((scales|counts|tokens)/(c/\d+(/0)?|zarr\.json)|zarr\.json|ledger/\d{6}\.jsonl(\.rows/.+)?)"
)


@dataclass(frozen=True)
class Beside:
    """`under_way` in words, what is `unfinished` and `leftovers` by name. `metadata` is what
    `zarr.json` objects may be besides what is committed, because the next commit writes them first."""

    under_way: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)


def beside(objects: Objects, commit: Commit, known: Known, hidden: Iterable[str]) -> Beside:
    """Look at everything there is; nothing of it is damage."""
    numbers = [commit_name(number) for number in range(1, commit.number + 1)]
    named = {*known.objects, *numbers, *_OWN}
    extra = sorted(name for name in objects.names() if name not in named)
    extra = [name for name in extra if not _of_committed_log(name, known)]
    unfinished, metadata = set(hidden), dict[str, dict[str, Any]]()
    texts = [f"{name} was not made visible; run the command that made it again" for name in hidden]
    header = commit.header
    ledger = _next_batch(objects, commit)
    if ledger is not None:
        header = grown(header, ledger.head["first_shard"] + ledger.head["num_shards"])
        unfinished |= _of_batch(extra, ledger)
        texts.append(
            f"scenes are being appended, or that was interrupted: {len(ledger.shards)} of "
            f"{ledger.head['num_shards']} shards are done; run `aptile preprocess ... --append` again"
        )
    partitions = {modality: set(made) for modality, made in commit.partitions.items()}
    for modality, name, own in _partitions(extra, commit):
        partitions.setdefault(modality, set()).add(name)
        unfinished |= own
        texts.append(
            f"partition {name} of {modality} is being made, or that was interrupted; run its "
            "`aptile repartition` again"
        )
    if texts:
        allowed = metadata_objects(header, layouts_of(header).values(), partitions)
        metadata = {name: entry(content) for name, content in allowed.items()}
        unfinished |= metadata.keys() & set(extra)
    leftovers = tuple(name for name in extra if name not in unfinished)
    return Beside(tuple(texts), tuple(sorted(unfinished)), leftovers, metadata)


def _of_committed_log(name: str, known: Known) -> bool:
    """Rows that an object store collects singly, until the whole ledger is written."""
    log, mark, _ = name.partition(".rows/")
    return bool(mark) and log in known.objects


def _next_batch(objects: Objects, commit: Commit) -> Ledger | None:
    try:
        ledger = Ledger.read(objects, len(commit.batches) + 1)
        if ledger is None or ledger.head["first_shard"] != commit.num_shards:
            return None
        return ledger
    except (AptileError, KeyError):
        return None


def _of_batch(extra: list[str], ledger: Ledger) -> set[str]:
    """Objects of a batch under way: its ledger and manifest, and those of its shards."""
    first, number = ledger.head["first_shard"], ledger.head["batch"]
    shards = {str(shard) for shard in range(first, first + ledger.head["num_shards"])}
    log, own = ledger_name(number), set()
    for name in extra:
        _, chunk, key = name.rpartition("/c/")
        if (chunk and key.split("/")[0] in shards) or name.startswith(log):
            own.add(name)
    return own | {manifest_name(number)}.intersection(extra)


def _partitions(extra: list[str], commit: Commit) -> list[tuple[str, str, set[str]]]:
    """Modality, name and objects of partitions under way: those with a ledger that no commit names."""
    found: dict[tuple[str, str], set[str]] = {}
    begun = set()
    for name in extra:
        match = _PARTITION.fullmatch(name)
        if match is None or match["modality"] not in commit.header["modalities"]:
            continue
        key = match["modality"], match["name"]
        found.setdefault(key, set()).add(name)
        if "/ledger/" in name:
            begun.add(key)
    return [(*key, found[key]) for key in sorted(begun)]
