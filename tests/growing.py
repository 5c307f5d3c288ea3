"""A store that grows, scene by scene and partition by partition, and what readers must find in it."""

import hashlib
from pathlib import Path
from unittest import mock

import numpy as np

import pipeline.jobs.batch
from crash_points import plainly
from pipeline.jobs.job import run_job
from pipeline.jobs.repartition import repartition
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from pipeline.store import Store, open_store
from support import Watching

SETTINGS = (
    "store.tile_size_px=32",
    "store.shard_tiles=2",
    "modality.value_range=[0, 10000]",
    "modality.pattern='{tile}_{date}.tif'",
    "partition.num_scales=2",
    "run.workers=1",
)
# Digest of a tile by partition and tile id: one committed state.
State = dict[tuple[str, str], str]


def grow(archives: list[str], store: Path) -> None:
    """Append archive after archive, each time with a further partition; in this process alone."""
    for archive in archives:
        add(archive, store)
        cut(store, f"cut-{Path(archive).name}")


def add(archive: str, store: Path) -> None:
    config = load_config(PreprocessConfig, None, SETTINGS)
    with mock.patch.object(pipeline.jobs.batch, "run_tasks", plainly):
        run_job(archive, store, config, Watching(), append=store.exists())


def cut(store: Path, name: str) -> None:
    repartition(store, name, FurtherRule(quantile=0.3), RunConfig(workers=1), Watching())


def states(archives: list[str], store: Path) -> dict[int, State]:
    """The same undisturbed: what each commit holds, read as soon as it is there."""
    found = {}
    for number, archive in enumerate(archives):
        add(archive, store)
        found[2 * number + 1] = state(open_store(store))
        cut(store, f"cut-{number}")
        found[2 * number + 2] = state(open_store(store))
    return found


def state(store: Store) -> State:
    """All tiles in all partitions that are complete."""
    newest = f"cut-{(store.commit.number - 2) // 2}"
    complete = {"default", newest} if store.commit.number % 2 == 0 else {"default"}
    ids = store.manifest["id"].to_pylist()
    return {(name, tile): digest(store, name, tile) for name in complete for tile in ids}


def digest(store: Store, partition: str, tile_id: str) -> str:
    """Everything of a tile, and its row of the manifest."""
    tile = store.tile(tile_id, partition=partition)
    row = store.manifest.slice(store.tile_index(tile_id), 1).to_pylist()
    found = hashlib.sha256(repr(row).encode())
    for values in (tile.pixels, tile.valid, *tile.score_maps, *tile.scales):
        found.update(np.ascontiguousarray(values))
    return found.hexdigest()
