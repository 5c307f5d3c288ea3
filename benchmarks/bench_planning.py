"""Planning a job over a large stac-geoparquet catalogue: time and peak memory in a process of its own.

Listing alone, then the whole plan of `aptile preprocess --dry-run`: places, timesteps, tiles, slots. Items
have 12 assets like those of a Sentinel-2 catalogue, each with grid, type, scale, checksum and size, so
that no raster is opened. In the first catalogue 2,000 places share their grids, in the second every item
has grids of its own. `peak MiB` counts the whole process, interpreter and libraries included.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, report
from pipeline.planning.inputs import plan_job
from pipeline.scenes import Access
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.stac import list_stac

RESOLUTIONS_M = {
    "coastal": 60, "blue": 10, "green": 10, "red": 10, "rededge1": 20, "rededge2": 20, "rededge3": 20,
    "nir": 10, "nir08": 20, "nir09": 60, "swir16": 20, "swir22": 20,
}  # fmt: skip
ROOT = "https://data.example/sentinel-2-l2a"
BATCH = 2000


def write_table(path: Path, items: int, tiles: int) -> None:
    rng = np.random.default_rng(0)
    writer = None
    for begin in range(0, items, BATCH):
        rows = [row(number, tiles, rng) for number in range(begin, min(items, begin + BATCH))]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def row(number: int, tiles: int, rng: np.random.Generator) -> dict[str, object]:
    """One item as stac-geoparquet has it."""
    tile = number % tiles
    zone, left, top = 1 + tile % 60, 300_000.0 + 60 * (tile // 60), 5_000_040.0 + 20 * (tile % 977)
    moment = np.datetime64("2017-01-01T10:00:00", "us") + np.timedelta64(number * 731, "s")
    name = f"S2A_{zone:02d}UAB_{str(moment)[:10].replace('-', '')}_{number}_L2A"
    return {
        "id": name,
        "collection": "sentinel-2-l2a",
        "datetime": moment.item(),
        "updated": f"{moment}Z",
        "proj:epsg": 32600 + zone,
        "grid:code": f"MGRS-{zone:02d}U{tile // 60:04d}",
        "s2:processing_baseline": "05.09",
        "earthsearch:boa_offset_applied": bool(number % 2),
        "assets": {
            key: asset(f"{ROOT}/{zone}/{tile}/{name}/{key}.tif", key, left, top, rng)
            for key in RESOLUTIONS_M
        },
    }


def asset(
    href: str, key: str, left: float, top: float, rng: np.random.Generator
) -> dict[str, object]:
    metres = RESOLUTIONS_M[key]
    side = 109_800 // metres
    band = {"data_type": "uint16", "nodata": 0, "scale": 0.0001, "offset": -0.1}
    return {
        "href": href,
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "proj:shape": [side, side],
        "proj:transform": [float(metres), 0.0, left, 0.0, -float(metres), top],
        "eo:bands": [{"name": key, "common_name": key, "center_wavelength": 0.49}],
        "raster:bands": [{**band, "spatial_resolution": metres}],
        "file:checksum": "1220" + rng.bytes(32).hex(),
        "file:size": int(rng.integers(10**7, 2 * 10**8)),
    }


def listing(path: str) -> tuple[int, float, float]:
    """Scenes, seconds and peak MiB of listing one table."""
    modality = ModalityConfig(name="s2", bands=tuple(RESOLUTIONS_M))
    access = Access(roots=(ROOT, str(Path(path).parent)))
    begin = time.perf_counter()
    scenes = list_stac(path, str(Path(path).parent), modality, access).scenes
    seconds = time.perf_counter() - begin
    return len(scenes), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def planning(path: str) -> tuple[int, float, float]:
    """Tiles, seconds and peak MiB of planning a job over one table."""
    sets = {f"{m}m": [b for b, own in RESOLUTIONS_M.items() if own == m] for m in (10, 20, 60)}
    content = {
        "modality": {"name": "s2", "bands": list(RESOLUTIONS_M), "band_sets": sets},
        "scoring": {"bands": ["blue", "green", "red"]},
        "store": {"tile_size_px": 192},
        "run": {"allow": [ROOT]},
    }
    config = PreprocessConfig.model_validate(content)
    begin = time.perf_counter()
    job = plan_job(path, config)
    seconds = time.perf_counter() - begin
    assert not job.refused
    return len(job.plan.tiles), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    args = arguments(__doc__)
    items = 200 if args.quick else 100_000
    rows = []
    for what, tiles in (("2,000 places", 2000), ("every item its own place", items)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "items.parquet"
            write_table(path, items, tiles)
            for step in (listing, planning) if tiles <= 2000 else (listing,):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    number, seconds, peak = pool.apply(step, (str(path),))
                row = {"catalogue": f"{items:,} items of 12 assets, {what}", "step": step.__name__}
                unit = "scenes" if step is listing else "tiles"
                figures = {"seconds": seconds, "items/s": items / seconds, "peak MiB": peak}
                rows.append({**row, "result": f"{number:,} {unit}", **figures})
    report(rows, args.json)


if __name__ == "__main__":
    main()
