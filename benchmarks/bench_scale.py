"""Bookkeeping of very large jobs: plan, tasks, scheduler, ledger and manifest without a pixel read.

First a million scenes on paper that make ten million tiles: the plan, then every shard's real task through
the real engine to workers that return a ledger row at once, the ledger, the manifest. `us/tile` of the
loop is what a job pays for each tile besides its pixels. `MiB` is the memory of the process that plans,
submits and holds the scheduler, after 10, 50 and 100 % of the shards. Then a finished store of 10,000
shards: what running its command again costs, and whether it touches a file.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from distributed import LocalCluster

sys.path.insert(0, str(Path(__file__).parent))
from common import Silent, arguments, best_seconds, report
from pipeline.jobs import batch
from pipeline.jobs import job as jobs
from pipeline.jobs.engine import run_tasks
from pipeline.jobs.manifest import ModalityOutcome, encode_manifest, manifest_table
from pipeline.jobs.prepare import place_rows
from pipeline.jobs.shard import ShardTask, shard_task
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.stacks import make_stacks
from pipeline.planning.tilefacts import tile_facts
from pipeline.scenes import Access, Asset, Grid, Plane, Scene
from pipeline.settings.config import DataConfig, PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from pipeline.storage.layout import StoreLayout
from pipeline.storage.ledger import Ledger
from pipeline.storage.objects import LocalObjects
from pipeline.store import open_store

LIMIT_US_PER_TILE = 2.0
LIMIT_RERUN_S = 1.0
# Runs of a finished job, of which the shortest counts.
REPEATS = 5
QUICK_SHARDS = 16
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
TILE_PX = 128
# Rows and columns of tiles in every scene.
SCENE_TILES = (2, 5)
NUM_GRIDS = 500
# Workers of the loop.
WORKERS = 2
RANGES = {"image": ((0.0, 10_000.0),) * len(BANDS)}

Row = dict[str, object]


def scenes_on_paper(number: int) -> list[Scene]:
    """Scenes of one GeoTIFF each, every one a place of its own; several hundred grids between them."""
    height, width = (tiles * TILE_PX for tiles in SCENE_TILES)
    grids = [
        Grid(height, width, f"EPSG:{32601 + n % 60}", (10.0, 0.0, 3e5 + 60 * n, 0.0, -10.0, 5e6))
        for n in range(NUM_GRIDS)
    ]
    planes = tuple(Plane(band, n, 0.0, 1e-4, -0.1) for n, band in enumerate(BANDS))
    return [
        Scene(
            id=f"2020/{n:07d}.tif",
            modality="image",
            assets=(
                Asset(
                    href=f"/archive/2020/{n:07d}.tif",
                    kind="raster",
                    grid=grids[n % NUM_GRIDS],
                    dtype="uint16",
                    planes=planes,
                    block_shape=(256, 256),
                    fingerprint=f"{1_000_000 + n}-{1_600_000_000_000_000_000 + n}",
                ),
            ),
            datetime=f"2020-{1 + n % 12:02d}-{1 + n % 28:02d}T10:00:00Z",
            place=f"p{n:07d}",
        )
        for n in range(number)
    ]


_READ_WHOLE = re.compile("/(num_[a-z]+|tokens|counts)/c/")


def no_op(task: ShardTask) -> dict[str, Any]:
    """What a finished shard's ledger row holds, without having done anything; in a store its objects are
    there, without content."""
    failed: dict[str, str] = {}
    thresholds = {
        m.settings.name: {str(number): [1.5 + number % 7, 2.5] for number in m.numbers}
        for m in task.modalities
    }
    objects = {
        f"{name}/c/{task.shard}{end}": {"bytes": size, "sha256": _sha256(name, task.shard)}
        for m in task.modalities
        for name, end, size in _arrays(m.layout)
    }
    if Path(task.store).is_absolute():
        # What is read for the manifest has to be nothing at all, or real.
        objects = {n: entry for n, entry in objects.items() if not _READ_WHOLE.search(n)}
        for name, entry in objects.items():
            path = Path(task.store, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(entry["bytes"])
    return {
        "shard": task.shard, "objects": objects, "failed": failed, "findings": {},
        "thresholds": thresholds, "left_out": {}, "tiles_left_out": [],
    }  # fmt: skip


@cache
def _arrays(layout: StoreLayout) -> list[tuple[str, str, int]]:
    return [
        (name, "/0" * (len(spec.shape) - 1), 1000 * len(spec.shape))
        for name, spec in layout.arrays().items()
    ]


def _sha256(name: str, shard: int) -> str:
    return hashlib.sha256(f"{name}{shard}".encode()).hexdigest()


def in_loop(
    tasks: Iterator[ShardTask], num_tasks: int, run: RunConfig
) -> Iterator[list[dict[str, Any]]]:
    """The engine, with the no-op task; rows in as many batches as it hands out."""
    # By its module's name, as a real task function travels; that of a script would travel by value.
    from bench_scale import no_op as function

    yield from run_tasks(function, tasks, num_tasks, run, ".", Silent())


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Stopwatch:
    """Seconds by name, of code that runs in turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + took

    def each(self, name: str, make: Callable[[int], Any], numbers: range) -> Iterator[Any]:
        for number in numbers:
            with self.of(name):
                made = make(number)
            yield made


