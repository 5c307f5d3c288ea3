"""One Dask task of repartitioning: read the score maps of one whole shard, cut its frames, write them."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cut import fill_partition, leaves, splits_by_budget, splits_by_thresholds
from pipeline.layout import StoreLayout, read_header, write_shard
from pipeline.nodes import level_offsets, node_scores, shared_nodes
from pipeline.partitions import partition_path
from pipeline.places import FrameRun, Places
from pipeline.rules import QUANTILE_SAMPLE_TILES, FurtherRule, quantile_thresholds
from pipeline.store import Store


@dataclass(frozen=True)
class RepartitionTask:
    """Everything a worker needs for one shard.

    `thresholds` hold for every frame; without them the budget or the quantile of `rule` decides.
    `scenes` int64 [tile] are indices into `samples`, the frames whose scores set a scene's thresholds.
    """

    store: str
    name: str
    shard: int
    layout: StoreLayout
    rule: FurtherRule
    thresholds: tuple[float, ...] | None
    run: FrameRun
    scenes: np.ndarray
    samples: tuple[FrameRun, ...]


def repartition_task(
    store: Store,
    layout: StoreLayout,
    name: str,
    rule: FurtherRule,
    thresholds: tuple[float, ...] | None,
    places: Places,
    shard: int,
) -> RepartitionTask:
    """The task of one shard."""
    tiles = places.shard_tiles(shard)
    scenes, indices = np.unique(places.scene[tiles], return_inverse=True)
    samples: tuple[FrameRun, ...] = ()
    if rule.quantile is not None:
        samples = tuple(
            places.run(places.sampled(scene, QUANTILE_SAMPLE_TILES)) for scene in scenes.tolist()
        )
    return RepartitionTask(
        store=str(store.path.absolute()),
        name=name,
        shard=shard,
        layout=layout,
        rule=rule,
        thresholds=thresholds,
        run=places.run(tiles),
        scenes=indices,
        samples=samples,
    )


def repartition_shard(task: RepartitionTask) -> dict[str, Any]:
    """Make and write one shard of a partition; its ledger row (see `PartitionLedger`)."""
    layout, path = task.layout, Path(task.store)
    arrays = layout.partition_arrays(task.name)
    blocks = {
        name: np.full(spec.shard, spec.fill_value, np.dtype(spec.dtype))
        for name, spec in arrays.items()
    }
    if len(task.run.frames):
        header = read_header(path)
        assert header is not None
        store = Store(path, header, {})
        own, deciding = _read_nodes(task, store, task.run)
        splits = _splits(task, store, deciding)
        if task.rule.shared is not None:
            splits = np.repeat(splits, task.run.frames_per_tile, axis=0)
        slots = task.run.frames - task.shard * layout.shard_capacity
        group = partition_path(layout.modality, task.name)
        fill_partition(blocks, group, slots, leaves(splits, own, layout.grid))
    return {"shard": task.shard, "objects": write_shard(path, arrays, task.shard, blocks)}


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
    limits = np.array([_scene_thresholds(task, store, sample) for sample in task.samples])
    by_tile = limits.reshape(len(task.samples), -1)[task.scenes]
    if task.rule.shared is None:
        by_tile = np.repeat(by_tile, task.run.frames_per_tile, axis=0)
    return splits_by_thresholds(deciding, by_tile, grid)


def _scene_thresholds(task: RepartitionTask, store: Store, sample: FrameRun) -> list[float]:
    """As in preprocessing: quantiles of the scores of the scene's sampled tiles."""
    assert task.rule.quantile is not None
    _, nodes = _read_nodes(task, store, sample)
    offsets = level_offsets(task.layout.grid).tolist()
    levels = [nodes[:, a:b] for a, b in pairwise(offsets)]
    return quantile_thresholds([levels], task.rule.quantile)
