"""A limit on the tokens of a tile, so that one monster tile cannot blow memory.

A tile with more tokens keeps a random subset of its leaves; the others count as missing. Every modality
keeps the same share, rounded down, so that the number that is left follows from the manifest alone.
"""

import numpy as np

from model.data import draws
from model.packing import FrameArrays
from pipeline import segments


def limited(leaves: np.ndarray, costs: np.ndarray, limit: int) -> np.ndarray:
    """int64 [modality, tile]: the leaves that tiles keep of theirs.

    `leaves` int64 [modality, tile]; a leaf of modality `m` is `costs[m]` tokens, one per band set.
    """
    tokens = costs @ leaves
    return np.where(tokens > limit, leaves * limit // np.maximum(tokens, 1), leaves)


def drop_leaves(
    modalities: list[FrameArrays], tiles: np.ndarray, limit: int, draw: tuple[int, int]
) -> None:
    """Mark leaves of tiles with more than `limit` tokens as missing, in place.

    Which ones is a pure function of `draw`, (seed, epoch), and of the tile: `tiles` int64 [B] are rows of
    the manifest.
    """
    tile_of_leaf = [np.repeat(frames.tile, frames.counts) for frames in modalities]
    present = [np.flatnonzero(~segments.is_missing(frames.scales)) for frames in modalities]
    leaves = np.array(
        [
            np.bincount(owner[there], minlength=len(tiles))
            for owner, there in zip(tile_of_leaf, present, strict=True)
        ]
    )
    kept = limited(leaves, np.array([len(frames.band_sets) for frames in modalities]), limit)
    for frames, owner, there, had, keep in zip(
        modalities, tile_of_leaf, present, leaves, kept, strict=True
    ):
        if np.array_equal(had, keep):
            continue
        tile = owner[there]
        number = np.arange(len(there)) - (np.cumsum(had) - had)[tile]
        drawn = draws.uniform(*draw, (tiles[tile], number), f"token limit {frames.name}")
        order = np.lexsort((drawn, tile))
        # After sorting by tile, `number` is the rank of the draw.
        dropped = there[order][number >= keep[tile]]
        frames.scales[dropped] |= segments.MISSING_BIT
