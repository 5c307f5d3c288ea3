"""Every scorer at the same token budget: what its quadtree loses, and how long it takes.

For each scene every scorer gets as many tokens as the uniform grid of 8 px has (budget rule). `lost` is
the share of the pixels' variance that is gone when each leaf is replaced by its mean, over all bands
scaled to their value ranges: what tokens that average could not carry. The last row
of a scene is that uniform grid. Values of different scenes do not compare; rows of one scene do.

Without --scenes it takes the real Sentinel-2 chip of the package spyndex; a folder among the scenes counts
as one montage of 36 of its JPEG images, evenly chosen. With --pictures FOLDER it
draws the score map of 8 px patches and the quadtree of every scorer, one PNG per scene.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from common import arguments, best_seconds, chip, read, report
from pipeline import segments
from pipeline.bandstats import BandStats
from pipeline.cut import leaves, splits_by_budget
from pipeline.grid import BaseGrid
from pipeline.jobs.prepare import RANGE_PERCENTILES
from pipeline.nodes import node_scores
from pipeline.overlay import stretched
from pipeline.scorers.config import SCORER_NAMES
from pipeline.scores import make_scorer, scorer_config

BASE, SCALES = 4, 3
BUDGET = 0.25  # as many tokens as the uniform grid of 8 px has
NAMES = tuple(name for name in SCORER_NAMES if name != "external")


def montage(folder: Path) -> np.ndarray:
    """uint8 [rgb, y, x]: 6 x 6 images of equal size, evenly chosen from a folder and those below it."""
    files = sorted(folder.rglob("*.jpg"))
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, 36).astype(int)]
    images = np.stack([imread(file).transpose(2, 0, 1) for file in chosen])
    _, bands, height, width = images.shape
    grid = images.reshape(6, 6, bands, height, width).transpose(2, 0, 3, 1, 4)
    return grid.reshape(bands, 6 * height, 6 * width)


def whole_roots(image: np.ndarray) -> np.ndarray:
    """Cut to whole roots, so that every scorer sees the same valid pixels."""
    root = BASE * 2 ** (SCALES - 1)
    height, width = (size // root * root for size in image.shape[1:])
    return np.ascontiguousarray(image[:, :height, :width])


def scale_map(scales: np.ndarray, grid: BaseGrid) -> np.ndarray:
    """int64 [cell_y, cell_x]: the scale of the leaf that covers each base cell."""
    cells = np.empty(grid.num_cells, np.int64)
    cells[grid.storage_order] = np.repeat(segments.levels(scales), segments.run_lengths(scales))
    return cells.reshape(grid.rows, grid.cols)


def lost_variance(unit: np.ndarray, cell_scales: np.ndarray) -> float:
    """Share of the variance of `unit` [band, y, x] that leaf means do not hold."""
    residual = 0.0
    for scale in range(SCALES):
        size = BASE << scale
        blocks = unit.reshape(len(unit), unit.shape[1] // size, size, -1, size)
        errors = ((blocks - blocks.mean((2, 4), keepdims=True)) ** 2).sum((0, 2, 4))
        here = cell_scales[:: 1 << scale, :: 1 << scale] == scale
        residual += errors[here].sum()
    return residual / ((unit - unit.mean((1, 2), keepdims=True)) ** 2).sum()


def compare(
    name: str, image: np.ndarray, repeats: int, pictures: Path | None
) -> list[dict[str, object]]:
    image = whole_roots(image)
    ranges = BandStats.of(image.reshape(len(image), -1)).value_ranges(*RANGE_PERCENTILES)
    low, high = (np.array(edge)[:, None, None] for edge in zip(*ranges, strict=True))
    unit = np.clip((image - low) / (high - low), 0, 1)
    grid = BaseGrid(image.shape[1] // BASE, image.shape[2] // BASE, BASE, SCALES)
    valid = np.ones(image.shape[1:], np.bool_)
    budget = round(BUDGET * grid.num_cells)
    rows, drawn = [], []
    for scorer in NAMES:
        made = make_scorer(scorer_config(scorer), ranges)
        maps = made.maps(image, valid, grid)
        nodes = node_scores([m[None] for m in maps], grid)
        cut = leaves(splits_by_budget(nodes, budget, grid), nodes, grid)
        cells = scale_map(cut.scales, grid)
        seconds = best_seconds(lambda made=made: made.maps(image, valid, grid), repeats)
        drawn.append((scorer, maps[1], cells))
        rows.append(
            {
                "scene": name,
                "scorer": scorer,
                "tokens": int(cut.tokens.sum()),
                "of base cells": cut.tokens.sum() / grid.num_cells,
                "lost": lost_variance(unit, cells),
                "M pixel-bands/s": image.size / seconds / 1e6,
            }
        )
    uniform = np.full((grid.rows, grid.cols), 1)
    rows.append(
        {
            "scene": name,
            "scorer": f"uniform {2 * BASE} px",
            "tokens": grid.num_cells // 4,
            "of base cells": 0.25,
            "lost": lost_variance(unit, uniform),
        }
    )
    if pictures is not None:
        draw(pictures / f"{name}.png", image, valid, drawn)
    return rows


def draw(
    file: Path,
    image: np.ndarray,
    valid: np.ndarray,
    drawn: list[tuple[str, np.ndarray, np.ndarray]],
) -> None:
    """Two files. FILE: one column per scorer, its map of 8 px patches above, its quadtree (patch sizes
    as grays) below. FILE_image: the scene itself."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = image.shape[1] / image.shape[2]
    figure = Figure(figsize=(1.8 * len(drawn), 1.8 * shape * 2 + 0.4), layout="constrained")
    axes = figure.subplots(2, len(drawn))
    for column, (scorer, scores, cells) in enumerate(drawn):
        axes[0, column].imshow(scores, cmap="viridis", interpolation="nearest")
        axes[0, column].set_title(scorer, fontsize=9)
        axes[1, column].imshow(cells, cmap="gray", vmin=0, vmax=SCALES - 1, interpolation="nearest")
    for panel in axes.flat:
        panel.set_axis_off()
    figure.savefig(file, dpi=70)
    shown = [3, 2, 1] if len(image) >= 12 else [2, 1, 0] if len(image) == 4 else [0, 1, 2]
    imsave(file.with_stem(f"{file.stem}_image"), stretched(image[shown[: len(image)]], valid))


def main() -> None:
    args = arguments(__doc__, scenes=True, pictures=True)
    paths = args.scenes or []
    images = {p.stem: montage(p) if p.is_dir() else read(p) for p in paths} or {"chip": chip()}
    if args.quick:
        images = {name: image[:, :64, :64] for name, image in images.items()}
    rows = [
        row
        for name, image in images.items()
        for row in compare(name, image, 1 if args.quick else 3, args.pictures)
    ]
    report(rows, args.json)


if __name__ == "__main__":
    main()
