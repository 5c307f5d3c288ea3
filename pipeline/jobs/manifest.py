"""The manifest: a GeoParquet table with one row per committed tile."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.georef import ground_sample_distance
from pipeline.planning.plan import ModalityPlan, Plan
from pipeline.planning.tilefacts import TileFacts

MISSING_SCENE = "no scene"
MISSING_QUARANTINED = "quarantined"
MISSING_LEFT_OUT = "too few valid pixels"
_REASONS = (MISSING_SCENE, MISSING_QUARANTINED, MISSING_LEFT_OUT)
_GEO_METADATA = {
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}},
}


@dataclass(frozen=True)
class ModalityOutcome:
    """What became of the frames of one modality.

    `lost` bool [scene] are quarantined scenes and `left_out` int64 slots of frames with too few valid
    pixels. `counts` holds per frame slot `num_valid`, `num_cloud`, `num_nodata` (int32) and, for modalities
    with tokens, `num_cells` and `tokens` [frame, scale]. `thresholds` are by scene, in the plan's order,
    None where nothing was cut.
    """

    lost: np.ndarray
    left_out: np.ndarray
    counts: dict[str, np.ndarray]
    thresholds: Sequence[list[float] | None]


def manifest_table(
    plan: Plan, outcomes: dict[str, ModalityOutcome], kept: np.ndarray, facts: TileFacts
) -> pa.Table:
    """The rows of a batch; `kept` int64 are its committed tiles, `facts` columns of those."""
    at = plan.tiles[kept]
    stack = pa.array(at["stack"])
    shapes = np.array([stack.shape_tiles(plan.config.store.tile_size_px) for stack in plan.stacks])
    times = [_timestamps(stack.datetimes) for stack in plan.stacks]
    place = pa.array([stack.name for stack in plan.stacks], pa.string()).take(stack)
    columns = {
        "id": _tile_ids(place, at),
        "place": place,
        "row": pa.array(at["row"], pa.int32()),
        "col": pa.array(at["col"], pa.int32()),
        "place_rows": pa.array(shapes[at["stack"], 0], pa.int32()),
        "place_cols": pa.array(shapes[at["stack"], 1], pa.int32()),
        "datetimes": pa.array(times, pa.list_(pa.timestamp("s", "UTC"))).take(stack),
        "geometry": pa.array(facts.geometry, pa.binary()),
        "crs": pa.array([stack.grid.crs for stack in plan.stacks], pa.string()).take(stack),
        "bounds": pa.FixedSizeListArray.from_arrays(
            pa.array(facts.bounds.ravel(), from_pandas=True),
            4,
            mask=pa.array(np.isnan(facts.bounds[:, 0])),
        ),
        "label": pa.array(facts.labels, pa.string()),
        "split": pa.array(facts.splits, pa.string()),
    }
    for name, modality in plan.modalities.items():
        columns[name] = _modality_column(plan, modality, outcomes[name], kept)
    return pa.table(columns)


def encode_manifest(table: pa.Table) -> bytes:
    """The manifest's bytes."""
    table = table.replace_schema_metadata({"geo": json.dumps(_GEO_METADATA, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def manifest_name(batch: int) -> str:
    """Where the manifest that a batch brought is kept."""
    return f"manifest/{batch:06d}.parquet"


def present_frames(
    plan: Plan, name: str, outcome: ModalityOutcome
) -> tuple[np.ndarray, np.ndarray]:
    """FRAME rows of all planned frames of a modality, in tile order, and bool which are in the store."""
    frames = plan.frames(name, range(len(plan.tiles)))
    return frames, ~outcome.lost[frames["scene"]] & ~np.isin(frames["slot"], outcome.left_out)


def _modality_column(
    plan: Plan, modality: ModalityPlan, outcome: ModalityOutcome, kept: np.ndarray
) -> pa.StructArray:
    """One struct per tile. Its lists have one entry per timestep (one in all for static modalities)."""
    steps = np.array([len(stack.scenes[modality.name]) for stack in plan.stacks], np.int64)
    per_tile = steps[plan.tiles["stack"][kept]]
    starts = np.concatenate([[0], np.cumsum(per_tile)])
    frames, present = present_frames(plan, modality.name, outcome)
    position = np.full(len(plan.tiles), -1, np.int64)
    position[kept] = np.arange(len(kept))
    own = position[frames["tile"]] >= 0
    frames, present = frames[own], present[own]
    entry = starts[position[frames["tile"]]] + frames["timestep"]
    lists = _Lists(starts, entry, present)

    why = np.full(starts[-1], _REASONS.index(MISSING_SCENE), np.int8)
    why[entry] = np.where(
        outcome.lost[frames["scene"]],
        _REASONS.index(MISSING_QUARANTINED),
        _REASONS.index(MISSING_LEFT_OUT),
    )
    there = np.zeros(starts[-1], np.bool_)
    there[entry[present]] = True
    missing = pa.array(_REASONS, pa.string()).take(pa.array(why, mask=there))
    slots, scene = frames["slot"], frames["scene"]
    scene_ids = pa.array([scene.id for scene in modality.scenes], pa.string())
    pixels = modality.layout.band_sets[0].tile_size_px ** 2
    fields = {
        "frames": lists.numbers(slots, pa.int64()),
        "missing": pa.ListArray.from_arrays(pa.array(starts, pa.int32()), missing),
        "scene_ids": lists.chosen(scene_ids, scene),
        **{
            f"{what}_fraction": lists.numbers(
                outcome.counts[f"num_{what}"][slots] / pixels, pa.float64()
            )
            for what in ("valid", "cloud", "nodata")
        },
        "ground_sample_distance_m": _distances(plan, modality, kept),
    }
    if modality.layout.tokenized:
        cells, tokens = outcome.counts["num_cells"][slots], outcome.counts["tokens"][slots]
        fields["base_cells"] = pa.array(lists.sums(cells).astype(np.int64))
        fields["tokens"] = pa.FixedSizeListArray.from_arrays(
            pa.array(lists.sums(tokens).astype(np.int64).ravel()), modality.layout.grid.num_scales
        )
        thresholds = pa.array(outcome.thresholds, pa.list_(pa.float32()))
        fields["thresholds"] = lists.chosen(thresholds, scene)
    return pa.StructArray.from_arrays(list(fields.values()), list(fields))


class _Lists:
    """Builds list columns with one entry per timestep, null where a frame is missing."""

    def __init__(self, starts: np.ndarray, entry: np.ndarray, present: np.ndarray) -> None:
        self.starts, self.entry, self.present = starts, entry[present], present

    def numbers(self, values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
        """From one number per planned frame."""
        flat = np.zeros(self.starts[-1], values.dtype)
        absent = np.ones(len(flat), np.bool_)
        flat[self.entry], absent[self.entry] = values[self.present], False
        return pa.ListArray.from_arrays(
            pa.array(self.starts, pa.int32()), pa.array(flat, kind, mask=absent)
        )

    def chosen(self, values: pa.Array, which: np.ndarray) -> pa.ListArray:
        """From one of the values, by position, per planned frame."""
        at = self.numbers(which, pa.int32())
        return pa.ListArray.from_arrays(at.offsets, values.take(at.values))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[tile, ...]: sums over each tile's present frames of values [planned frame, ...]."""
        flat = np.zeros((self.starts[-1] + 1, *values.shape[1:]), np.int64)
        flat[self.entry + 1] = values[self.present]
        until = np.cumsum(flat, axis=0)
        return until[self.starts[1:]] - until[self.starts[:-1]]


def _distances(plan: Plan, modality: ModalityPlan, kept: np.ndarray) -> pa.Array:
    """Metres per pixel of the first band set, per tile; null where nothing says."""
    configured = modality.settings.config.ground_sample_distance_m
    ratio = plan.config.store.tile_size_px / modality.layout.band_sets[0].tile_size_px
    by_stack = []
    for stack in plan.stacks:
        leading = ground_sample_distance(stack.grid)
        by_stack.append(configured or (None if leading is None else leading * ratio))
    return pa.array(by_stack, pa.float64()).take(pa.array(plan.tiles["stack"][kept]))


def _tile_ids(place: pa.Array, tiles: np.ndarray) -> pa.Array:
    """`Plan.tile_id` of all tiles at once."""
    row, col = (pa.array(tiles[name]).cast(pa.string()) for name in ("row", "col"))
    return pc.binary_join_element_wise(place, "/r", row, "c", col, "")


def _timestamps(datetimes: Sequence[str | None]) -> list[datetime | None]:
    return [None if when is None else datetime.fromisoformat(when) for when in datetimes]
