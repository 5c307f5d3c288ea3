"""Entropy scores of three levels at 32 bins, against decoding the same pixels and plain NumPy.

One core. Pixels are a 12-band uint16 scene with structure at every scale; decoding reads it from a
DEFLATE-compressed, tiled GeoTIFF as the job does. Rates are in millions of pixel-bands per second.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, best_seconds, report

from pipeline.archive import open_raster
from pipeline.grid import BaseGrid
from pipeline.scorers.config import EntropyConfig
from pipeline.scorers.entropy import EntropyScorer

BANDS, SCORED = 12, (1, 2, 3)


def scene(size: int) -> np.ndarray:
    """uint16 [band, y, x]: noise summed over octaves, as steep as natural images."""
    rng = np.random.default_rng(0)
    image = np.zeros((BANDS, size, size))
    step = size // 4
    while step >= 1:
        coarse = rng.normal(0, step**0.7, (BANDS, size // step, size // step))
        image += np.kron(coarse, np.ones((step, step)))
        step //= 4
    image -= image.min()
    return (image / image.max() * 6000 + 300).astype(np.uint16)


def write(path: Path, image: np.ndarray) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", count=BANDS, height=image.shape[1], width=image.shape[2],
        dtype="uint16", tiled=True, blockxsize=256, blockysize=256, compress="deflate",
        predictor=2, crs="EPSG:32632", transform=Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        raster.write(image)


def decode(path: Path) -> np.ndarray:
    with open_raster(str(path)) as raster:
        return raster.read()


def numpy_maps(image: np.ndarray, grid: BaseGrid, num_bins: int, low: float, high: float):
    """Entropy of every level with array operations only: what one would write first."""
    bins = np.clip((image - low) * (num_bins / (high - low)), 0, num_bins - 1).astype(np.int64)
    for size in grid.patch_sizes:
        rows, cols = image.shape[1] // size, image.shape[2] // size
        cells = bins.reshape(-1, rows, size, cols, size).transpose(0, 1, 3, 2, 4)
        cells = cells.reshape(-1, size * size)
        index = cells + np.arange(len(cells))[:, None] * num_bins
        counts = np.bincount(index.ravel(), minlength=len(cells) * num_bins)
        p = counts.reshape(-1, num_bins) / (size * size)
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = -np.where(p > 0, p * np.log2(p), 0).sum(1)
        yield bits.reshape(-1, rows, cols).mean(0)


def main() -> None:
    args = arguments(__doc__)
    size, tile, repeats = (256, 128, 1) if args.quick else (2048, 128, 5)
    image = scene(size)
    scored = np.ascontiguousarray(image[list(SCORED)])
    valid = np.ones((tile, tile), np.bool_)
    scorer = EntropyScorer(EntropyConfig(), ((0.0, 10_000.0),) * len(SCORED))
    grid = BaseGrid(tile // 4, tile // 4, 4, 3)
    starts = range(0, size, tile)
    tiles = [
        np.ascontiguousarray(scored[:, y : y + tile, x : x + tile]) for y in starts for x in starts
    ]

    scoring = best_seconds(lambda: [scorer.maps(t, valid, grid) for t in tiles], repeats)
    plain = best_seconds(
        lambda: [list(numpy_maps(t, grid, 32, 0, 10_000)) for t in tiles[: max(1, len(tiles) // 8)]], 1
    ) * len(tiles) / max(1, len(tiles) // 8)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        write(path, image)
        decoding = best_seconds(lambda: decode(path), repeats)

    rows = [
        row("entropy kernel, 3 bands, 4/8/16 px", scored.size, scoring, scoring),
        row("plain NumPy, 3 bands, 4/8/16 px", scored.size, plain, scoring),
        row("decoding 12 bands, DEFLATE GeoTIFF", image.size, decoding, scoring),
    ]
    report(rows, args.json)


def row(what: str, pixel_bands: int, seconds: float, kernel_seconds: float) -> dict[str, object]:
    return {
        "what": what,
        "M pixel-bands/s": pixel_bands / seconds / 1e6,
        "time / kernel": seconds / kernel_seconds,
    }


if __name__ == "__main__":
    main()
