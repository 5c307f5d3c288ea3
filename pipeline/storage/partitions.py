"""Partitions beside the default one: their names, their ledger, their place in COMMIT.json.

Such a partition is made from stored score maps. Until COMMIT.json names it no reader sees it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import IntegrityError, StoreError
from pipeline.storage.commit import MEND, Commit, encode_rows, read_named, take_rows
from pipeline.storage.objects import Objects

DEFAULT_PARTITION = "default"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class StoredPartition:
    """A committed partition of one modality.

    `rule` is what it was made by, as stored; `thresholds` are those of every frame, fine to coarse, or
    None where they differ by scene or there are none. `tokens` int32 [frame, scale] counts leaves
    that are not missing, for every frame slot of the store.
    """

    modality: str
    name: str
    rule: dict[str, Any]
    thresholds: tuple[float, ...] | None
    tokens: np.ndarray


def is_partition_name(name: str) -> bool:
    """Whether a partition may be called so."""
    return _NAME.fullmatch(name) is not None


def check_new_name(name: str) -> None:
    """Raise StoreError unless a further partition may have that name."""
    if name == DEFAULT_PARTITION:
        raise StoreError(
            f"--name {name}: that is the partition `aptile preprocess` made, it stays as it is; give "
            "another name"
        )
    if not is_partition_name(name):
        raise StoreError(
            f"--name {name!r}: a partition's name is a letter, then up to 63 letters, digits, - or _; "
            "for example tokens-64"
        )


def partition_path(modality: str, name: str) -> str:
    """The group of a partition below the store."""
    return f"{modality}/partitions/{name}"


def partition_ledger_name(modality: str, name: str, batch: int) -> str:
    """Where a partition's ledger of the shards of one batch is kept."""
    return f"{partition_path(modality, name)}/ledger/{batch:06d}.jsonl"


@dataclass
class PartitionLedger:
    """What a partition is made by and which shards of one batch are done.

    Its first row is `{"partition": name, "rule", "thresholds", "batch"}`; then comes one row
    `{"shard": k, "objects": {path: {bytes, sha256}}}` per finished shard.
    """

    name: str
    head: dict[str, Any] = field(default_factory=dict)
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, content: bytes, location: str) -> "PartitionLedger":
        """The ledger in some bytes, kept under that name."""
        ledger = cls(name)
        take_rows(content, f"{location}/{name}", ledger._take)
        if ledger.shards and not ledger.head:
            raise IntegrityError(
                f"{location}/{name} does not say what partition it belongs to; {MEND}"
            )
        return ledger

    @classmethod
    def read(cls, objects: Objects, name: str) -> "PartitionLedger":
        """A ledger under way, as far as it has come; without a row where there is none."""
        return cls.parse(name, objects.lines(name), objects.location)

    def create(self, objects: Objects) -> None:
        """Write the head; nothing of a partition counts before this."""
        objects.write(self.name, self.canonical())

    def append(self, objects: Objects, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished shards durably."""
        rows = list(rows)
        objects.append(self.name, encode_rows(rows))
        for row in rows:
            self._take(row)

    def canonical(self) -> bytes:
        """All rows in an order that does not depend on which shard finished first."""
        return encode_rows([self.head, *(self.shards[shard] for shard in sorted(self.shards))])

    def _take(self, row: dict[str, Any]) -> None:
        if "shard" in row:
            self.shards[int(row["shard"])] = {
                "shard": row["shard"],
                "objects": dict(row["objects"]),
            }
        else:
            self.head = {key: row[key] for key in ("partition", "rule", "thresholds", "batch")}


def partition_shards(
    objects: Objects, modality: str, name: str, commit: Commit
) -> dict[int, dict[str, Any]]:
    """Row of every shard of a committed partition; IntegrityError if a ledger is not the committed one."""
    rows: dict[int, dict[str, Any]] = {}
    for what in commit.partitions[modality][name]["ledgers"]:
        content = read_named(objects, what)
        rows |= PartitionLedger.parse(what["path"], content, objects.location).shards
    return rows
