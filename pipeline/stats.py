"""Statistics: the token table of a store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.storage.tiles import expand
from pipeline.store import Store

TOKEN_PERCENTILES = (10, 50, 90)


@dataclass(frozen=True)
class TokenTable:
    """Token counts of the tiles of one modality of a store under one of its partitions.

    `tokens` int64 [tile, scale] counts tokens by patch size, fine to coarse; `base_cells` int64
    [tile] counts base cells with a valid pixel: the tokens of the uniform base grid. `frames` and
    `missing` int64 [tile] count timesteps that are there and that are not; `valid_fraction`,
    `cloud_fraction` and `nodata_fraction` float64 [frame] of all frames that are there lie in [0, 1].
    """

    modality: str
    partition: str
    tile_ids: list[str]
    patch_sizes: tuple[int, ...]
    tokens: np.ndarray
    base_cells: np.ndarray
    frames: np.ndarray
    missing: np.ndarray
    valid_fraction: np.ndarray
    cloud_fraction: np.ndarray
    nodata_fraction: np.ndarray

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
            "frames": int(self.frames.sum()),
            "missing_frames": int(self.missing.sum()),
            "valid_fraction": _mean(self.valid_fraction),
            "cloud_fraction": _mean(self.cloud_fraction),
            "nodata_fraction": _mean(self.nodata_fraction),
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
        chosen = np.asarray(tiles, np.int64)
        first = np.cumsum(self.frames) - self.frames
        entries = expand(first[chosen], self.frames[chosen])
        return TokenTable(
            self.modality,
            self.partition,
            [self.tile_ids[tile] for tile in tiles],
            self.patch_sizes,
            self.tokens[tiles],
            self.base_cells[tiles],
            self.frames[tiles],
            self.missing[tiles],
            *(
                part[entries]
                for part in (self.valid_fraction, self.cloud_fraction, self.nodata_fraction)
            ),
        )


def token_table(store: Store, modality: str, partition: str = DEFAULT_PARTITION) -> TokenTable:
    """Token counts of every committed tile, from the manifest or the partition's own table."""
    num_scales = store.layouts[modality].grid.num_scales
    column = store.manifest[modality].combine_chunks()
    table = store.frame_table(modality)
    if partition == DEFAULT_PARTITION:
        tokens = column.field("tokens").flatten().to_numpy().reshape(-1, num_scales)
    else:
        of_frames = store.partition(partition, modality).tokens[table.slots].astype(np.int64)
        until = np.concatenate([np.zeros((1, num_scales), np.int64), np.cumsum(of_frames, axis=0)])
        tokens = until[table.starts[1:]] - until[table.starts[:-1]]
    steps = pc.list_value_length(column.field("frames")).to_numpy()
    fractions = {
        what: column.field(f"{what}_fraction").flatten().drop_null().to_numpy()
        for what in ("valid", "cloud", "nodata")
    }
    return TokenTable(
        modality=modality,
        partition=partition,
        tile_ids=store.manifest["id"].to_pylist(),
        patch_sizes=store.layouts[modality].grid.patch_sizes,
        tokens=tokens,
        base_cells=column.field("base_cells").to_numpy(),
        frames=table.per_tile,
        missing=steps - table.per_tile,
        **{f"{what}_fraction": values for what, values in fractions.items()},
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


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
