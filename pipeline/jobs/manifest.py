"""The manifest: a GeoParquet table with one row per committed tile."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pipeline.archive import lonlat_corners, native_corners
from pipeline.layout import StoreLayout
from pipeline.plan import Plan

_GEO_METADATA = {
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"]}},
}


@dataclass(frozen=True)
class FrameCounts:
    """Per frame slot: valid pixels, base cells with a valid pixel, tokens [frame, scale] (all int32)."""

    num_valid: np.ndarray
    num_cells: np.ndarray
    tokens: np.ndarray


def encode_manifest(
    plan: Plan,
    layout: StoreLayout,
    committed: np.ndarray,
    counts: FrameCounts,
    thresholds: dict[str, list[float]],
) -> bytes:
    """The manifest's bytes.

    `committed` int64 [row] are the tiles (indices into `plan.tiles`) that readers get;
    `thresholds` are given by scene id.
    """
    tiles = plan.tiles[committed]
    frames = committed.astype(np.int64)  # a tile has one frame, and slots follow the plan's order
    scenes = [plan.scenes[index] for index in tiles["scene"]]
    geometry, bounds = _footprints(plan, tiles)
    table = pa.table(
        {
            "id": [plan.tile_id(tile) for tile in tiles],
            "scene_ids": pa.array([[scene.id] for scene in scenes], pa.list_(pa.string())),
            "row": pa.array(tiles["row"], pa.int32()),
            "col": pa.array(tiles["col"], pa.int32()),
            "geometry": pa.array(geometry, pa.binary()),
            "crs": pa.array([scene.crs for scene in scenes], pa.string()),
            "bounds": pa.array(bounds, pa.list_(pa.float64(), 4)),
            layout.modality: pa.array(
                [
                    {
                        "frame_start": frame,
                        "num_frames": 1,
                        "base_cells": counts.num_cells[frame],
                        "tokens": counts.tokens[frame],
                        "thresholds": thresholds[scene.id],
                        "valid_fraction": counts.num_valid[frame] / layout.grid.shape_px[0] ** 2,
                        "ground_sample_distance_m": scene.ground_sample_distance_m,
                    }
                    for frame, scene in zip(frames.tolist(), scenes, strict=True)
                ],
                _modality_type(layout.grid.num_scales),
            ),
        }
    )
    table = table.replace_schema_metadata({"geo": json.dumps(_GEO_METADATA, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _modality_type(num_scales: int) -> pa.DataType:
    return pa.struct(
        [
            pa.field("frame_start", pa.int64(), nullable=False),
            pa.field("num_frames", pa.int32(), nullable=False),
            pa.field("base_cells", pa.int64(), nullable=False),
            pa.field("tokens", pa.list_(pa.int64(), num_scales), nullable=False),
            pa.field("thresholds", pa.list_(pa.float32()), nullable=False),
            pa.field("valid_fraction", pa.float64(), nullable=False),
            pa.field("ground_sample_distance_m", pa.float64()),
        ]
    )


def _footprints(
    plan: Plan, tiles: np.ndarray
) -> tuple[list[bytes | None], list[list[float] | None]]:
    """WKB polygon in longitude and latitude, and (xmin, ymin, xmax, ymax) in the CRS, per tile.

    Both cover the part of the tile inside its scene; None where the scene has no CRS.
    """
    tile_px = plan.config.store.tile_size_px
    geometry: list[Any] = [None] * len(tiles)
    bounds: list[Any] = [None] * len(tiles)
    for index in np.unique(tiles["scene"]).tolist():
        scene = plan.scenes[index]
        if scene.crs is None:
            continue
        rows = np.flatnonzero(tiles["scene"] == index)
        top, left = tiles["row"][rows] * tile_px, tiles["col"][rows] * tile_px
        bottom = np.minimum(top + tile_px, scene.height)
        right = np.minimum(left + tile_px, scene.width)
        ring = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1)
        corners = ring.reshape(-1, 2).astype(np.float64)
        native = native_corners(scene, corners).reshape(-1, 4, 2)
        lonlat = lonlat_corners(scene, corners)
        assert lonlat is not None
        # GeoParquet wants the outer ring counter-clockwise.
        polygons = shapely.orient_polygons(shapely.polygons(lonlat.reshape(-1, 4, 2)))
        for row, wkb, low, high in zip(
            rows.tolist(), shapely.to_wkb(polygons), native.min(1), native.max(1), strict=True
        ):
            geometry[row], bounds[row] = wkb, [*low.tolist(), *high.tolist()]
    return geometry, bounds
