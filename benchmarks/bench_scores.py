"""Entropy scores on one core, against decoding the same pixels and against what others do.

Peers: `recursive` scores each patch it keeps or splits with numpy.histogram as it descends; `NumPy`
and `torch` score all patches of a size with array operations. Rates are in millions of pixel-bands per
second. A peer's ratio is its time over the kernel's. Pixels are synthetic, but for the rows that name a
real scene: the Sentinel-2 chip of the package spyndex, or those given with --scenes.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, best_seconds, chip, read, report
from pipeline.grid import BaseGrid
from pipeline.quadtree import partition_scales
from pipeline.scorers.binning import bin_indices
from pipeline.scorers.config import LUMA, EntropyConfig
from pipeline.scorers.entropy import EntropyScorer

BANDS, SCORED = 12, (1, 2, 3)
RANGE = (0.0, 10_000.0)
TILE = 128


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


def decoding_seconds(image: np.ndarray, repeats: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        with rasterio.open(
            path, "w", driver="GTiff", count=len(image), height=image.shape[1],
            width=image.shape[2], dtype=image.dtype, tiled=True, blockxsize=256, blockysize=256,
            compress="deflate", predictor=2, crs="EPSG:32632",
            transform=Affine(10, 0, 5e5, 0, -10, 5e6),
        ) as raster:  # fmt: skip
            raster.write(image)

        def decode() -> None:
            read(path)

        return best_seconds(decode, repeats)


def kernel(
    tiles: list[np.ndarray], base: int, scales: int, config: EntropyConfig
) -> Callable[[], object]:
    """Score every tile [band, y, x], as a shard's task does."""
    side = tiles[0].shape[1]
    grid = BaseGrid(side // base, side // base, base, scales)
    scorer = EntropyScorer(config, (RANGE,) * len(tiles[0]))
    valid = np.ones((side, side), np.bool_)
    return lambda: [scorer.maps(tile, valid, grid) for tile in tiles]


def recursive(frame: np.ndarray, base: int, scales: int, thresholds: list[float]) -> int:
    """Tokens of a frame [band, y, x]; every node is scored when it is met, the base cells too."""

    def score(patch: np.ndarray) -> float:
        bits = []
        for band in patch:
            counts, _ = np.histogram(np.clip(band, *RANGE), bins=32, range=RANGE)
            p = counts[counts > 0] / counts.sum()
            bits.append(-(p * np.log2(p)).sum())
        return float(np.mean(bits))

    def visit(y: int, x: int, scale: int) -> int:
        size = base << scale
        bits = score(frame[:, y : y + size, x : x + size])
        if scale == 0 or bits < thresholds[scale - 1]:
            return 1
        half = size // 2
        return sum(visit(y + dy, x + dx, scale - 1) for dy in (0, half) for dx in (0, half))

    root = base << (scales - 1)
    steps = range(0, frame.shape[1], root)
    return sum(visit(y, x, scales - 1) for y in steps for x in steps)


def numpy_maps(image: np.ndarray, sizes: tuple[int, ...], num_bins: int) -> list[np.ndarray]:
    """Entropy of all patches of each size by one bincount per size."""
    low, high = RANGE
    scaled = (image - low) * (num_bins / (high - low))
    bins = np.clip(scaled, 0, num_bins - 1).astype(np.int64)
    maps = []
    for size in sizes:
        rows, cols = image.shape[1] // size, image.shape[2] // size
        cells = bins.reshape(-1, rows, size, cols, size).transpose(0, 1, 3, 2, 4)
        cells = cells.reshape(-1, size * size)
        index = cells + np.arange(len(cells))[:, None] * num_bins
        counts = np.bincount(index.ravel(), minlength=len(cells) * num_bins)
        p = counts.reshape(-1, num_bins) / (size * size)
        bits = -(p * np.log2(np.where(p > 0, p, 1))).sum(1)
        maps.append(bits.reshape(-1, rows, cols).mean(0))
    return maps


def torch_maps(images: torch.Tensor, sizes: tuple[int, ...], num_bins: int) -> list[torch.Tensor]:
    """Entropy of all patches of gray images [image, y, x] of each size, by scatter_add."""
    bins = (images * (num_bins / 256)).clamp(0, num_bins - 1).long()
    maps = []
    for size in sizes:
        patches = bins.unfold(1, size, size).unfold(2, size, size).flatten(3)
        counts = torch.zeros(*patches.shape[:3], num_bins)
        counts.scatter_add_(3, patches, torch.ones_like(patches, dtype=torch.float32))
        p = counts / patches.shape[3]
        maps.append(-(p * torch.log2(p.clamp(min=1e-12))).sum(3))
    return maps


def main() -> None:
    args = arguments(__doc__, scenes=True)
    torch.set_num_threads(1)
    size, repeats = (256, 1) if args.quick else (2048, 5)
    image = scene(size)
    starts = range(0, size, TILE)
    scored = image[list(SCORED)]
    tiles = [
        np.ascontiguousarray(scored[:, y : y + TILE, x : x + TILE]) for y in starts for x in starts
    ]
    rows = against_decoding(image, tiles, repeats)
    rows += variants(tiles, repeats)
    rows += real_scenes(args.scenes or [], repeats)
    rows += peers(tiles, 1 if args.quick else 4, repeats)
    report(rows, args.json)


def against_decoding(
    image: np.ndarray, tiles: list[np.ndarray], repeats: int
) -> list[dict[str, object]]:
    pixel_bands = sum(tile.size for tile in tiles)
    seconds = best_seconds(kernel(tiles, 4, 3, EntropyConfig()), repeats)
    binning = best_seconds(lambda: [bin_indices(t, (RANGE,) * len(t), 32) for t in tiles], repeats)
    decoding = decoding_seconds(image, repeats)
    return [
        rate("kernel, 3 bands, 4/8/16 px, 32 bins, uint16", pixel_bands, seconds),
        rate("... of it: DN to bins", pixel_bands, binning, binning / seconds),
        rate("decoding 12 bands, DEFLATE GeoTIFF", image.size, decoding, decoding / seconds),
    ]


def variants(tiles: list[np.ndarray], repeats: int) -> list[dict[str, object]]:
    pixel_bands = sum(tile.size for tile in tiles)
    reference = best_seconds(kernel(tiles, 4, 3, EntropyConfig()), repeats)
    rows = []
    for base, scales in ((1, 4), (2, 3), (4, 2), (4, 5), (8, 3)):
        seconds = best_seconds(kernel(tiles, base, scales, EntropyConfig()), repeats)
        sizes = "/".join(str(base << s) for s in range(scales))
        rows.append(rate(f"{sizes} px", pixel_bands, seconds, reference / seconds))
    for num_bins in (16, 64, 256, 512):
        config = EntropyConfig(num_bins=num_bins)
        seconds = best_seconds(kernel(tiles, 4, 3, config), repeats)
        rows.append(rate(f"{num_bins} bins", pixel_bands, seconds, reference / seconds))
    for dtype in ("float32", "float64"):
        floats = [tile.astype(dtype) for tile in tiles]
        seconds = best_seconds(kernel(floats, 4, 3, EntropyConfig()), repeats)
        rows.append(rate(dtype, pixel_bands, seconds, reference / seconds))
    return rows


def real_scenes(paths: list[Path], repeats: int) -> list[dict[str, object]]:
    images = {path.stem: read(path) for path in paths} or {"chip": chip()}
    rows = []
    for name, image in images.items():
        bands = image[1:4] if len(image) >= 12 else image[:3]
        height, width = (size // TILE * TILE for size in image.shape[1:])
        tiles = [
            np.ascontiguousarray(bands[:, y : y + TILE, x : x + TILE])
            for y in range(0, height, TILE)
            for x in range(0, width, TILE)
        ]
        seconds = best_seconds(kernel(tiles, 4, 3, EntropyConfig()), 10 * repeats)
        rows.append(rate(f"real scene {name}, 4/8/16 px", sum(t.size for t in tiles), seconds))
    return rows


def peers(tiles: list[np.ndarray], num_frames: int, repeats: int) -> list[dict[str, object]]:
    rows = []
    # Noise is split everywhere: all nodes are visited.
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 10_000, (3, 64, 64)).astype(np.uint16) for _ in range(num_frames)]
    for base, scales, thresholds in ((4, 2, [0.8]), (1, 4, [0.3, 0.5, 0.8])):
        grid = BaseGrid(64 // base, 64 // base, base, scales)
        score = kernel(frames, base, scales, EntropyConfig())

        def ours(score=score, grid=grid, thresholds=thresholds) -> list[np.ndarray]:
            return [partition_scales(maps, thresholds, grid) for maps in score()]

        def theirs(base=base, scales=scales, thresholds=thresholds) -> list[int]:
            return [recursive(frame, base, scales, thresholds) for frame in frames]

        fast, slow = best_seconds(ours, 20 * repeats), best_seconds(theirs, 1)
        what = f"recursive, 64 x 64 px, 3 bands, {scales} scales, with partition"
        rows.append(rate(what, sum(f.size for f in frames), slow, slow / fast))
    pixel_bands = sum(tile.size for tile in tiles[:16])
    fast = best_seconds(kernel(tiles[:16], 4, 3, EntropyConfig()), 5 * repeats)
    slow = best_seconds(lambda: [numpy_maps(tile, (4, 8, 16), 32) for tile in tiles[:16]], 1)
    rows.append(rate("NumPy, 3 bands, 4/8/16 px, 32 bins", pixel_bands, slow, slow / fast))
    return [*rows, gray_peer(repeats)]


def gray_peer(repeats: int) -> dict[str, object]:
    """Eight gray images of 384 x 384 px, 16 and 32 px patches, 512 bins: torch against the kernel."""
    rng = np.random.default_rng(0)
    rgb = np.kron(rng.integers(0, 256, (8, 3, 48, 48)), np.ones((1, 1, 8, 8)))
    rgb = np.clip(rgb + rng.normal(0, 8, rgb.shape), 0, 255).astype(np.uint8)
    scorer = EntropyScorer(EntropyConfig(num_bins=512, combine="gray"), ((0.0, 256.0),) * 3)
    grid, valid = BaseGrid(24, 24, 16, 2), np.ones((384, 384), np.bool_)
    gray = torch.from_numpy(np.tensordot(rgb, np.array(LUMA), (1, 0))).float()
    fast = best_seconds(lambda: [scorer.maps(image, valid, grid) for image in rgb], repeats)
    slow = best_seconds(lambda: torch_maps(gray, (16, 32), 512), repeats)
    return rate(
        "torch, 8 gray images 384 x 384, 16/32 px, 512 bins", gray.numel(), slow, slow / fast
    )


def rate(
    what: str, pixel_bands: int, seconds: float, ratio: float | None = None
) -> dict[str, object]:
    """A row; `ratio` says how many times the kernel's time it took, or the share of its rate."""
    row: dict[str, object] = {"what": what, "M pixel-bands/s": pixel_bands / seconds / 1e6}
    if ratio is not None:
        row["ratio"] = ratio
    return row


if __name__ == "__main__":
    main()
