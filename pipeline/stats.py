"""Statistics: value ranges estimated from a sample, and the token table of a store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.errors import ArchiveError
from pipeline.partitions import DEFAULT_PARTITION
from pipeline.store import Store

# Percentiles of the valid pixels that bound an estimated value range: robust against a few
# saturated or dead pixels, wide enough to tell the rest apart.
RANGE_PERCENTILES = (1.0, 99.0)
TOKEN_PERCENTILES = (10, 50, 90)


def value_ranges_of(samples: Sequence[np.ndarray]) -> tuple[tuple[float, float], ...]:
    """(low, high) per band from samples of valid pixels, each [band, pixel].

    The 1st and 99th percentile; a constant band gets a range of width 1 from its value on.
    """
    pixels = np.concatenate(samples, axis=1)
    if pixels.shape[1] == 0:
        raise ArchiveError(
            "no valid pixel in the sampled tiles, so no value range can be estimated; give "
            "modality.value_range, or check modality.nodata"
        )
    low, high = np.percentile(pixels.astype(np.float64), RANGE_PERCENTILES, axis=1)
    high = np.where(high > low, high, low + 1.0)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


def configured_ranges(config: DataConfig, num_bands: int) -> tuple[tuple[float, float], ...] | None:
    """The configured (low, high) of every band, or None if they are to be estimated."""
    ranges = config.modality.value_ranges()
    if ranges is None:
        return None
    return ranges * num_bands if len(ranges) == 1 else ranges


@dataclass(frozen=True)
class TokenTable:
    """Token counts of the tiles of one modality of a store under one of its partitions.

    `tokens` int64 [tile, scale] counts tokens by patch size, fine to coarse; `base_cells` int64
    [tile] counts base cells with a valid pixel: the tokens of the uniform base grid;
    `valid_fraction` float64 [tile] lies in [0, 1].
    """

    modality: str
    partition: str
    tile_ids: list[str]
    patch_sizes: tuple[int, ...]
    tokens: np.ndarray
    base_cells: np.ndarray
    valid_fraction: np.ndarray

    def summary(self) -> dict[str, Any]:
        """The table in numbers a program can use; fractions in [0, 1], None where nothing counts."""
        per_tile = self.tokens.sum(axis=1)
        by_size = self.tokens.sum(axis=0)
        area = by_size * 4 ** np.arange(by_size.size)
        total, uniform = int(per_tile.sum()), int(self.base_cells.sum())
        return {
            "modality": self.modality,
            "partition": self.partition,
            "tiles": len(self.tile_ids),
            "tokens": total,
            "uniform_base_tokens": uniform,
            "token_ratio": _share(total, uniform),
            "tokens_per_tile": _spread(per_tile),
            "valid_fraction": float(self.valid_fraction.mean()) if self.tile_ids else None,
            "patch_sizes": [
                {
                    "size_px": size,
                    "tokens": int(by_size[scale]),
                    "share_of_tokens": _share(by_size[scale], total),
                    "share_of_area": _share(area[scale], area.sum()),
                }
                for scale, size in enumerate(self.patch_sizes)
            ],
        }

    def select(self, tiles: Sequence[int]) -> "TokenTable":
        """The same table for some of the tiles."""
        return TokenTable(
            self.modality,
            self.partition,
            [self.tile_ids[tile] for tile in tiles],
            self.patch_sizes,
            self.tokens[tiles],
            self.base_cells[tiles],
            self.valid_fraction[tiles],
        )


def token_table(store: Store, modality: str, partition: str = DEFAULT_PARTITION) -> TokenTable:
    """Token counts of every committed tile, from the manifest or the partition's own table."""
    num_scales = store.layouts[modality].grid.num_scales
    column = store.manifest[modality].combine_chunks()
    if partition == DEFAULT_PARTITION:
        tokens = column.field("tokens").flatten().to_numpy().reshape(-1, num_scales)
    else:
        starts = column.field("frame_start").to_numpy()
        frames = column.field("num_frames").to_numpy()
        tokens = _per_tile(store.partition(partition, modality).tokens, starts, frames)
    return TokenTable(
        modality=modality,
        partition=partition,
        tile_ids=store.manifest["id"].to_pylist(),
        patch_sizes=store.layouts[modality].grid.patch_sizes,
        tokens=tokens,
        base_cells=column.field("base_cells").to_numpy(),
        valid_fraction=column.field("valid_fraction").to_numpy(),
    )


def _per_tile(tokens: np.ndarray, starts: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """int64 [tile, scale] from int32 [frame, scale] of all frame slots."""
    until = np.concatenate([np.zeros((1, tokens.shape[1]), np.int64), np.cumsum(tokens, axis=0)])
    return until[starts + num_frames] - until[starts]


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if values.size == 0:
        return None
    marks = {f"p{p}": float(np.percentile(values, p)) for p in TOKEN_PERCENTILES}
    return {
        "min": float(values.min()),
        **marks,
        "max": float(values.max()),
        "mean": float(values.mean()),
    }