def on_paper(num_scenes: int) -> list[Row]:
    """Plan, loop and manifest of a job over scenes that do not exist."""
    config = DataConfig.model_validate({"store": {"tile_size_px": TILE_PX}})
    scenes, watch = scenes_on_paper(num_scenes), Stopwatch()
    with watch.of("stacks"):
        stacks = make_stacks(config, {"image": scenes}).stacks
    with watch.of("plan"):
        plan = make_plan(config, stacks, {"image": (None, None)})
    tiles = len(plan.tiles)
    rows = [
        _row(f"{num_scenes:,} scenes on paper", step, tiles, s) for step, s in watch.seconds.items()
    ]
    for where in ("worker processes", "threads of this process"):
        rows += _loop(plan, where)
    rows += _manifest(plan)
    return rows


def _row(what: str, step: str, tiles: int, seconds: float, limit: float | None = None) -> Row:
    row: Row = {"job": f"{what}, {tiles:,} tiles", "step": step, "seconds": seconds}
    row |= {"us/tile": 1e6 * seconds / tiles, "MiB": f"{resident_mib():,.0f}"}
    return row if limit is None else {**row, "limit": limit}


def _loop(plan: Plan, where: str) -> list[Row]:
    """Every shard of a plan through the engine and into a ledger; what each step took."""
    watch, memory = Stopwatch(), []
    marks = [-(-plan.num_shards * percent // 100) for percent in (10, 50, 100)]
    with tempfile.TemporaryDirectory() as folder, _run(where) as run:
        objects = LocalObjects(Path(folder))
        ledger = Ledger({"batch": 1, "first_shard": 0, "num_shards": plan.num_shards})
        ledger.create(objects)
        access = Access(("/archive",))
        tasks = watch.each(
            "shard_task", lambda k: shard_task(plan, k, "paper", access, RANGES), plan.shards
        )
        begin, busy = time.perf_counter(), time.process_time()
        for batch in in_loop(tasks, plan.num_shards, run):
            with watch.of("ledger"):
                ledger.append(objects, batch)
            while marks and len(ledger.shards) >= marks[0]:
                memory.append(resident_mib())
                marks.pop(0)
        total, busy = time.perf_counter() - begin, time.process_time() - busy
        with watch.of("canonical"):
            ledger.canonical()
    assert len(ledger.shards) == plan.num_shards
    took = watch.seconds
    engine = total - took["shard_task"] - took["ledger"]
    steps = {
        "shard_task": took["shard_task"], "submit, result": engine, "ledger": took["ledger"],
        "loop in all": total, "of it at work here": busy, "canonical ledger": took["canonical"],
    }  # fmt: skip
    what, tiles = f"{plan.num_shards:,} shards, {WORKERS} {where}", len(plan.tiles)
    rows = [_row(what, step, tiles, seconds) for step, seconds in steps.items()]
    rows[3] |= {"limit": LIMIT_US_PER_TILE, "MiB": " / ".join(f"{mib:,.0f}" for mib in memory)}
    return rows


@contextlib.contextmanager
def _run(where: str) -> Iterator[RunConfig]:
    if where == "worker processes":
        yield RunConfig(workers=WORKERS)
        return
    with LocalCluster(
        n_workers=WORKERS, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        yield RunConfig(scheduler=cluster.scheduler_address)


def _manifest(plan: Plan) -> list[Row]:
    """The last steps of the job: footprints, the manifest's table, its bytes."""
    watch, tiles, scenes = Stopwatch(), len(plan.tiles), len(plan.lead.scenes)
    slots = plan.num_shards * plan.lead.layout.shard_capacity
    counts = {
        n: np.full(slots, 9, np.int32)
        for n in ("num_valid", "num_cloud", "num_nodata", "num_cells")
    }
    counts["tokens"] = np.ones((slots, plan.lead.layout.grid.num_scales), np.int32)
    outcome = ModalityOutcome(
        np.zeros(scenes, np.bool_), np.empty(0, np.int64), counts, [[1.5, 2.5]] * scenes
    )
    with watch.of("ledger of the plan"):
        place_rows(plan)
    rows = [_row("commit", "places of the plan", tiles, watch.seconds["ledger of the plan"])]
    with watch.of("footprints"):
        facts = tile_facts(plan, "/archive", Access(("/archive",)))
    rows.append(_row("commit", "footprints", tiles, watch.seconds["footprints"]))
    with watch.of("table"):
        table = manifest_table(plan, {"image": outcome}, np.arange(tiles), facts)
    rows.append(_row("commit", "manifest's table", tiles, watch.seconds["table"]))
    with watch.of("bytes"):
        content = encode_manifest(table)
    rows.append(
        _row(
            "commit",
            f"manifest's bytes, {len(content) / 2**20:.0f} MiB",
            tiles,
            watch.seconds["bytes"],
        )
    )
    return rows


def finished(num_shards: int) -> list[Row]:
    """What a finished store of many shards costs whoever runs its command again, or opens it."""
    with tempfile.TemporaryDirectory() as folder:
        archive, store = Path(folder) / "archive", Path(folder) / "store"
        side = _write_archive(archive, num_shards)
        command = [
            "store.tile_size_px=16", "store.shard_tiles=256", f"run.workers={WORKERS}",
            "partition.num_scales=1", "modality.value_range=[0, 1]",
        ]  # fmt: skip
        config = load_config(PreprocessConfig, None, command)
        shortest = partial(best_seconds, repeats=1 if num_shards == QUICK_SHARDS else REPEATS)
        watch, what = Stopwatch(), f"{num_shards:,} scenes of {side * side} tiles in as many shards"
        with watch.of("first run, nothing read or written but the ledger"):
            _make(archive, store, config)
        before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
        tiles = num_shards * side * side
        rows = [_row(what, step, tiles, seconds) for step, seconds in watch.seconds.items()]

        def again() -> None:
            assert jobs.run_job(str(archive), store, config, Silent()).shards_written == 0

        rows.append(_row(what, "run_job again", tiles, shortest(again), LIMIT_RERUN_S))
        rows.append(_row(what, "open_store", tiles, shortest(lambda: open_store(store))))
        rows.append(_row(what, "its history", tiles, shortest(lambda: open_store(store).history)))
        script = [sys.executable, "-c", "import workflows.preprocess"]
        rows.append(_row(what, "imports of the command", tiles, shortest(lambda: _call(script))))
        sets = [part for setting in command for part in ("--set", setting)]
        script = [
            sys.executable,
            "-m",
            "workflows.cli",
            "preprocess",
            str(archive),
            str(store),
            *sets,
        ]
        rows.append(_row(what, "aptile preprocess again", tiles, shortest(lambda: _call(script))))
        after = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
        rewritten = len(dict(before.items() ^ after.items()))
        return [*rows, {"job": what, "step": "files rewritten by all of these", "found": rewritten}]


def _make(archive: Path, store: Path, config: PreprocessConfig) -> None:
    from bench_scale import no_op as function

    real, batch.process_shard = batch.process_shard, function
    try:
        jobs.run_job(str(archive), store, config, Silent())
    finally:
        batch.process_shard = real


def _write_archive(folder: Path, number: int) -> int:
    """Copies of one raster without any block; how many tiles of 16 px it is wide and high."""
    side = 16
    folder.mkdir()
    first, size = folder / "00000.tif", side * 16
    facts = {"driver": "GTiff", "count": 1, "height": size, "width": size, "dtype": "uint8"}
    at = Affine(10, 0, 5e5, 0, -10, 5e6)
    with rasterio.open(first, "w", **facts, crs="EPSG:32632", transform=at, sparse_ok=True):
        pass
    for copy in range(1, number):
        (folder / f"{copy:05d}.tif").hardlink_to(first)
    return side


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 (this very script's)


def main() -> None:
    args = arguments(__doc__)
    rows: list[Row] = []
    for step, number in (
        (on_paper, 2_000 if args.quick else 1_000_000),
        (finished, QUICK_SHARDS if args.quick else 10_000),
    ):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows += pool.submit(step, number).result()
    report(rows, args.json)


if __name__ == "__main__":
    main()
