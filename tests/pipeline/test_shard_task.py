"""Tasks of shards in this process: which windows they read, and what they come to."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.jobs import thresholds
from pipeline.jobs.measures import MEASURES, Measures
from pipeline.jobs.shard import process_shard, shard_task, strips
from pipeline.planning.inputs import plan_job
from pipeline.planning.memory import WINDOW_BYTES, window_bytes, worker_bytes
from pipeline.planning.plan import SHARD_BYTES, make_plan
from pipeline.planning.stacks import make_stacks
from pipeline.scenes import Access, Grid
from pipeline.settings.config import DataConfig, PreprocessConfig
from pipeline.settings.loading import load_config
from support import header, save_scene, textured

RANGE = "modality.value_range=[0, 10000]"


def planned(grid: Grid, block: tuple[int, int], bands: int, **store):
    """The plan of one scene on paper."""
    config = DataConfig.model_validate({"modality": {"value_range": (0, 1)}, "store": store})
    names = tuple(f"band_{number}" for number in range(1, bands + 1))
    scenes = {"image": [header("a", grid=grid, block=block, bands=names, dtype="float64")]}
    return make_plan(config, make_stacks(config, scenes).stacks, {"image": (None, None)})


def tasks(job, store: Path):
    ranges = {name: m.configured_ranges() for name, m in job.plan.modalities.items()}
    for shard in range(job.plan.num_shards):
        yield shard_task(job.plan, shard, str(store), job.access, ranges)


@given(
    st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    st.tuples(st.integers(1, 2000), st.integers(1, 6000)),
    st.integers(1, 80),
    st.integers(1, 100),
)
def test_windows_hold_their_tiles_and_stay_small(shape, block, bands, shard_tiles):
    plan = planned(
        Grid(*shape, None, None), block, bands, tile_size_px=256, shard_tiles=shard_tiles
    )
    ranges = {"image": ((0.0, 1.0),) * bands}
    side = [max(1, length // 256) for length in block]
    for shard in {0, plan.num_shards - 1}:
        task = shard_task(plan, shard, "", Access(()), ranges)
        (modality,) = task.modalities
        (scene,) = modality.scenes
        groups = list(strips(task, scene, modality, modality.frames))
        assert np.array_equal(np.concatenate([group[0] for group in groups]), modality.frames)
        last = None
        for members, rows, cols in groups:
            row, col = task.rows[members["tile"]], task.cols[members["tile"]]
            assert (row.min(), row.max() + 1, col.min(), col.max() + 1) == (*rows, *cols)
            assert len(set((row // side[0]).tolist())) == 1
            area = (rows[1] - rows[0]) * (cols[1] - cols[0])
            tile_bytes = window_bytes(modality.layout, False)
            assert area == 1 or area * tile_bytes <= WINDOW_BYTES
            # A block is cut only if it is too large for one window.
            first = row[0] // side[0], col[0] // side[1]
            if first == last:
                assert side[0] * side[1] * tile_bytes > WINDOW_BYTES
            last = row[-1] // side[0], col[-1] // side[1]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """One scene that is no whole number of tiles, in blocks of 2 x 2 tiles."""
    folder = tmp_path_factory.mktemp("archive")
    tiled = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    save_scene(folder / "a.tif", textured((3, 250, 310)), **tiled)
    return folder


def rows_of(scene, store, *overrides):
    config = load_config(PreprocessConfig, None, ["store.tile_size_px=32", RANGE, *overrides])
    return [process_shard(task) for task in tasks(plan_job(str(scene), config), store)]


def test_sampled_thresholds_do_not_depend_on_shards_nor_on_what_is_remembered(scene, tmp_path):
    (whole,) = rows_of(scene, tmp_path / "whole", "store.shard_tiles=1000")
    thresholds._known.clear()
    first = rows_of(scene, tmp_path / "first", "store.shard_tiles=8")
    again = rows_of(scene, tmp_path / "again", "store.shard_tiles=8")
    other = rows_of(scene, tmp_path / "other", "store.shard_tiles=8", "partition.quantile=0.9")
    assert len(first) > 3
    for row, same, different in zip(first, again, other, strict=True):
        assert row["thresholds"] == same["thresholds"] == whole["thresholds"]
        assert different["thresholds"] != whole["thresholds"]
        assert row["objects"] == same["objects"]


def test_every_pixel_is_read_once(scene, tmp_path):
    """But for the sample of tiles that lie in other shards, which the first shard alone reads."""
    pixels = 3 * 250 * 310 * 2
    (whole,) = rows_of(scene, tmp_path / "whole", "store.shard_tiles=1000")
    fixed = rows_of(
        scene, tmp_path / "fixed", "partition.thresholds=[1, 2]", "store.shard_tiles=16"
    )
    read = [sum(row[MEASURES]["pixel_bytes"] for row in rows) for rows in ([whole], fixed)]
    assert read[0] == pixels
    assert pixels <= read[1] <= 1.2 * pixels


def test_a_row_says_what_its_shard_took(scene, tmp_path):
    total = Measures()
    for row in rows_of(scene, tmp_path / "store", "store.shard_tiles=16"):
        took = Measures(**row[MEASURES])
        assert min(took.read, took.score, took.partition, took.write) > 0
        assert took.object_bytes == sum(entry["bytes"] for entry in row["objects"].values())
        total.add(took)
    objects = [path for path in (tmp_path / "store").rglob("c/*") if path.parent.name == "c"]
    files = {file for path in objects for file in ([path] if path.is_file() else path.rglob("*"))}
    assert total.object_bytes == sum(file.stat().st_size for file in files if file.is_file())


def test_what_a_worker_needs_does_not_depend_on_the_size_of_scenes():
    needs = {
        worker_bytes(planned(Grid(side, side, None, None), (512, 512), 12))
        for side in (12_800, 25_600, 102_400)
    }
    # Shards of a scene are equally large, so a few frames more or fewer than in another's.
    assert max(needs) <= 1.05 * min(needs)
    assert WINDOW_BYTES + SHARD_BYTES < min(needs) < WINDOW_BYTES + 4 * SHARD_BYTES


def peak_and_limit(archive: str, store: str) -> tuple[int, int]:
    job = plan_job(archive, load_config(PreprocessConfig, None, [RANGE]))
    for task in tasks(job, Path(store)):
        process_shard(task)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024, worker_bytes(job.plan)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_a_worker_stays_below_its_limit(tmp_path):
    """Noise, which no codec makes smaller."""
    noise = np.random.default_rng(0).integers(1, 10_000, (12, 1500, 1500), dtype=np.uint16)
    save_scene(tmp_path / "a" / "noise.tif", noise, tiled=True, blockxsize=512, blockysize=512)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, limit = pool.apply(peak_and_limit, (str(tmp_path / "a"), str(tmp_path / "store")))
    print(f"a worker took {peak >> 20} MiB of {limit >> 20} MiB")
    assert peak <= limit
