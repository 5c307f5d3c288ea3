"""How long an archive takes, by the compression of its files: the sizing table of docs/cluster.md.

Synthetic 12-band uint16 scenes whose spectrum falls with 1/f, like natural images. `decode` is our reader
alone, strip by strip, in this process. `job` is a whole job of one local worker: the processor time, of
worker and client, that further scenes add to it, so that starting up does not count. Both are MB of decoded
pixels per second of one core, user and system, the page cache warm; waiting for disks or networks is not in
them. From `job` alone follow, with 1 TB = 1e12 bytes of decoded pixels:

    core hours per TB   = 1e12 / job / 3600
    hours on N cores    = core hours per TB / (N * EFFICIENCY)
    core hours per TB of files = core hours per TB * ratio of decoded pixels to files
    shards per TB       = 1e12 / (tiles of a shard * bytes of a tile)

`peak MiB` is the largest resident size of a worker so far.
"""

import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.errors import RasterioError

sys.path.insert(0, str(Path(__file__).parent))
from common import Silent, arguments, report
from pipeline.jobs.job import run_job
from pipeline.locations import as_root
from pipeline.readers.rasters import open_raster
from pipeline.scenes import Access
from pipeline.settings.config import PreprocessConfig

BANDS = 12
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "DEFLATE": ("tif", {"driver": "GTiff", "compress": "deflate", "predictor": 2}),
    "ZSTD": ("tif", {"driver": "GTiff", "compress": "zstd", "predictor": 2}),
    "LZW": ("tif", {"driver": "GTiff", "compress": "lzw", "predictor": 2}),
    "JPEG 2000": ("jp2", {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"}),
}
# So many that the start of a worker, which is never quite as long, counts for little.
FURTHER_SCENES = 40
FURTHER_OF = {"JPEG 2000": 4}
# What N workers do of N times the work of one: two are 1.8 times as fast as one (`bench_job.py`).
EFFICIENCY = 0.9
CORES = (16, 64, 256)
BLOCK = 512
STRIP_ROWS = 512


def pixels(side: int) -> np.ndarray:
    """uint16 [band, y, x] around 2000 whose amplitudes fall with 1/f, the bands correlated, plus noise."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    fall = 1 / np.maximum(np.hypot(y, x), 1 / side)
    spectra = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) * fall, s=(side, side))
        for _ in range(3)
    ]
    planes = [plane / plane.std() for plane in spectra]
    mixed = np.tensordot(rng.uniform(0.2, 1, (BANDS, 3)), planes, 1)
    noise = rng.normal(0, 8, mixed.shape)
    return np.clip(2000 + 500 * mixed + noise, 1, 10_000).astype(np.uint16)


def write_scene(path: Path, image: np.ndarray, options: dict[str, Any]) -> None:
    bands, height, width = image.shape
    block = min(BLOCK, height)
    tiles = {"tiled": True} if options["driver"] == "GTiff" else {}
    with rasterio.open(
        path, "w", count=bands, height=height, width=width, dtype=image.dtype, crs="EPSG:32632",
        transform=Affine(10, 0, 500_000, 0, -10, 5_000_000), blockxsize=block, blockysize=block,
        **tiles, **options,
    ) as raster:  # fmt: skip
        raster.write(image)


def decode_rate(path: Path, image: np.ndarray) -> float:
    """MB/s of our reader; the pixels are compared once."""
    access = Access((as_root(str(path.parent)),), (*Access.drivers, "JP2OpenJPEG"))

    def read() -> np.ndarray:
        with open_raster(str(path), access) as raster:
            windows = [
                ((top, min(top + STRIP_ROWS, raster.height)), (0, raster.width))
                for top in range(0, raster.height, STRIP_ROWS)
            ]
            return np.concatenate([raster.read(window=window) for window in windows], axis=1)

    np.testing.assert_array_equal(read(), image)
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        read()
        seconds.append(time.process_time() - begin)
    return image.nbytes / min(seconds) / 1e6


def core_seconds() -> float:
    """Of this process and of its children that have ended."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def job_seconds(scene: Path, copies: int, folder: Path) -> float:
    """Core seconds of a whole job of one worker over so many copies of a scene."""
    archive, store = folder / "archive", folder / "store"
    archive.mkdir()
    for number in range(copies):
        shutil.copy(scene, archive / f"{number:03d}{scene.suffix}")
    content = {
        "modality": {"value_range": [0, 10_000]},
        "scoring": {"bands": ["band_2", "band_3", "band_4"]},
        # Given, because a sample for the default rule would read all of so small a scene again.
        "partition": {"thresholds": [0.8, 1.2]},
        "run": {"workers": 1, "jpeg2000": True},
    }
    begin = core_seconds()
    run_job(str(archive), store, PreprocessConfig.model_validate(content), Silent())
    seconds = core_seconds() - begin
    shutil.rmtree(archive)
    shutil.rmtree(store)
    return seconds


def row(name: str, image: np.ndarray, further: int, folder: Path) -> dict[str, Any]:
    """The line of one kind of file."""
    suffix, options = FILES[name]
    scene = folder / f"scene.{suffix}"
    write_scene(scene, image, options)
    decode = decode_rate(scene, image)
    few, many = (job_seconds(scene, copies, folder) for copies in (1, 1 + further))
    job = further * image.nbytes / max(many - few, 1e-3) / 1e6
    hours = 1e6 / job / 3600
    ratio = image.nbytes / scene.stat().st_size
    return {
        "files": name,
        "ratio": ratio,
        "decode MB/s": decode,
        "job MB/s": job,
        "core hours per TB": hours,
        **{f"hours on {cores} cores": hours / (cores * EFFICIENCY) for cores in CORES},
        "core hours per TB of files": hours * ratio,
        "peak MiB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def main() -> None:
    args = arguments(__doc__)
    warnings.filterwarnings("ignore", category=UserWarning)
    image = pixels(256 if args.quick else 1024)
    rows = []
    for name in ("DEFLATE", "JPEG 2000") if args.quick else FILES:
        further = 1 if args.quick else FURTHER_OF.get(name, FURTHER_SCENES)
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(row(name, image, further, Path(folder)))
            except RasterioError as error:
                print(f"{name}: this GDAL cannot write it ({error})")
    report(rows, args.json)
    config = PreprocessConfig()
    shard_bytes = config.store.shard_tiles * BANDS * config.store.tile_size_px**2 * 2
    print(
        f"\n{1e12 / shard_bytes:.0f} shards per TB of {BANDS} bands, {shard_bytes / 1e6:.0f} MB each"
    )


if __name__ == "__main__":
    main()
