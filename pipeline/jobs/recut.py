"""One Dask task of repartitioning: read the score maps of one whole shard, cut its frames, write them."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.cut import leaves, partition_blocks, splits_by_budget, splits_by_thresholds
from pipeline.nodes import level_offsets, node_scores, shared_nodes
from pipeline.rules import QUANTILE_SAMPLE_TILES, FurtherRule, quantile_thresholds
from pipeline.storage.layout import StoreLayout
from pipeline.storage.mending import writer
from pipeline.storage.objects import absolute
from pipeline.storage.partitions import partition_path
from pipeline.storage.places import FrameRun, Places
from pipeline.storage.sharding import encoders, write_shard
from pipeline.store import Store, open_store


@dataclass(frozen=True)
class RepartitionTask:
    """Everything a worker needs for one shard.

    `thresholds` hold for every frame; without them the budget or the quantile of `rule` decides. Under a
    quantile, `groups` int64 are indices into `samples`, the frames whose scores set the thresholds: per
    frame that of its scene, or per tile that of its place where all timesteps share one partition.
    `wanted` names the objects to be written, where a damaged shard is made again.
    """

    store: str
    commit: int
    name: str
    shard: int
    layout: StoreLayout
    rule: FurtherRule
    thresholds: tuple[float, ...] | None
    run: FrameRun
    groups: np.ndarray
    samples: tuple[FrameRun, ...]
    wanted: dict[str, dict[str, Any]] | None = None


def repartition_task(
    store: Store,
    layout: StoreLayout,
    name: str,
    rule: FurtherRule,
    thresholds: tuple[float, ...] | None,
    places: Places,
    shard: int,
) -> RepartitionTask:
    """The task of one shard: all frames of the tiles that have some there."""
    tiles = places.tiles_in(shard)
    samples: tuple[FrameRun, ...] = ()
    if rule.shared is None:
        sampled, members = places.sampled_of_scene, places.scene[places.entries(tiles)]
    else:
        sampled, members = places.sampled_of_place, places.place[tiles]  # type: ignore[assignment]
    names, groups = np.unique(members, return_inverse=True)
    if rule.quantile is not None:
        samples = tuple(sampled(name, QUANTILE_SAMPLE_TILES) for name in names.tolist())
    return RepartitionTask(
        store=absolute(store.objects),
        commit=store.commit.number,
        name=name,
        shard=shard,
        layout=layout,
        rule=rule,
        thresholds=thresholds,
        run=places.run(tiles),
        groups=groups,
        samples=samples,
    )


def repartition_shard(task: RepartitionTask) -> dict[str, Any]:
    """Make and write one shard of a partition; its ledger row (see `PartitionLedger`)."""
    layout = task.layout
    encoded = encoders(layout.partition_arrays(task.name), layout.codec)
    if len(task.run.frames):
        store = open_store(task.store, task.commit)
        own, deciding = _read_nodes(task, store, task.run)
        splits = _splits(task, store, deciding)
        if task.rule.shared is not None:
            splits = np.repeat(splits, task.run.frames_per_tile, axis=0)
        # A tile may have frames in other shards too, which decide with those of this one.
        here = np.flatnonzero(task.run.frames // layout.shard_capacity == task.shard)
        here = here[np.argsort(task.run.frames[here])]
        slots = task.run.frames[here] - task.shard * layout.shard_capacity
        group = partition_path(layout.modality, task.name)
        cut = leaves(splits[here], own[here], layout.grid)
        for array, block in partition_blocks(group, slots, cut, int(slots[-1]) + 1).items():
            encoded[array].put_leading(block)
    written = write_shard(writer(task.store, task.wanted), task.shard, encoded)
    return {"shard": task.shard, "objects": written}


def _read_nodes(
    task: RepartitionTask, store: Store, run: FrameRun
) -> tuple[np.ndarray, np.ndarray]:
    """The frames' own nodes [frame, node], and those that decide: [tile, node] where shared."""
    own = node_scores(store.read_score_maps(task.layout.modality, run.frames), task.layout.grid)
    if task.rule.shared is None:
        return own, own
    return own, shared_nodes(own, run.tile_starts, task.rule.shared)


def _splits(task: RepartitionTask, store: Store, deciding: np.ndarray) -> np.ndarray:
    grid = task.layout.grid
    if task.thresholds is not None:
        return splits_by_thresholds(deciding, task.thresholds, grid)
    if task.rule.tokens_per_tile is not None:
        return splits_by_budget(deciding, task.rule.tokens_per_tile, grid)
    limits = np.array([_sample_thresholds(task, store, sample) for sample in task.samples])
    by_group = limits.reshape(len(task.samples), grid.num_scales - 1)
    return splits_by_thresholds(deciding, by_group[task.groups], grid)


def _sample_thresholds(task: RepartitionTask, store: Store, sample: FrameRun) -> list[float]:
    """As in preprocessing: quantiles of the scores of sampled tiles."""
    assert task.rule.quantile is not None
    if not len(sample.frames):
        return [math.inf] * (task.layout.grid.num_scales - 1)
    _, nodes = _read_nodes(task, store, sample)
    offsets = level_offsets(task.layout.grid).tolist()
    levels = [nodes[:, a:b] for a, b in pairwise(offsets)]
    return quantile_thresholds([levels], task.rule.quantile)
