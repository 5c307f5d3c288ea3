"""The whole job against a plain copy of the same pixels, and what a worker takes.

The archive is synthetic: 12-band uint16 scenes with the spectrum of landscapes (1/f), in DEFLATE blocks
of 512 px with predictor 2. The copy reads the same windows with rasterio and writes the same pixels to the
same shards (codec, sha256, fsync, rename) on as many Dask workers, and scores nothing. Runs alternate, and
the best of each counts. `CPU s` are user and system seconds of all processes: what a run costs where other
work on the machine delays it. Ratios are to the copy.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.windows import Window

sys.path.insert(0, str(Path(__file__).parent))
from common import Silent, arguments, landscape, report
from pipeline.jobs.clients import client_of
from pipeline.jobs.job import run_job
from pipeline.jobs.measures import MEASURES, Measures
from pipeline.jobs.shard import ShardTask, process_shard, shard_task, strips
from pipeline.planning.inputs import Job, plan_job
from pipeline.planning.memory import worker_bytes
from pipeline.readers.rasters import GDAL_OPTIONS
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from pipeline.storage.objects import LocalObjects
from pipeline.storage.sharding import ShardEncoder

BANDS = 12
THREE = "scoring.bands=[band_2, band_3, band_4]"
FIXED = "partition.thresholds=[3.0, 4.0]"
MIB = 2**20


def write_scene(path: Path, size: int, side: int, block: int) -> Path:
    """A scene of `size` px, from a pattern of `side` px that is shifted from one piece to the next."""
    rng = np.random.default_rng(0)
    shared = 600 * landscape(side, rng)
    noise = rng.normal(0, 8, (BANDS, side, side)).astype(np.float32)
    pattern = np.empty((BANDS, side, side), np.uint16)
    for band in range(BANDS):
        own = 2000 + shared + 200 * landscape(side, rng) + noise[band]
        pattern[band] = np.clip(own, 1, 10_000)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=BANDS, height=size, width=size, dtype="uint16", tiled=True,
        blockxsize=block, blockysize=block, compress="deflate", predictor=2, interleave="pixel",
        bigtiff="if_safer", num_threads=2, crs="EPSG:32632", transform=Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        for top in range(0, size, side):
            for left in range(0, size, side):
                height, width = min(side, size - top), min(side, size - left)
                piece = np.roll(pattern, (top * 3, left * 5), (1, 2))[:, :height, :width]
                raster.write(piece, window=Window(left, top, width, height))
    return path


def settings(*overrides: str, workers: int = 2) -> PreprocessConfig:
    given = ["modality.value_range=[0, 10000]", *overrides, f"run.workers={workers}"]
    return load_config(PreprocessConfig, None, given)


def tasks_of(job: Job, store: Path) -> Iterator[ShardTask]:
    ranges = {name: m.configured_ranges() for name, m in job.plan.modalities.items()}
    for shard in range(job.plan.num_shards):
        yield shard_task(job.plan, shard, str(store), job.access, ranges)


def copy_shard(task: ShardTask, write: bool) -> dict[str, Any]:
    """The plain copy of one shard: read its windows, write its pixels, and nothing else."""
    (modality,) = task.modalities
    name, spec = next(iter(modality.layout.arrays().items()))
    encoder, size = ShardEncoder(spec, modality.layout.codec), spec.shard[-1]
    with rasterio.Env(**GDAL_OPTIONS):
        for index, scene in enumerate(modality.scenes):
            frames = modality.frames[modality.frames["scene"] == index]
            with rasterio.open(scene.assets[0].href, driver="GTiff") as raster:
                for own, rows, cols in strips(task, scene, modality, frames):
                    corner = cols[0] * size, rows[0] * size
                    extent = (cols[1] - cols[0]) * size, (rows[1] - rows[0]) * size
                    pixels = raster.read(window=Window(*corner, *extent))
                    for slot, tile in zip(own["slot"], own["tile"], strict=True):
                        y = (task.rows[tile] - rows[0]) * size
                        x = (task.cols[tile] - cols[0]) * size
                        if write:
                            encoder.put(slot, pixels[None, :, y : y + size, x : x + size])
    objects = {f"{name}/{spec.shard_key(task.shard)}": encoder.pieces()} if write else {}
    return LocalObjects(Path(task.store)).write_all(objects)


def copy_job(archive: Path, store: Path, config: PreprocessConfig, write: bool) -> None:
    """Two Dask workers that copy, or only read, all shards."""
    with client_of(RunConfig(workers=2), 2) as client:
        tasks = list(tasks_of(plan_job(str(archive), config), store))
        client.gather(client.map(copy_shard, tasks, write=write, pure=False))


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measured(call: Callable[[Path], object], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a run that writes into a store of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        wall, cpu = time.perf_counter(), cpu_seconds()
        call(Path(parent) / "store")
        return time.perf_counter() - wall, cpu_seconds() - cpu


def against_copy(archive: Path, folder: Path, repeats: int, *shared: str) -> list[dict[str, Any]]:
    def copy(write: bool) -> Callable[[Path], object]:
        return lambda store: copy_job(archive, store, settings(*shared), write)

    def job(*overrides: str, workers: int = 2) -> Callable[[Path], object]:
        config = settings(*shared, *overrides, workers=workers)
        return lambda store: run_job(str(archive), store, config, Silent())

    ways = {
        "copy, 2 workers": copy(write=True),
        "job, 2 workers, 3 of 12 bands scored": job(THREE),
        "read only, 2 workers": copy(write=False),
        "job, 2 workers, all bands scored": job(),
        "job, 1 worker, 3 of 12 bands scored": job(THREE, workers=1),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(measured(way, folder))
    best = {name: tuple(map(min, zip(*times, strict=True))) for name, times in runs.items()}
    wall, cpu = best["copy, 2 workers"]
    return [
        {"what": name, "wall s": w, "CPU s": c, "wall ratio": w / wall, "CPU ratio": c / cpu}
        for name, (w, c) in best.items()
    ]


def in_process(function: Callable[..., Any], *given: Any) -> Any:
    """The function's result, from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given)


