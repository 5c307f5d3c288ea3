"""A plan in words and numbers: what was decided, and why; for `aptile preprocess --dry-run`."""

from collections import Counter
from typing import Any

import numpy as np

from pipeline.planning.inputs import Job
from pipeline.planning.plan import ModalityPlan, frames_per_stack
from pipeline.planning.splits import split_summary
from pipeline.rules import rule_entry, rule_in_words
from pipeline.scenes import Scene
from pipeline.settings.canonical import plain


def explain(job: Job) -> dict[str, Any]:
    """Everything `--dry-run --json` prints.

    `inputs = planned + refused + skipped`, of every modality and in all. Frames are counted over all tiles;
    `missing` are timesteps of tiles for which a modality has no scene.
    """
    plan = job.plan
    return {
        "archive": job.archive,
        "inputs": job.num_inputs,
        "planned": job.num_inputs - len(job.refused) - len(job.skipped),
        "refused": job.refused,
        "skipped": job.skipped,
        "places": len(plan.stacks),
        "place_examples": [_place(job, index) for index in range(min(3, len(plan.stacks)))],
        "modalities": {name: _modality(job, plan.modalities[name]) for name in plan.modalities},
        "tiles": len(plan.tiles),
        "tile_size_px": plan.config.store.tile_size_px,
        "shards": plan.num_shards,
        "tiles_per_shard": plan.shard_tiles,
        "splits": split_summary(job.facts.splits) if plan.config.splits else {},
        "labels": _classes(job) if plan.config.labels else {},
        "notes": [
            *job.notes,
            *(job.facts.notes if plan.config.labels or plan.config.splits else ()),
        ],
        "config_digest": plan.config.digest(),
    }


def _classes(job: Job) -> dict[str, int]:
    counts = Counter(label or "none" for label in job.facts.labels)
    return dict(sorted(counts.items()))


def in_words(content: dict[str, Any]) -> list[str]:
    """The same as lines of text."""
    lines = [
        f"{content['archive']}: {content['inputs']} inputs = {content['planned']} planned + "
        f"{len(content['refused'])} refused + {len(content['skipped'])} skipped",
        f"{content['places']} places, {content['tiles']} tiles of {content['tile_size_px']} px in "
        f"{content['shards']} shards of up to {content['tiles_per_shard']} tiles",
    ]
    lines += [
        f"place {p['name']}: {p['grid']}; {_dates(p['datetimes'])}"
        for p in content["place_examples"]
    ]
    for name, modality in content["modalities"].items():
        lines += _modality_in_words(name, modality)
    for what in ("splits", "labels"):
        counts = ", ".join(f"{name} {number}" for name, number in content[what].items())
        lines += [f"{what} of tiles: {counts}"] if counts else []
    lines += [f"note: {note}" for note in content["notes"]]
    for word in ("refused", "skipped"):
        lines += [f"{word} {scene}: {reason}" for scene, reason in content[word].items()]
    return lines


def _place(job: Job, index: int) -> dict[str, Any]:
    stack = job.plan.stacks[index]
    return {"name": stack.name, "grid": stack.grid.in_words(), "datetimes": list(stack.datetimes)}


def _dates(datetimes: list[str | None]) -> str:
    known = [when for when in datetimes if when is not None]
    if not known:
        return "no date"
    return f"{len(known)} dates from {known[0]} to {known[-1]}" if len(known) > 1 else known[0]


def _modality(job: Job, modality: ModalityPlan) -> dict[str, Any]:
    plan, name, settings = job.plan, modality.name, modality.settings
    tiles_of = np.bincount(plan.tiles["stack"], minlength=len(plan.stacks))
    steps = np.array([len(stack.scenes[name]) for stack in plan.stacks])
    frames = int((tiles_of * frames_per_stack(plan.stacks, name)).sum())
    return {
        "inputs": len(job.inputs[name]),
        "scenes": len({scene.id for scene in modality.scenes}),
        "frames": frames,
        "missing_frames": int((tiles_of * steps).sum()) - frames,
        "band_sets": [
            {"bands": list(s.bands), "dtype": s.dtype, "tile_size_px": s.tile_size_px}
            for s in modality.layout.band_sets
        ],
        "patch_sizes": list(modality.layout.grid.patch_sizes) if not settings.is_label else [],
        "scorer": settings.scoring.scorer if settings.scoring else None,
        "scored_bands": [modality.layout.bands[band] for band in modality.scored_bands],
        "rule": plain(rule_entry(settings.partition)) if settings.scoring else None,
        "scale": modality.scale,
        "offset": modality.offset,
        "shifted_scenes": dict(
            sorted(Counter(str(s.shift) for s in modality.scenes if s.shift).items())
        ),
        "value_range": _range(modality),
        "resampled_scenes": _resampled(modality.scenes),
    }


def _range(modality: ModalityPlan) -> Any:
    """Configured pairs in the store's numbers; None if they will be estimated from a sample of tiles."""
    ranges = modality.configured_ranges()
    return None if ranges is None else [list(pair) for pair in ranges]


def _resampled(scenes: tuple[Scene, ...]) -> dict[str, int]:
    ways = [scene.assets[0].resampling for scene in scenes if scene.assets[0].warp_onto is not None]
    return dict(sorted(Counter(str(way) for way in ways).items()))


def _modality_in_words(name: str, facts: dict[str, Any]) -> list[str]:
    sets = "; ".join(
        f"{', '.join(s['bands'])} ({s['dtype']}, {s['tile_size_px']} px per tile)"
        for s in facts["band_sets"]
    )
    shifts = "".join(f"; {n} is added to {k} scenes" for n, k in facts["shifted_scenes"].items())
    lines = [
        f"modality {name}: {facts['scenes']} of {facts['inputs']} inputs; {facts['frames']} frames, "
        f"{facts['missing_frames']} missing",
        f"  bands: {sets}",
        f"  cut: {_cut(facts)}",
        f"  scale {_or_unknown(facts['scale'])}, offset {_or_unknown(facts['offset'])}{shifts}",
        f"  value range: {_range_in_words(facts)}",
    ]
    ways = ", ".join(f"{number} scenes, {way}" for way, number in facts["resampled_scenes"].items())
    return [*lines, f"  resampled: {ways}"] if ways else lines


def _cut(facts: dict[str, Any]) -> str:
    if not facts["patch_sizes"]:
        return "not at all: a label raster"
    if facts["scorer"] is None:
        return f"uniform patches of {facts['patch_sizes'][0]} px"
    return (
        f"patches of {', '.join(map(str, facts['patch_sizes']))} px by {facts['scorer']} of "
        f"{', '.join(facts['scored_bands']) or 'score rasters'}; {rule_in_words(facts['rule'])}"
    )


def _range_in_words(facts: dict[str, Any]) -> str:
    if facts["value_range"] is None:
        return "estimated from a sample of tiles before the first shard"
    pairs = list(dict.fromkeys(f"{low:g} ... {high:g}" for low, high in facts["value_range"]))
    return f"{', '.join(pairs)}, as configured" if pairs else "none: class labels"


def _or_unknown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"
