"""The ledger of a store: what happened to every input and every shard, one JSON object per line."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage.commit import LEDGER, append_row, encode_rows, read_rows, write_object

PLANNED, REFUSED, SKIPPED = "planned", "refused", "skipped"
# What the row of a planned scene says besides; null in those of others.
PLANNED_FACTS = ("datetime", "baseline", "shift", "resampling")
_INPUT = ("scene", "modality", "status", "reason", *PLANNED_FACTS)


@dataclass
class Ledger:
    """Rows, written when the job is planned:

    - `{"file": name, "modality", "fingerprint"}` for every file the plan depends on;
    - `{"scene": id, "modality", "status": planned, refused or skipped, "reason": text or null, "datetime",
      "baseline", "shift", "resampling"}` for every input;

    and for every finished shard `{"shard": k, "objects": {path: {bytes, sha256}}, "failed": {scene:
    reason}, "findings": {scene: text}, "thresholds": {modality: {scene number: [...]}}, "left_out":
    {modality: [slot in the shard]}, "tiles_left_out": [tile in the shard]}`.
    """

    path: Path
    files: list[dict[str, Any]] = field(default_factory=list)
    scenes: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, store: Path) -> "Ledger":
        """The ledger of a store; an incomplete last line, a torn append, does not count."""
        ledger = cls(store / LEDGER)
        read_rows(ledger.path, ledger._take)
        return ledger

    def create(self) -> None:
        """Write what was planned; nothing of a job exists before this."""
        write_object(self.path, self.canonical())

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished shard durably."""
        append_row(self.path, row)
        self._take(row)

    def canonical(self) -> bytes:
        """All rows in an order that does not depend on which shard finished first."""
        shards = (self.shards[shard] for shard in sorted(self.shards))
        return encode_rows([*self.files, *self.scenes, *shards])

    def fingerprints(self) -> dict[tuple[str, str], str]:
        """Fingerprint of every file the plan depends on, by modality and name."""
        return {(row["modality"], row["file"]): row["fingerprint"] for row in self.files}

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
        elif "file" in row:
            self.files.append({key: row[key] for key in ("file", "modality", "fingerprint")})
        else:
            self.scenes.append({key: row[key] for key in _INPUT})
