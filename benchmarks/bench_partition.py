"""Quadtrees from score maps on one core, and whole repartitions of a store.

The kernel rows go from score maps to stored rows (scales, counts, tokens), in millions of base cells
per second. The store rows repartition tiles of 16 x 16 base cells and three levels from their stored
maps alone, reading, writing and commits included; `20,000 tiles` is the time that many take at the
measured rate, in seconds.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine

sys.path.insert(0, str(Path(__file__).parent))
from common import Silent, arguments, best_seconds, report
from pipeline.cut import leaves, splits_by_budget, splits_by_thresholds
from pipeline.grid import BaseGrid
from pipeline.jobs.job import run_job
from pipeline.jobs.repartition import repartition
from pipeline.nodes import node_scores
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig

TILE_PX, CELLS = 64, 16


def score_pyramid(frames: int, cells: int, levels: int) -> list[np.ndarray]:
    """Random base scores [frame, y, x] and, coarser, the means of four."""
    maps = [np.random.default_rng(0).random((frames, cells, cells)).astype(np.float32)]
    for level in range(1, levels):
        side = cells >> level
        blocks = maps[-1].reshape(frames, side, 2, side, 2)
        maps.append(blocks.mean((2, 4)).astype(np.float32))
    return maps


def kernels(quick: bool) -> list[dict[str, object]]:
    rows = []
    for cells, levels, frames in ((16, 3, 20_000), (32, 3, 5_000), (128, 5, 300)):
        frames = frames // 100 if quick else frames
        grid, maps = BaseGrid(cells, cells, 4, levels), score_pyramid(frames, cells, levels)
        limits = [float(np.median(level)) for level in maps[1:]]

        def by_thresholds(maps=maps, grid=grid, limits=limits) -> object:
            nodes = node_scores(maps, grid)
            return leaves(splits_by_thresholds(nodes, limits, grid), nodes, grid)

        def by_budget(share: float, maps=maps, grid=grid) -> object:
            nodes = node_scores(maps, grid)
            return leaves(splits_by_budget(nodes, int(share * grid.num_cells), grid), nodes, grid)

        what = f"{cells} x {cells} cells, {levels} levels"
        total = frames * grid.num_cells
        rows.append(rate(f"thresholds, {what}", total, best_seconds(by_thresholds, 3)))
        for share in (0.15, 0.35, 0.7):
            seconds = best_seconds(lambda share=share, cut=by_budget: cut(share), 3)
            rows.append(rate(f"budget of {share:.0%}, {what}", total, seconds))
    return rows


def rate(what: str, cells: int, seconds: float) -> dict[str, object]:
    return {"what": what, "M base cells/s": cells / seconds / 1e6}


def stores(quick: bool) -> list[dict[str, object]]:
    side = 4 if quick else 141
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_scene(Path(folder) / "scenes" / "scene.tif", side * TILE_PX)
        settings = [f"store.tile_size_px={TILE_PX}", "modality.value_range=[0, 255]"]
        config = load_config(PreprocessConfig, None, settings)
        run_job(str(Path(folder) / "scenes"), store, config, Silent())
        rules = {
            "thresholds": FurtherRule(thresholds=(2.0, 3.0)),
            "tokens-per-tile": FurtherRule(tokens_per_tile=64),
            "quantile": FurtherRule(quantile=0.5),
            "mean-tokens": FurtherRule(mean_tokens=80),
        }
        rows = []
        for name, rule in rules.items():
            begin = time.perf_counter()
            repartition(store, name, rule, RunConfig(workers=1), Silent())
            seconds = time.perf_counter() - begin
            scaled = seconds * 20_000 / side**2
            row = rate(f"repartition by {name}, one process", side**2 * CELLS**2, seconds)
            rows.append({**row, "20,000 tiles (s)": scaled})
        return rows


def write_scene(path: Path, size: int) -> None:
    """uint8 with flat and busy parts."""
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 200, (size // 32, size // 32)), np.ones((32, 32)))
    image = (image + rng.integers(0, 56, (size, size)) * (image > 100)).astype(np.uint8)
    path.parent.mkdir()
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=size, width=size, dtype="uint8", tiled=True,
        blockxsize=256, blockysize=256, crs="EPSG:32632", transform=Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        raster.write(image, 1)


def main() -> None:
    args = arguments(__doc__)
    report(kernels(args.quick) + stores(args.quick), args.json)


if __name__ == "__main__":
    main()
