"""Padding: what is lost when tiles of unequal token counts share a batch, and what planning costs.

Token counts are those of 128 px crops, at every root, of real scenes whose quadtrees have one set of
thresholds, the median score of each patch size over all scenes; an archive is drawn from them. `waste` is
the share of the tokens that a batch has room for, as the encoder sees it, that stand for nothing; `largest`
is the largest batch, padding included, over the mean one: it decides the memory. All have the same number
of tiles per batch on average:

- `pad to longest`: random tiles, padded to the longest of the batch
- `length buckets`: 8 buckets of about equal lengths, batches from one bucket, padded to their longest
- `sorted in 50 batches`: random tiles of 50 batches, sorted by length, cut, padded to the longest
- `packed as they come`: random tiles until the next one would exceed the budget
- `packed by plan`: `model.data.plan`

Then plans of 10 million tiles with such counts: seconds to plan an epoch (CPU seconds are the wall time of
a machine that does nothing else), the peak of the memory beyond the counts themselves, milliseconds to the
first step and to the next one. Limits: 2 s, 1 GiB, 50 ms.

Without --scenes it takes the real Sentinel-2 chip of the package spyndex. With --pictures FOLDER it draws
`padding.png`.
"""

import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from common import arguments, chip, read, report
from model.data.plan import BatchPlan
from pipeline import segments
from pipeline.bandstats import BandStats
from pipeline.cut import leaves, splits_by_thresholds
from pipeline.grid import BaseGrid
from pipeline.jobs.prepare import RANGE_PERCENTILES
from pipeline.nodes import level_offsets, node_scores
from pipeline.scores import make_scorer, scorer_config

BASE, SCALES, TILE = 4, 3, 128
ROOT = BASE << (SCALES - 1)
BATCHES = (8, 32, 128)
BUCKETS, SORTED_BATCHES = 8, 50
BUDGETS = (16384, 65536, 262144)


def value_ranges(images: list[np.ndarray]) -> list[tuple[float, float]]:
    pixels = np.concatenate([image.reshape(len(image), -1) for image in images], axis=1)
    return BandStats.of(pixels).value_ranges(*RANGE_PERCENTILES)


