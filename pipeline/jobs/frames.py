"""The frames of one modality of a shard: gathered as tiles are read, then cut and encoded.

Pixels and validity are compressed frame by frame, and nothing else of them is kept; counts and score maps
are small, and wait until all frames are known.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.cut import leaves, partition_blocks, splits_by_budget, splits_by_thresholds
from pipeline.jobs.measures import Measures
from pipeline.jobs.reading import TilePixels
from pipeline.nodes import node_scores
from pipeline.scenes import Scene
from pipeline.scores import Scorer, countable, make_scorer
from pipeline.settings.config import ModalitySettings
from pipeline.storage.layout import StoreLayout
from pipeline.storage.partitions import DEFAULT_PARTITION, partition_path
from pipeline.storage.sharding import ShardEncoder, encoders


@dataclass(frozen=True)
class ModalityTask:
    """One modality of a shard. `frames` are its FRAME rows (`pipeline.planning.plan`), but `slot` counts
    from the shard's first and `tile` from its first tile; `scene` indexes `scenes`, whose numbers in the
    plan are `numbers`. `value_ranges` holds one (low, high) per scored plane."""

    settings: ModalitySettings
    layout: StoreLayout
    scored_bands: tuple[int, ...]
    value_ranges: tuple[tuple[float, float], ...]
    scenes: tuple[Scene, ...]
    numbers: tuple[int, ...]
    frames: np.ndarray


class ShardFrames:
    """What is stored of the frames of a shard, by slot; slots that are not put, or cleared, are empty."""

    def __init__(self, task: ModalityTask, measures: Measures) -> None:
        self._layout, self._name, self.measures = task.layout, task.settings.name, measures
        self._budget = task.settings.partition.tokens_per_tile
        self.num_slots = int(task.frames["slot"].max(initial=-1)) + 1
        specs = task.layout.arrays()
        self._encoders = encoders(specs, task.layout.codec)
        # All that is small; the partition is made when it is cut.
        self._blocks = {
            name: np.full((self.num_slots, *specs[name].shape[1:]), spec.fill_value, spec.dtype)
            for name, spec in specs.items()
            if name.startswith((f"{self._name}/num_", f"{self._name}/score_"))
        }
        grid = task.layout.grid
        self._occupied = np.zeros((self.num_slots, grid.rows, grid.cols), np.bool_)
        self._scorer: Scorer | None = None
        if task.settings.scoring is not None and task.layout.scored:
            self._least = task.settings.scoring.min_valid_fraction
            self._scorer = make_scorer(task.settings.scoring, task.value_ranges)

    def score(self, tile: TilePixels) -> list[np.ndarray]:
        """Score maps float32 [cell_y, cell_x] of one frame, fine to coarse."""
        assert self._scorer is not None
        with self.measures.timed("score"):
            grid = self._layout.grid
            counted = countable(np.ascontiguousarray(tile.valid), grid, self._least)
            return self._scorer.maps(np.ascontiguousarray(tile.scored), counted, grid)

    def put(self, slot: int, tile: TilePixels) -> None:
        """Fill a slot."""
        self._put_counts(slot, tile)
        if self._scorer is not None:
            maps = self.score(tile)
            for size, level_map in zip(self._layout.grid.patch_sizes, maps, strict=True):
                self._blocks[f"{self._name}/score_{size}"][slot] = level_map
            self._occupied[slot] = ~np.isnan(maps[0])
        elif self._layout.tokenized:
            self._occupied[slot] = _occupied(tile.valid, self._layout)
        if self._layout.tokenized:
            self._blocks[f"{self._name}/num_cells"][slot] = np.count_nonzero(self._occupied[slot])
        with self.measures.timed("write"):
            for band_set, part in zip(self._layout.band_sets, tile.sets, strict=True):
                end = band_set.suffix
                self._encoders[f"{self._name}/pixels{end}"].put(slot, part.pixels[None])
                self._encoders[f"{self._name}/valid{end}"].put(slot, part.valid[None])

    def clear(self, slots: np.ndarray) -> None:
        """Empty some slots."""
        specs = self._layout.arrays()
        for name, block in self._blocks.items():
            block[slots] = specs[name].fill_value
        for band_set in self._layout.band_sets:
            for slot in slots.tolist():
                self._encoders[f"{self._name}/pixels{band_set.suffix}"].drop(slot)
                self._encoders[f"{self._name}/valid{band_set.suffix}"].drop(slot)

    def score_maps(self, slots: np.ndarray) -> list[np.ndarray]:
        """Score maps float32 [frame, cell_y, cell_x] of the frames in some slots, fine to coarse."""
        sizes = self._layout.grid.patch_sizes
        return [self._blocks[f"{self._name}/score_{size}"][slots] for size in sizes]

    def valid_fraction(self, slots: np.ndarray) -> np.ndarray:
        """float64: share of valid pixels, of the first band set, of the frames in some slots."""
        pixels = self._layout.band_sets[0].tile_size_px ** 2
        return self._blocks[f"{self._name}/num_valid"][slots] / pixels

    def cut(self, thresholds: Mapping[int, list[float]]) -> None:
        """Cut the frames in the slots that have thresholds, fine to coarse; slots ascend."""
        if not self._layout.tokenized:
            return
        with self.measures.timed("partition"):
            grid, slots = self._layout.grid, np.array(list(thresholds), np.int64)
            if self._scorer is not None:
                maps = self.score_maps(slots)
            else:
                maps = [np.where(self._occupied[slots], np.float32(0), np.float32(np.nan))]
            nodes = node_scores(maps, grid)
            if self._budget is not None:
                splits = splits_by_budget(nodes, self._budget, grid)
            else:
                limits = np.array(list(thresholds.values()), np.float32)
                limits = limits.reshape(len(slots), grid.num_scales - 1)
                splits = splits_by_thresholds(nodes, limits, grid)
            group = partition_path(self._name, DEFAULT_PARTITION)
            cut = leaves(splits, nodes, grid)
            self._blocks |= partition_blocks(group, slots, cut, self.num_slots)

    def encoded(self) -> dict[str, ShardEncoder]:
        """Every array's object, ready to be written."""
        for name, block in self._blocks.items():
            self._encoders[name].put_leading(block)
        return self._encoders

    def _put_counts(self, slot: int, tile: TilePixels) -> None:
        counted = {"num_valid": tile.valid, "num_cloud": tile.cloud, "num_nodata": tile.nodata}
        for what, flags in counted.items():
            self._blocks[f"{self._name}/{what}"][slot] = np.count_nonzero(flags)


def _occupied(valid: np.ndarray, layout: StoreLayout) -> np.ndarray:
    """bool [cell_y, cell_x]: base cells with a valid pixel, from validity [y, x]."""
    grid, p = layout.grid, layout.grid.base_patch_size
    return np.asarray(valid.reshape(grid.rows, p, grid.cols, p).any(axis=(1, 3)))
