"""What one worker needs of memory at most, from the plan alone."""

import math

import numpy as np

from pipeline.planning.plan import ModalityPlan, Plan
from pipeline.readers.rasters import GDAL_OPTIONS
from pipeline.storage.layout import StoreLayout

# Pixels read at once stay below this, whatever the width of the scene; a single tile may be larger.
WINDOW_BYTES = 128 * 2**20
# The interpreter with its libraries and compiled kernels, and what the allocator keeps of what was freed.
_PROCESS_BYTES = 320 * 2**20
# Per pixel of a window, bool masks at once: data, valid, cloud, nodata, and two in the making; and scores
# from outside, as read and as float64.
_MASKS, _SCORE_BYTES = 6, 16
# Copies of a frame while it is scored and compressed: itself, its bins, the packed one.
_FRAME_COPIES = 4
# Copies of a shard's float32 scores while it is cut: as stored, side by side, in storage order, packed.
_SCORE_COPIES = 4
# Zero borders at once, with the one that is being looked for; its regions are int32 per pixel of a window.
_BORDERS = 5


def worker_bytes(plan: Plan) -> int:
    """Upper bound of the memory of one worker process.

    A window of the largest modality, a compressed shard that did not become smaller, its scores, a few
    blocks, and GDAL's cache. The size of the scenes has no part in it, but for one bit per pixel where zero
    borders are looked for. Scenes that are resampled, and arrays with chunks larger than a window, take
    more.
    """
    cache = int(str(GDAL_OPTIONS["GDAL_CACHEMAX"]))
    return _PROCESS_BYTES + cache + max(_modality_bytes(m) for m in plan.modalities.values())


def window_bytes(layout: StoreLayout, scores_from_outside: bool) -> int:
    """Memory that one tile takes in a window."""
    beside = _MASKS + _SCORE_BYTES * scores_from_outside
    return layout.frame_bytes + layout.band_sets[0].tile_size_px ** 2 * beside


def _modality_bytes(modality: ModalityPlan) -> int:
    layout = modality.layout
    frame, pixels = layout.frame_bytes, sum(s.tile_size_px**2 for s in layout.band_sets)
    window = max(WINDOW_BYTES, frame)
    window_px = window * pixels // frame
    cells = layout.grid.num_cells * 4 // 3 if layout.tokenized else 0
    shard = layout.shard_capacity * (frame + pixels + _SCORE_COPIES * 4 * cells)
    read = _copies(modality) * window + _MASKS * window_px + _FRAME_COPIES * frame
    return read + shard + _block_bytes(modality) + _border_bytes(modality, window_px)


def _copies(modality: ModalityPlan) -> int:
    """How often the pixels of a window are held: as read, and as gathered, as shifted, as scored."""
    gathered = any(len(scene.assets) > len(modality.layout.band_sets) for scene in modality.scenes)
    shifted = any(scene.shift for scene in modality.scenes)
    return 1 + gathered + 2 * shifted + bool(modality.settings.scoring)


def _block_bytes(modality: ModalityPlan) -> int:
    """The largest block, as if all bands of its file lay in it, packed and decoded."""
    blocks = {
        (asset.block_shape, asset.dtype, len(asset.planes))
        for scene in modality.scenes
        for asset in scene.assets
    }
    return 2 * max(math.prod(s) * np.dtype(kind).itemsize * number for s, kind, number in blocks)


def _border_bytes(modality: ModalityPlan, window_px: int) -> int:
    if not modality.settings.config.zero_border:
        return 0
    largest = max(
        asset.shown_grid.height * asset.shown_grid.width
        for scene in modality.scenes
        for asset in scene.assets
    )
    return _BORDERS * largest // 8 + np.dtype(np.int32).itemsize * window_px