def split(archive: str, folder: str, *overrides: str) -> dict[str, float]:
    """What one worker does with its time, in ms per tile; the first shard does not count."""
    total, seconds, tiles = Measures(), 0.0, 0
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        job = plan_job(archive, settings(*overrides))
        for task in tasks_of(job, Path(parent) / "store"):
            begin = time.perf_counter()
            row = process_shard(task)
            if task.shard:
                seconds += time.perf_counter() - begin
                total.add(Measures(**row[MEASURES]))
                tiles += len(task.rows)
    steps = {step: getattr(total, step) for step in ("read", "score", "partition", "write")}
    steps["rest"] = seconds - sum(steps.values())
    return {f"{step} ms": 1e3 * spent / tiles for step, spent in steps.items()}


def writing(archive: str, folder: str, repeats: int) -> dict[str, Any]:
    """One shard's pixels made durable on one core, and the disk's own rate for the same bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        task = next(tasks_of(plan_job(archive, settings()), Path(parent) / "store"))
        (modality,) = task.modalities
        _, spec = next(iter(modality.layout.arrays().items()))
        size = spec.shard[-1]
        with rasterio.open(modality.scenes[0].assets[0].href) as raster:
            pixels = raster.read(window=Window(0, 0, raster.width, size))
        tiles = [
            np.ascontiguousarray(pixels[None, :, :, at : at + size])
            for at in range(0, pixels.shape[-1] - size + 1, size)
        ]

        def durable() -> list[bytes]:
            encoder = ShardEncoder(spec, modality.layout.codec)
            for slot in range(spec.shard[0]):
                encoder.put(slot, tiles[slot % len(tiles)])
            pieces = encoder.pieces()
            LocalObjects(Path(parent)).write_all({"object": pieces})
            return pieces

        def plain(pieces: list[bytes]) -> None:
            with (Path(parent) / "plain").open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())

        pieces = durable()
        ours, disk = [], []
        for _ in range(repeats):
            for times, call in ((ours, durable), (disk, lambda: plain(pieces))):
                begin = time.perf_counter(), time.process_time()
                call()
                times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    raw = spec.shard[0] * tiles[0].nbytes
    return {
        "what": "shard writing, one core: encode, sha256, fsync, rename",
        "pixel MB/s": raw / min(ours)[0] / 1e6,
        "pixel MB per CPU s": raw / min(cpu for _, cpu in ours) / 1e6,
        "disk alone, pixel MB/s": raw / min(disk)[0] / 1e6,
        "stored size": sum(map(len, pieces)) / raw,
    }


def bytes_read() -> int:
    """What this process has asked the system to read since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def amplification(archive: str, folder: str, *overrides: str) -> float:
    """Bytes read for all shards over the compressed bytes of the scene's full-resolution blocks."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        job = plan_job(archive, settings(*overrides))
        (modality,) = job.plan.modalities.values()
        tasks = list(tasks_of(job, Path(parent) / "store"))
        # Loads what there is to load; with thresholds of its own it leaves no sample behind.
        process_shard(next(tasks_of(plan_job(archive, settings(FIXED)), Path(parent) / "other")))
        begin = bytes_read()
        for task in tasks:
            process_shard(task)
        read = bytes_read() - begin
    with rasterio.open(modality.scenes[0].assets[0].href) as raster:
        blocks = sum(raster.block_size(1, row, col) for (row, col), _ in raster.block_windows(1))
    return read / blocks


def memory(archive: str, folder: str, num_tiles: int, *overrides: str) -> dict[str, Any]:
    """Peak of a worker over `num_tiles` tiles against its limit, and growth of what it holds."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        job = plan_job(archive, settings(*overrides))
        held, tiles = [], 0
        for task in tasks_of(job, Path(parent) / "store"):
            process_shard(task)
            tiles += len(task.rows)
            held.append(status("VmRSS"))
            if tiles >= num_tiles:
                break
    peak, limit = status("VmHWM"), worker_bytes(job.plan)
    facts = {
        "tiles": tiles,
        "peak MiB": peak / MIB,
        "limit MiB": limit / MIB,
        "share": peak / limit,
    }
    quarter = len(held) // 4
    grown = {"growth": max(held[-quarter:]) / max(held[:quarter]) - 1} if quarter > 1 else {}
    return {**facts, **grown}


