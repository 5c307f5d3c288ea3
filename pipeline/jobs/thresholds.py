"""The thresholds of a scene: as configured, or from the scores of a sample of its tiles.

A large scene lies in many shards, and every one needs the whole sample: what of it lies in the shard is
scored anyway, and a worker remembers what it came to.
"""

import math
import pickle
from collections import OrderedDict
from dataclasses import replace

import numpy as np

from pipeline.jobs.frames import ModalityTask, ShardFrames
from pipeline.jobs.reading import SceneSource, scene_tiles, tiles_at
from pipeline.rules import (
    DEFAULT_QUANTILE,
    QUANTILE_SAMPLE_TILES,
    quantile_thresholds,
    sampled_tiles,
    uniform_thresholds,
)
from pipeline.scenes import Scene

_SCENES_KEPT = 256
# By everything that the thresholds of a scene depend on.
_known: OrderedDict[bytes, list[float]] = OrderedDict()


def scene_thresholds(
    modality: ModalityTask,
    scene: Scene,
    source: SceneSource,
    own: np.ndarray,
    gathered: ShardFrames,
    min_valid_fraction: float,
) -> list[float]:
    """The configured thresholds, or the scene's own from a sample of its tiles that are valid enough.

    `own` int [tile, (slot, row, col)] are the scene's tiles in this shard, gathered already. Empty under a
    token budget, and where nothing is scored. Raises SceneError if a tile elsewhere cannot be read.
    """
    rule = modality.settings.partition
    if modality.settings.scoring is None or rule.tokens_per_tile is not None:
        return []
    if rule.thresholds is not None:
        return list(rule.thresholds)
    if rule.uniform_px is not None:
        return uniform_thresholds(rule.uniform_px, rule.base_patch_size, rule.num_scales)
    num_rows, num_cols = scene_tiles(scene, source.layout)
    sample = sampled_tiles(num_rows, num_cols, QUANTILE_SAMPLE_TILES)
    slots, rows, cols = own.T
    numbers = np.where(cols < num_cols, rows * num_cols + cols, -1)
    elsewhere = np.setdiff1d(sample, numbers)
    here = slots[np.isin(numbers, sample)]
    if not len(elsewhere):
        return _quantiles(scene, source, here, elsewhere, gathered, min_valid_fraction)
    alone = replace(modality, scenes=(scene,), numbers=(), frames=np.empty(0))
    key = pickle.dumps((alone, min_valid_fraction))
    made = _known.get(key)
    if made is None:
        made = _quantiles(scene, source, here, elsewhere, gathered, min_valid_fraction)
        _known[key] = made
        if len(_known) > _SCENES_KEPT:
            _known.popitem(last=False)
    return list(made)


def _quantiles(
    scene: Scene,
    source: SceneSource,
    here: np.ndarray,
    elsewhere: np.ndarray,
    gathered: ShardFrames,
    min_valid_fraction: float,
) -> list[float]:
    """Quantiles of the scores of the frames in the slots `here` and of the tiles `elsewhere`."""
    rule = source.settings.partition
    here = here[gathered.valid_fraction(here) >= min_valid_fraction]
    maps = [gathered.score_maps(here)] if len(here) else []
    tiles = gathered.measures.reading(tiles_at(scene, source, elsewhere))
    maps += [gathered.score(tile) for tile in tiles if np.mean(tile.valid) >= min_valid_fraction]
    # Nothing is known of a scene without a usable tile, so nothing asks for a split.
    if not maps:
        return [math.inf] * (rule.num_scales - 1)
    return quantile_thresholds(maps, DEFAULT_QUANTILE if rule.quantile is None else rule.quantile)
