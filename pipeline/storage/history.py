"""All batches of a commit taken together: what became of every input, and where every shard is named."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.storage.commit import Commit, read_named
from pipeline.storage.ledger import SKIPPED, Ledger
from pipeline.storage.objects import Objects


@dataclass(frozen=True)
class History:
    """Ledgers in the order of their batches. An input of several batches counts by the last of them."""

    ledgers: tuple[Ledger, ...]

    @property
    def num_shards(self) -> int:
        return sum(ledger.head["num_shards"] for ledger in self.ledgers)

    @cached_property
    def shards(self) -> dict[int, dict[str, Any]]:
        """Row of every shard by its number."""
        return {shard: row for ledger in self.ledgers for shard, row in ledger.shards.items()}

    def inputs(self) -> set[str]:
        """Ids of all inputs."""
        return set().union(*(ledger.inputs() for ledger in self.ledgers))

    def fingerprints(self) -> dict[tuple[str, str], str]:
        """Fingerprint of every file by modality and name, as the last batch that names it knew it."""
        return {key: f for ledger in self.ledgers for key, f in ledger.fingerprints().items()}

    def quarantined(self) -> dict[str, str]:
        """Reason by scene id of every input that is not in the store though it was asked for."""
        return self._latest([ledger.quarantined() for ledger in self.ledgers])

    def skipped(self) -> dict[str, str]:
        """Reason by scene id of every input that nothing asks for."""
        return self._latest([ledger.with_status(SKIPPED) for ledger in self.ledgers])

    def findings(self) -> dict[str, str]:
        """Remarks by scene id on scenes that are in the store."""
        return self._latest([ledger.findings() for ledger in self.ledgers])

    def planned(self) -> dict[str, dict[str, Any]]:
        """Row of every input by scene id, of its last batch."""
        return {row["scene"]: row for ledger in self.ledgers for row in ledger.scenes}

    def _latest(self, texts: list[dict[str, str]]) -> dict[str, str]:
        found: dict[str, str] = {}
        for ledger, of_batch in zip(self.ledgers, texts, strict=True):
            again = ledger.inputs() & found.keys() if found else ()
            for scene in again:
                del found[scene]
            found |= of_batch
        return dict(sorted(found.items()))


def read_history(objects: Objects, commit: Commit) -> History:
    """The ledgers a commit names; IntegrityError if one is lost or not the committed one."""
    return History(
        tuple(
            Ledger.parse(
                read_named(objects, batch.ledger), f"{objects.location}/{batch.ledger['path']}"
            )
            for batch in commit.batches
        )
    )