def status(what: str) -> int:
    """Bytes of an entry of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{what}:")).split()[1]) * 1024


def large_scene(path: Path, side: int) -> Path:
    """A scene of `side` px of which the upper part, and with it the first shards, is noise."""
    rng = np.random.default_rng(0)
    with rasterio.open(
        path, "w", driver="GTiff", count=BANDS, height=side, width=side, dtype="uint16", tiled=True,
        blockxsize=512, blockysize=512, compress="deflate", zlevel=1, interleave="pixel",
        bigtiff="yes", num_threads=2, sparse_ok=True, crs="EPSG:32632",
        transform=Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        for left in range(0, side, 512):
            shape = (BANDS, 1024, min(512, side - left))
            noise = rng.integers(1, 10_000, shape, dtype=np.uint16)
            raster.write(noise, window=Window(left, 0, shape[2], min(1024, side)))
    return path


def cloud_optimized(path: Path, source: Path, side: int) -> Path:
    """The upper left part of a scene as a COG in blocks of 512 px, its overviews included."""
    with rasterio.open(source) as raster:
        pixels, profile = raster.read(window=Window(0, 0, side, side)), raster.profile
    place = {key: profile[key] for key in ("crs", "transform", "count", "dtype")}
    with rasterio.open(
        path, "w", driver="COG", height=side, width=side, compress="deflate", predictor=2,
        blocksize=512, num_threads=2, **place,
    ) as raster:  # fmt: skip
        raster.write(pixels)
    return path


def main() -> None:
    args = arguments(__doc__)
    scenes, size, side, repeats = (2, 512, 256, 1) if args.quick else (6, 8192, 2048, 3)
    shared = ["store.shard_tiles=8"] if args.quick else []
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive"
        first = write_scene(archive / "scene_0.tif", size, side, block=side // 4)
        for number in range(1, scenes):
            os.link(first, archive / f"scene_{number}.tif")
        rows = against_copy(archive, Path(folder), repeats, *shared)
        ways = [("3 of 12 bands", [THREE]), ("all bands", [])]
        for what, given in ways[:1] if args.quick else ways:
            spent = in_process(split, str(archive), folder, *shared, *given)
            rows.append({"what": f"one worker, per tile, {what} scored", **spent})
        rows.append(in_process(writing, str(archive), folder, repeats))
        rows += workers(first, folder, args.quick, *shared)
    report(rows, args.json)


def workers(scene: Path, folder: str, quick: bool, *shared: str) -> list[dict[str, Any]]:
    """What a worker reads and holds."""
    side, wide, num_tiles = (512, 2048, 64) if quick else (5490, 20_000, 4096)
    cog = cloud_optimized(Path(folder) / "cog.tif", scene, side)
    rows = []
    ways = [("sampled", []), ("given", [FIXED])]
    for what, given in ways[:1] if quick else ways:
        read = in_process(amplification, str(cog), folder, *shared, THREE, *given)
        rows.append({"what": f"COG of {side} px, thresholds {what}", "bytes read / blocks": read})
    large = large_scene(Path(folder) / "large.tif", wide)
    for what, path, tiles, given in (
        (f"scene of {wide} px", large, num_tiles // 4, shared),
        ("many shards", scene, num_tiles, ["store.shard_tiles=64"]),
    ):
        held = in_process(memory, str(path), folder, tiles, THREE, FIXED, *given)
        rows.append({"what": what, **held})
    return rows


if __name__ == "__main__":
    main()
