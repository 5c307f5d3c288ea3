"""What a commit's ledgers say of the objects of shards, and whether what is there agrees.

A lost object would read as fill value, and a swapped one as the data of other tiles: so every object is
compared with its ledger row before its first use.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.errors import IntegrityError, StoreError
from pipeline.storage.commit import MEND, Commit
from pipeline.storage.history import History, read_history
from pipeline.storage.layout import ArraySpec
from pipeline.storage.objects import Objects
from pipeline.storage.partitions import DEFAULT_PARTITION, partition_shards

Rows = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """What the ledger says of one object; `doubtful` if another one of the same size is another one.

    `sha256` is None in a store that is still being written.
    """

    size: int
    sha256: str | None
    doubtful: bool


class Vouched:
    """The objects of the shards of one commit; of a store still being written (None), whatever is there."""

    def __init__(self, objects: Objects, commit: Commit | None) -> None:
        self._objects, self._commit = objects, commit
        self._partition_rows: dict[tuple[str, str], Rows] = {}
        self._shared_sizes: dict[tuple[str, str], frozenset[int]] = {}
        self._checked_shards: set[tuple[str, str, int]] = set()
        self._checked_arrays: set[str] = set()

    @cached_property
    def history(self) -> History:
        """What became of every input and shard."""
        assert self._commit is not None
        return read_history(self._objects, self._commit)

    def said(self, array: str, path: str, shard: int) -> Said | None:
        """What is said of an array's object; None where all of it is fill value.

        Raises StoreError where the array's partition lacks the shard.
        """
        if self._commit is None:
            size = self._objects.size(path)
            return None if size is None else Said(size, None, False)
        modality, name = _owner(array)
        rows = self._rows(modality, name, [shard])
        what = rows[shard]["objects"].get(path)
        if what is None:
            return None
        doubtful = what["bytes"] in self._shared(modality, name, rows)
        return Said(what["bytes"], what["sha256"], doubtful)

    def check_shards(self, shards: np.ndarray, modality: str = "", name: str = "") -> None:
        """Raise IntegrityError if an object of these shards is lost or has another size.

        Those of a partition beside the default one where it is named, else all others.
        """
        rows = self._rows(modality, name or DEFAULT_PARTITION, shards.tolist())
        keys = {(modality, name, shard) for shard in shards.tolist()} - self._checked_shards
        self._check_sizes(
            {path: what for key in sorted(keys) for path, what in rows[key[2]]["objects"].items()}
        )
        self._checked_shards |= keys

    def check_array(self, array: str, spec: ArraySpec) -> None:
        """Raise IntegrityError if an object of an array is lost, has another size or should not be."""
        if self._commit is None or array in self._checked_arrays:
            return
        rows = self._rows(*_owner(array), range(spec.shape[0] // spec.shard[0]))
        of_shards = {
            f"{array}/{spec.shard_key(shard)}": row["objects"] for shard, row in rows.items()
        }
        self._check_sizes({path: named.get(path) for path, named in of_shards.items()})
        self._checked_arrays.add(array)

    def _rows(self, modality: str, name: str, shards: Iterable[int]) -> Rows:
        """Ledger rows by shard, of a partition or of everything written with the pixels."""
        if name == DEFAULT_PARTITION:
            rows = self.history.shards
            missing = set(shards) - rows.keys()
            if missing:
                raise IntegrityError(
                    f"{self._objects.location}: no ledger names shard {min(missing)}; {MEND}"
                )
            return rows
        key = (modality, name)
        if key not in self._partition_rows:
            assert self._commit is not None
            self._partition_rows[key] = partition_shards(self._objects, *key, self._commit)
        rows = self._partition_rows[key]
        missing = set(shards) - rows.keys()
        if missing:
            raise StoreError(
                f"{self._objects.location}: partition {name!r} of {modality} was made before "
                f"{len(missing)} shards were appended; run its `aptile repartition` command again to "
                "complete it"
            )
        return rows

    def _shared(self, modality: str, name: str, rows: Rows) -> frozenset[int]:
        """Sizes that several different objects of some ledgers have."""
        key = ("", "") if name == DEFAULT_PARTITION else (modality, name)
        if key not in self._shared_sizes:
            first: dict[int, str] = {}
            self._shared_sizes[key] = frozenset(
                what["bytes"]
                for row in rows.values()
                for what in row["objects"].values()
                if first.setdefault(what["bytes"], what["sha256"]) != what["sha256"]
            )
        return self._shared_sizes[key]

    def _check_sizes(self, named: dict[str, dict[str, Any] | None]) -> None:
        """What the ledger says of some objects, None where it names none, against what is there."""
        sizes = self._objects.sizes(named)
        for path, what in named.items():
            size, said = sizes.get(path), None if what is None else what["bytes"]
            if size != said:
                raise IntegrityError(f"{self._objects.location}/{path} {unlike(size, said)}")


def unlike(size: int | None, said: int | None) -> str:
    """What is told of an object that is lost or has another size than the ledger says."""
    found = "is missing" if size is None else f"is {size} bytes long"
    return f"{found}; the ledger says {'none' if said is None else f'{said} bytes'}: {MEND}"


def _owner(array: str) -> tuple[str, str]:
    """Modality and partition whose ledgers name an array's objects."""
    modality, _, inside = array.partition("/")
    parts = inside.split("/")
    return modality, parts[1] if parts[0] == "partitions" else DEFAULT_PARTITION
