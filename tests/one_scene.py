"""A job of one scene, for tests of where its workers are."""

from pathlib import Path

from pipeline.jobs.job import run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from support import Watching, save_scene, textured

SMALL = (
    "store.tile_size_px=32",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "partition.thresholds=[1.5, 2.5]",
)


def settings(*overrides: str) -> PreprocessConfig:
    return load_config(PreprocessConfig, None, [*SMALL, *overrides])


def run(archive: Path, store: Path, *overrides: str):
    return run_job(str(archive), store, settings(*overrides), Watching())


def archive_in(folder: Path) -> Path:
    save_scene(folder / "a.tif", textured((3, 100, 150), seed=1), compress="deflate")
    return folder
