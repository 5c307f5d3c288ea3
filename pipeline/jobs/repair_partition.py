"""Repair of a further partition: damaged objects are cut again, to the very bytes that were committed."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.jobs.known import content_of
from pipeline.jobs.recut import repartition_shard, repartition_task
from pipeline.rules import FurtherRule
from pipeline.storage.chain import read_chain
from pipeline.storage.commit import Commit
from pipeline.storage.layout import StoreLayout
from pipeline.storage.lock import exclusive
from pipeline.storage.mending import Repaired, differs, remember, remembered
from pipeline.storage.objects import entry
from pipeline.storage.partitions import PartitionLedger, partition_path
from pipeline.storage.places import places_of
from pipeline.store import Store


def repair_partition(store: Store, layout: StoreLayout, name: str, rule: FurtherRule) -> Repaired:
    """Look over a committed partition, and make again what is damaged; nothing else is touched.

    Shards are done in this process. Raises IntegrityError where what is made again differs.
    """
    work = _Partition(store, layout, name, rule)
    noted = {n for n in remembered(store.objects) if n.startswith(f"{work.group}/")}
    if not noted and not any(work.looks_damaged(what) for what in work.ledgers):
        return Repaired()
    with exclusive(store.objects):
        number, shards = 0, 0
        for what in work.ledgers:
            mended = work.mend(what, noted)
            number, shards = number + mended.objects, shards + mended.shards
        remember(store.objects, remembered(store.objects) - noted)
    return Repaired(number, shards)


class _Partition:
    """A committed partition, and the ledgers of its batches as the commit names them."""

    def __init__(self, store: Store, layout: StoreLayout, name: str, rule: FurtherRule) -> None:
        self.store, self.layout, self.name, self.rule = store, layout, name, rule
        self.group = partition_path(layout.modality, name)
        self.made = store.commit.partitions[layout.modality][name]
        self.ledgers: list[dict[str, Any]] = self.made["ledgers"]

    def looks_damaged(self, what: dict[str, Any]) -> bool:
        """Whether a ledger is damaged, or an object it names has another size."""
        ledger, size = self._ledger(what), self.store.objects.size
        return ledger is None or any(
            size(name) != known["bytes"]
            for row in ledger.shards.values()
            for name, known in row["objects"].items()
        )

    def mend(self, what: dict[str, Any], noted: Iterable[str]) -> Repaired:
        """Make the damaged objects of one batch again, and its ledger."""
        objects, ledger = self.store.objects, self._ledger(what)
        number = 0
        if ledger is None:
            ledger = self._ledger_again(what)
            objects.write(what["path"], ledger.canonical())
            number = 1
        shards = 0
        for shard, row in ledger.shards.items():
            wanted = {
                name: known
                for name, known in row["objects"].items()
                if (objects.size(name) != known["bytes"] or name in noted)
                and objects.digest(name) != known
            }
            if not wanted:
                continue
            made = self._shard(what, shard, wanted)["objects"]
            for name, known in wanted.items():
                if made.get(name) != known:
                    raise IntegrityError(differs(objects.location, name))
            number, shards = number + len(wanted), shards + 1
        return Repaired(number, shards)

    def _ledger(self, what: dict[str, Any]) -> PartitionLedger | None:
        objects = self.store.objects
        content = content_of(objects, what["path"], what)
        if content is None:
            return None
        return PartitionLedger.parse(what["path"], content, objects.location)

    def _ledger_again(self, what: dict[str, Any]) -> PartitionLedger:
        """The ledger of a batch, from its shards made again without writing them."""
        head = {
            "partition": self.name,
            "rule": self.made["rule"],
            "thresholds": self.made["thresholds"],
            "batch": what["batch"],
        }
        ledger = PartitionLedger(what["path"], head)
        batch = next(b for b in self.store.commit.batches if b.number == what["batch"])
        for shard in batch.shards:
            ledger.shards[shard] = {
                "shard": shard,
                "objects": self._shard(what, shard, {})["objects"],
            }
        if entry(ledger.canonical()) != {"bytes": what["bytes"], "sha256": what["sha256"]}:
            raise IntegrityError(differs(self.store.location, what["path"]))
        return ledger

    def _shard(
        self, what: dict[str, Any], shard: int, wanted: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Make one shard again as of the commit that brought it: tiles may have got further dates since."""
        commit = self._brought_by(what)
        store = Store(self.store.objects, commit.header, commit)
        layout, places = (
            store.layouts[self.layout.modality],
            places_of(store, self.layout.modality),
        )
        listed = self.made["thresholds"]
        thresholds = None if listed is None else tuple(float(t) for t in listed)
        task = repartition_task(store, layout, self.name, self.rule, thresholds, places, shard)
        store.check_shards(task.run.frames // layout.shard_capacity)
        return repartition_shard(replace(task, wanted=wanted))

    def _brought_by(self, what: dict[str, Any]) -> Commit:
        modality = self.layout.modality
        for commit in read_chain(self.store.objects).intact:
            made = commit.partitions.get(modality, {}).get(self.name)
            if made is not None and what in made["ledgers"]:
                return commit
        return self.store.commit
