"""Partitions beside the default one: their names, their ledger, their place in COMMIT.json.

Such a partition is made from stored score maps. Until COMMIT.json names it no reader sees it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import IntegrityError, StoreError
from pipeline.storage.commit import (
    LEDGER,
    append_row,
    encode_rows,
    read_checked,
    read_commit,
    read_rows,
    replace_commit,
    write_object,
)

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


@dataclass
class PartitionLedger:
    """What a partition is made by and which of its shards are done.

    Its first row is `{"partition": name, "rule", "thresholds"}`; then comes one row
    `{"shard": k, "objects": {path: {bytes, sha256}}}` per finished shard.
    """

    path: Path
    head: dict[str, Any] = field(default_factory=dict)
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "PartitionLedger":
        """The ledger at `path`; without a row where there is none, or a torn one."""
        ledger = cls(path)
        if path.exists():
            read_rows(path, ledger._take)
        if ledger.shards and not ledger.head:
            raise IntegrityError(
                f"{path} does not say what partition it belongs to; the store is damaged, "
                "preprocess into a new one"
            )
        return ledger

    def create(self) -> None:
        """Write the head; nothing of a partition counts before this."""
        write_object(self.path, self.canonical())

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished shard durably."""
        append_row(self.path, row)
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
            self.head = {key: row[key] for key in ("partition", "rule", "thresholds")}


def ledger_path(store: Path, modality: str, name: str) -> Path:
    """Where the ledger of a partition lies, finished or not."""
    return store / partition_path(modality, name) / LEDGER


def commit_partition(store: Path, modality: str, ledger: PartitionLedger) -> None:
    """Make a finished partition visible to readers, in one atomic step."""
    name = ledger.head["partition"]
    written = write_object(ledger.path, ledger.canonical())
    commit = read_commit(store)
    assert commit is not None
    entry = {**ledger.head, "ledger": written}
    entry.pop("partition")
    commit["partitions"].setdefault(modality, {})[name] = entry
    replace_commit(store, commit)


def committed_ledger(
    store: Path, modality: str, name: str, commit: dict[str, Any]
) -> PartitionLedger:
    """The ledger COMMIT.json names for a partition; IntegrityError if it is not that one."""
    path = ledger_path(store, modality, name)
    read_checked(path, commit["partitions"][modality][name]["ledger"]["sha256"])
    return PartitionLedger.read(path)
