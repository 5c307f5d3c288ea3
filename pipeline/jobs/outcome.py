"""What a finished batch came to: the rows of its tiles, on top of those there were before."""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.jobs.manifest import ModalityOutcome, manifest_table, present_frames
from pipeline.jobs.merging import merged_manifest
from pipeline.planning.inputs import Job
from pipeline.planning.plan import Plan
from pipeline.planning.splits import split_summary
from pipeline.storage.commit import Commit
from pipeline.storage.history import History
from pipeline.storage.ledger import Ledger
from pipeline.storage.objects import Objects
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.store import Store


def batch_table(
    objects: Objects, header: dict[str, Any], job: Job, ledger: Ledger, before: Commit | None
) -> pa.Table:
    """The manifest after a batch whose shards are all done, on top of the commit before it.

    `header` is the store's with that batch.
    """
    plan, opened, quarantined = job.plan, Store(objects, header, None), ledger.quarantined()
    outcomes = {name: _outcome(plan, name, ledger, quarantined, opened) for name in plan.modalities}
    kept = _kept_tiles(plan, outcomes, ledger)
    table = manifest_table(plan, outcomes, kept, job.facts.select(kept))
    if before is None:
        return table
    static = frozenset(n for n, m in plan.modalities.items() if m.settings.config.static)
    return merged_manifest(Store(objects, before.header, before).manifest, table, static)


def summary_of(
    history: History, splits: list[str | None], config: dict[str, Any]
) -> dict[str, Any]:
    """A commit's summary: of all batches, the split of every tile, the configuration as stored."""
    rows = history.shards.values()
    return {
        "inputs": len(history.inputs()),
        "quarantined": len(history.quarantined()),
        "skipped": len(history.skipped()),
        "tiles": len(splits),
        "tiles_left_out": sum(len(row["tiles_left_out"]) for row in rows),
        "frames_left_out": sum(len(slots) for row in rows for slots in row["left_out"].values()),
        "splits": split_summary(splits) if config["splits"] else {},
        "shards": history.num_shards,
    }


def _outcome(
    plan: Plan, name: str, ledger: Ledger, quarantined: dict[str, str], opened: Store
) -> ModalityOutcome:
    modality = plan.modalities[name]
    capacity = modality.layout.shard_capacity
    left_out = [
        shard * capacity + slot
        for shard, row in sorted(ledger.shards.items())
        for slot in row["left_out"].get(name, ())
    ]
    counts = {
        what: opened.per_frame(name, what) for what in ("num_valid", "num_cloud", "num_nodata")
    }
    if modality.layout.tokenized:
        counts["num_cells"] = opened.per_frame(name, "num_cells")
        counts["tokens"] = opened.per_frame(name, f"partitions/{DEFAULT_PARTITION}/tokens")
    thresholds = ledger.thresholds(name)
    return ModalityOutcome(
        lost=np.array([scene.id in quarantined for scene in modality.scenes], np.bool_),
        left_out=np.array(left_out, np.int64),
        counts=counts,
        thresholds=[thresholds.get(number) for number in range(len(modality.scenes))],
    )


def _kept_tiles(plan: Plan, outcomes: dict[str, ModalityOutcome], ledger: Ledger) -> np.ndarray:
    """int64: tiles with a frame of some image modality that were not left out."""
    has_frame = np.zeros(len(plan.tiles), np.bool_)
    for name, outcome in outcomes.items():
        if plan.modalities[name].layout.tokenized:
            frames, present = present_frames(plan, name, outcome)
            has_frame[frames["tile"][present]] = True
    for shard, row in ledger.shards.items():
        has_frame[plan.tile_range(shard).start + np.array(row["tiles_left_out"], np.int64)] = False
    return np.flatnonzero(has_frame)
