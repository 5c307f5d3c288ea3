"""What augmentation costs: turning and cropping a batch's pixels, validity and partitions.

Beside it the limit for pixels, copying them once, in the same run.
"""

import numpy as np

from common import arguments, best_seconds, report
from model.data.symmetry import (
    FLIPS,
    NUM_TURNS,
    crop_rasters,
    crop_scales,
    turn_rasters,
    turn_scales,
)
from pipeline.grid import BaseGrid

BANDS, SIDE, BASE, NUM_SCALES = 12, 128, 4, 4


def leaves(rng: np.random.Generator, scale: int) -> list[int]:
    """A quadtree; the share of splits gives about 300 leaves in a tile, of 1024 base cells."""
    if scale and rng.random() < 0.6:
        return [leaf for _ in range(4) for leaf in leaves(rng, scale - 1)]
    return [scale]


def main() -> None:
    args = arguments(__doc__)
    num_tiles, repeats = (4, 1) if args.quick else (64, 20)
    rng = np.random.default_rng(0)
    grid = BaseGrid(SIDE // BASE, SIDE // BASE, BASE, NUM_SCALES)
    num_roots = (SIDE // grid.root_size_px) ** 2
    pixels = rng.integers(0, 10_000, (num_tiles, BANDS, SIDE, SIDE), np.uint16)
    valid = rng.random((num_tiles, SIDE, SIDE)) < 0.9
    of_tiles = [
        [leaf for _ in range(num_roots) for leaf in leaves(rng, NUM_SCALES - 1)]
        for _ in range(num_tiles)
    ]
    scales = np.array([leaf for of_tile in of_tiles for leaf in of_tile], np.uint8)
    counts = np.array([len(of_tile) for of_tile in of_tiles])
    turns = np.arange(num_tiles) % NUM_TURNS
    flips = np.array(FLIPS)[turns % len(FLIPS)]
    corners = rng.integers(0, 3, (num_tiles, 2))
    half = np.empty((num_tiles, BANDS, SIDE // 2, SIDE // 2), np.uint16)
    copy = np.empty_like(pixels)
    work = {
        "copy pixels": lambda: np.copyto(copy, pixels),
        "turn pixels, all eight turns": lambda: turn_rasters(pixels, turns),
        "turn pixels, flips only": lambda: turn_rasters(pixels, flips),
        "turn validity": lambda: turn_rasters(valid, turns),
        "crop pixels to a quarter and turn": lambda: crop_rasters(
            pixels, corners * grid.root_size_px, turns, half
        ),
        "turn partitions": lambda: turn_scales(scales, counts, turns, grid),
        "crop partitions to a quarter": lambda: crop_scales(scales, counts, corners, 2, grid),
    }
    seconds = {name: best_seconds(call, repeats) / num_tiles for name, call in work.items()}
    report(
        [
            {
                "what": f"{name}, per tile of {BANDS} x {SIDE} x {SIDE} uint16",
                "microseconds": took * 1e6,
                "times one copy": took / seconds["copy pixels"],
            }
            for name, took in seconds.items()
        ],
        args.json,
    )


if __name__ == "__main__":
    main()
