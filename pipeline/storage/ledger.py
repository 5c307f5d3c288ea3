"""The ledger of a batch: what happened to every input and every shard, one JSON object per line."""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.storage.commit import encode_rows, take_rows
from pipeline.storage.objects import Objects

PLANNED, REFUSED, SKIPPED = "planned", "refused", "skipped"
# What the row of a planned scene says besides; null in those of others.
PLANNED_FACTS = ("datetime", "baseline", "shift", "resampling")
_BATCH = ("batch", "first_shard", "num_shards")
_FILE = ("file", "modality", "fingerprint")
_PLACE = ("place", "height", "width", "crs", "transform", "scenes")
_INPUT = ("scene", "modality", "status", "reason", *PLANNED_FACTS)


def ledger_name(batch: int) -> str:
    """Where the ledger of a batch is kept."""
    return f"ledger/{batch:06d}.jsonl"


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Rows have no cycles; looking for some, again and again while they pile up, doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class Ledger:
    """Rows, written when the batch is planned:

    - `{"batch": number, "first_shard", "num_shards"}`;
    - `{"file": name, "modality", "fingerprint"}` for every file the plan depends on;
    - `{"place": name, "height", "width", "crs", "transform", "scenes"}` for every place: its grid, the
      leading modality's scenes;
    - `{"scene": id, "modality", "status": planned, refused or skipped, "reason": text or null, "datetime",
      "baseline", "shift", "resampling"}` for every input;

    and for every finished shard `{"shard": k, "objects": {path: {bytes, sha256}}, "failed": {scene:
    reason}, "findings": {scene: text}, "thresholds": {modality: {scene number: [...]}}, "left_out":
    {modality: [slot in the shard]}, "tiles_left_out": [tile in the shard]}`.
    """

    head: dict[str, Any] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    places: list[dict[str, Any]] = field(default_factory=list)
    scenes: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Ledger":
        """The ledger in some bytes; `where` they are is for messages."""
        ledger = cls()
        with _uncollected():
            take_rows(content, where, ledger._take)
        return ledger

    @classmethod
    def read(cls, objects: Objects, batch: int) -> "Ledger | None":
        """The ledger of a batch under way, as far as it has come; None if nothing of it was planned."""
        name = ledger_name(batch)
        content = objects.lines(name)
        return cls.parse(content, f"{objects.location}/{name}") if content else None

    @property
    def number(self) -> int:
        """Number of the batch."""
        return int(self.head["batch"])

    def create(self, objects: Objects) -> None:
        """Write what was planned; nothing of a batch exists before this."""
        objects.write(ledger_name(self.number), self.canonical())

    def append(self, objects: Objects, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished shards durably."""
        rows = list(rows)
        objects.append(ledger_name(self.number), encode_rows(rows))
        for row in rows:
            self._take(row)

    def canonical(self) -> bytes:
        """All rows in an order that does not depend on which shard finished first."""
        shards = (self.shards[shard] for shard in sorted(self.shards))
        return encode_rows([self.head, *self.files, *self.places, *self.scenes, *shards])

    def fingerprints(self) -> dict[tuple[str, str], str]:
        """Fingerprint of every file the plan depends on, by modality and name."""
        return {(row["modality"], row["file"]): row["fingerprint"] for row in self.files}

    def inputs(self) -> set[str]:
        """Ids of all inputs."""
        return {row["scene"] for row in self.scenes}

    def with_status(self, status: str) -> dict[str, str]:
        """Reason by scene id of the inputs that were given a status at planning, sorted by id."""
        rows = sorted(self.scenes, key=lambda row: str(row["scene"]))
        return {row["scene"]: row["reason"] for row in rows if row["status"] == status}

    def quarantined(self) -> dict[str, str]:
        """Reason by scene id, of scenes refused at planning or failed in a shard, sorted by id."""
        reasons = dict(self.with_status(REFUSED))
        for row in self._rows():
            for scene, reason in row["failed"].items():
                reasons.setdefault(scene, reason)
        return dict(sorted(reasons.items()))

    def findings(self) -> dict[str, str]:
        """Remarks by scene id on scenes that are in the store, sorted by id."""
        found = {scene: text for row in self._rows() for scene, text in row["findings"].items()}
        return dict(sorted(found.items()))

    def thresholds(self, modality: str) -> dict[int, list[float]]:
        """Thresholds by the scene's number in the plan, fine to coarse."""
        return {
            int(scene): [float(t) for t in thresholds]
            for row in self._rows()
            for scene, thresholds in row["thresholds"].get(modality, {}).items()
        }

    def _rows(self) -> Iterable[dict[str, Any]]:
        return (self.shards[shard] for shard in sorted(self.shards))

    def _take(self, row: dict[str, Any]) -> None:
        if "shard" in row:
            self.shards[int(row["shard"])] = {**row, "objects": dict(row["objects"])}
        elif "batch" in row:
            self.head = {key: int(row[key]) for key in _BATCH}
        elif "file" in row:
            self.files.append({key: row[key] for key in _FILE})
        elif "place" in row:
            self.places.append({key: row[key] for key in _PLACE})
        else:
            self.scenes.append({key: row[key] for key in _INPUT})
