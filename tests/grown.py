"""A small store that has grown: two commits of preprocessing and one of a further partition."""

from pathlib import Path

from pipeline.jobs.job import run_job
from pipeline.jobs.repartition import repartition
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from support import Watching, save_scene, textured

SETTINGS = (
    "store.tile_size_px=32",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "run.workers=1",
)
OPTIONS = tuple(part for setting in SETTINGS for part in ("--set", setting))
LEAN = FurtherRule(tokens_per_tile=20)


def settings(*overrides: str) -> PreprocessConfig:
    return load_config(PreprocessConfig, None, [*SETTINGS, *overrides])


def grown_store(folder: Path, *overrides: str) -> Path:
    """`folder`, with an archive and its store: 14 tiles of three scenes in 3 + 1 shards."""
    archive, store = folder / "archive", folder / "store"
    save_scene(archive / "a.tif", textured((2, 64, 64), seed=1))
    save_scene(archive / "b.tif", textured((2, 64, 96), seed=2))
    config = settings(*overrides)
    run_job(str(archive), store, config, Watching())
    save_scene(archive / "c.tif", textured((2, 64, 64), seed=3))
    run_job(str(archive), store, config, Watching(), append=True)
    cut_lean(store)
    return folder


def cut_lean(store: Path):
    """Make or repair the further partition; its report."""
    return repartition(store, "lean", LEAN, RunConfig(workers=1), Watching())