def scene_nodes(
    image: np.ndarray, ranges: list[tuple[float, float]]
) -> tuple[BaseGrid, np.ndarray]:
    """The grid of a scene cut to whole roots, and its scores [1, node]."""
    height, width = (size // ROOT * ROOT for size in image.shape[1:])
    image = np.ascontiguousarray(image[:, :height, :width])
    grid = BaseGrid(height // BASE, width // BASE, BASE, SCALES)
    scorer = make_scorer(scorer_config("entropy"), ranges)
    maps = scorer.maps(image, np.ones(image.shape[1:], np.bool_), grid)
    return grid, node_scores([scores[None] for scores in maps], grid)


def crop_counts(grid: BaseGrid, nodes: np.ndarray, thresholds: list[float], px: int) -> np.ndarray:
    """int64 [crop]: tokens of every crop of `px` that begins at a root."""
    scales = leaves(splits_by_thresholds(nodes, thresholds, grid), nodes, grid).scales
    tokens = np.empty(grid.num_cells)
    levels = segments.levels(scales).astype(float)
    tokens[grid.storage_order] = np.repeat(4.0**-levels, segments.run_lengths(scales))
    side = ROOT // BASE
    roots = tokens.reshape(grid.rows // side, side, grid.cols // side, side).sum((1, 3))
    windows = np.lib.stride_tricks.sliding_window_view(roots, (px // ROOT, px // ROOT))
    return np.round(windows.sum((2, 3))).astype(np.int64).ravel()


def real_counts(images: dict[str, np.ndarray], px: int) -> dict[str, np.ndarray]:
    """Per scene. All share the thresholds, and scenes of as many bands the value ranges."""
    nodes = {}
    for name, image in images.items():
        alike = [other for other in images.values() if len(other) == len(image)]
        nodes[name] = scene_nodes(image, value_ranges(alike))
    thresholds = []
    for level in range(1, SCALES):
        scores = []
        for grid, of_scene in nodes.values():
            offsets = level_offsets(grid)
            scores.append(of_scene[0, offsets[level] : offsets[level + 1]])
        thresholds.append(float(np.nanmedian(np.concatenate(scores))))
    return {
        name: crop_counts(grid, of_scene, thresholds, px)
        for name, (grid, of_scene) in nodes.items()
    }


def padded(batches: Iterator[np.ndarray]) -> tuple[float, float]:
    """Waste, and the largest over the mean batch, when each is padded to its longest tile."""
    sizes, used = np.array([(b.size * b.max(), b.sum()) for b in batches]).T
    return 1 - used.sum() / sizes.sum(), sizes.max() / sizes.mean()


def cut(order: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    return (order[i : i + batch] for i in range(0, order.size // batch * batch, batch))


def bucketed(order: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    edges = np.quantile(order, np.arange(1, BUCKETS) / BUCKETS)
    bucket = np.searchsorted(edges, order)
    for number in range(BUCKETS):
        yield from cut(order[bucket == number], batch)


def sorted_in_some(order: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for some in cut(order, min(order.size, SORTED_BATCHES * batch)):
        yield from cut(np.sort(some), batch)


def packed(counts: np.ndarray, budget: int, shuffle: bool) -> tuple[float, float]:
    """Waste and largest batch under the plan; what is not filled counts as waste."""
    plan = BatchPlan(counts, batch_tokens=budget, shuffle=shuffle).epoch(0)
    sizes = [int(counts[plan.tiles(step)].sum()) for step in range(plan.num_steps)]
    return 1 - counts.sum() / budget / plan.num_steps, max(sizes) / float(np.mean(sizes))


def wastes(counts: np.ndarray, num_tiles: int) -> list[dict[str, object]]:
    order = np.random.default_rng(0).choice(counts, num_tiles)
    rows: list[dict[str, object]] = []
    for batch in BATCHES:
        budget = max(round(batch * order.mean()), int(order.max()))
        methods = {
            "pad to longest": padded(cut(order, batch)),
            "length buckets": padded(bucketed(order, batch)),
            f"sorted in {SORTED_BATCHES} batches": padded(sorted_in_some(order, batch)),
            "packed as they come": packed(order, budget, False),
            "packed by plan": packed(order, budget, True),
        }
        for name, (waste, largest) in methods.items():
            row = {"batches": name, "tiles per batch": batch}
            rows.append(row | {"waste": float(waste), "largest": float(largest)})
    return rows


def planning(counts: np.ndarray, num_tiles: int) -> list[dict[str, object]]:
    order = np.random.default_rng(0).choice(counts, num_tiles)
    rows = []
    for batch in [*({"batch_tokens": budget} for budget in BUDGETS), {"batch_tiles": 64}]:
        begin, used = time.perf_counter(), time.process_time()
        plan = BatchPlan(order, **batch).epoch(0)
        used = time.process_time() - used
        planned = time.perf_counter()
        plan.tiles(plan.num_steps // 2)
        first = time.perf_counter()
        plan.tiles(plan.num_steps // 2 + 1)
        following = time.perf_counter()
        row = {"plan": f"{num_tiles} tiles, {next(iter(batch))} {next(iter(batch.values()))}"}
        row |= {
            "seconds": planned - begin,
            "CPU seconds": used,
            "first step, ms": 1e3 * (first - planned),
        }
        row |= {"next step, ms": 1e3 * (following - first)}
        if "batch_tokens" in batch:
            row["fill"] = float(order.sum()) / plan.num_steps / batch["batch_tokens"]
        del plan
        tracemalloc.start()
        BatchPlan(order, **batch).epoch(0)
        row["peak, GiB"] = tracemalloc.get_traced_memory()[1] / 2**30
        tracemalloc.stop()
        rows.append(row)
    return rows


def draw(file: Path, counts: dict[str, np.ndarray], rows: list[dict[str, object]]) -> None:
    """Left: how many tokens the tiles of every scene have. Right: the waste of every kind of batch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    edges = np.linspace(0, max(c.max() for c in counts.values()), 33)
    weights = [np.full(c.size, 1 / c.size / len(counts)) for c in counts.values()]
    colors = [f"C{i}" for i in range(len(counts))]
    left.hist(
        list(counts.values()),
        edges,
        weights=weights,
        stacked=True,
        color=colors,
        label=list(counts),
    )
    left.set_xlabel(f"tokens of a tile of {TILE} px (grid of {BASE} px: {(TILE // BASE) ** 2})")
    left.set_ylabel("share of tiles")
    left.legend(fontsize=8, frameon=False)
    methods = list(dict.fromkeys(str(row["batches"]) for row in rows))
    for i, batch in enumerate(BATCHES):
        waste = [row["waste"] for row in rows if row["tiles per batch"] == batch]
        places = np.arange(len(methods)) + (i - 1) * 0.27
        shade = ("#9ecae1", "#4292c6", "#08519c")[i]
        bars = right.bar(places, waste, 0.25, color=shade, label=f"{batch} tiles per batch")
        right.bar_label(bars, [f"{100 * w:.1f}" for w in waste], fontsize=6.5, padding=1)
    right.set_xticks(range(len(methods)), [name.replace(" ", "\n", 1) for name in methods])
    right.tick_params(axis="x", labelsize=8)
    right.set_ylabel("padding, share of the batch")
    right.legend(fontsize=8, frameon=False)
    for panel in (left, right):
        panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    args = arguments(__doc__, scenes=True, pictures=True)
    images = {path.stem: read(path) for path in args.scenes or []} or {"chip": chip()}
    counts = real_counts(images, 64 if args.quick else TILE)
    # Scenes weigh the same, whatever their size.
    equal = np.concatenate([np.resize(c, 10_000) for c in counts.values()])
    rows = wastes(equal, 3_000 if args.quick else 100_000)
    if args.pictures is not None:
        draw(args.pictures / "padding.png", counts, rows)
    report(rows + planning(equal, 100_000 if args.quick else 10_000_000), args.json)


if __name__ == "__main__":
    main()
