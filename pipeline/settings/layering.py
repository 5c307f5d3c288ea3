"""Laying a configuration over a preset.

What the configuration says wins. What a preset says of each band follows the bands the configuration
chooses, and what would contradict a chosen scorer or partition rule is left out.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.rules import WAYS
from pipeline.scorers.config import SCORER_CONFIGS, SCORER_NAMES

Content = dict[str, Any]

_FIELDS = dict(zip(SCORER_NAMES, (set(c.model_fields) for c in SCORER_CONFIGS), strict=True))


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> Content:
    """`base` with the values of `change`; sections in both are merged key by key."""
    merged = dict(base)
    for key, value in change.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def over_preset(preset: Mapping[str, Any], content: Mapping[str, Any]) -> Content:
    """A configuration over a preset that is named at its top level."""
    preset = _fitted(preset, content.get("modality"))
    chosen = {
        "scoring": _scoring(preset.get("scoring"), content.get("scoring"), None),
        "partition": _partition(preset.get("partition"), content.get("partition"), None),
    }
    return {**merge(preset, content), **{key: part for key, part in chosen.items() if part}}


def entry_over_preset(
    preset: Mapping[str, Any], entry: Mapping[str, Any], shared: Mapping[str, Any]
) -> Content:
    """One entry of `modalities` over the preset it names; its name is its key, not the preset's.

    The preset's scoring and partition become the modality's own, over the `shared` ones of the whole
    configuration, unless the modality is not adaptive.
    """
    preset = _fitted(preset, entry)
    block = merge(preset.get("modality") or {}, entry)
    block.pop("name", None)
    if not block.get("adaptive", block.get("kind") != "label"):
        return block
    chosen = {
        "scoring": _scoring(preset.get("scoring"), entry.get("scoring"), shared.get("scoring")),
        "partition": _partition(
            preset.get("partition"), entry.get("partition"), shared.get("partition")
        ),
    }
    return {**block, **{key: part for key, part in chosen.items() if part}}


def _scoring(preset: Any, own: Any, shared: Any) -> Any:
    """A modality's scoring: its own over the preset's, or the preset's over the shared one.

    Of the preset only what the scorer in effect knows; of a shared scoring nothing, where the preset
    names another scorer.
    """
    if not preset or not isinstance(own, Mapping | None):
        return own
    if own:
        scorer = _scorer(own) or _scorer(preset) or "entropy"
    else:
        shared = shared if isinstance(shared, Mapping) else {}
        scorer = _scorer(preset) or _scorer(shared) or "entropy"
        shared = shared if (_scorer(shared) or "entropy") == scorer else {}
    same = (_scorer(preset) or scorer) == scorer
    known = _FIELDS.get(scorer, set()) if same else _FIELDS.get(scorer, set()) & {"bands"}
    kept = {key: value for key, value in preset.items() if key in known}
    return merge(kept, own) if own else merge(shared or {}, kept)


def _scorer(scoring: Mapping[str, Any]) -> str | None:
    return str(scoring["scorer"]) if "scorer" in scoring else None


def _partition(preset: Any, own: Any, shared: Any) -> Any:
    """A modality's partition: its own over the preset's, or the preset's over the shared one; of two ways
    to cut a frame the upper one."""
    if not preset or not isinstance(own, Mapping | None):
        return own
    upper, lower = (own, preset) if own else (preset, shared)
    lower = lower if isinstance(lower, Mapping) else {}
    if any(upper.get(way) is not None for way in WAYS):
        lower = {key: value for key, value in lower.items() if key not in WAYS}
    return merge(lower, upper)


def _fitted(preset: Mapping[str, Any], own: Any) -> Content:
    """The preset for the bands that a modality's own settings choose; as it is where they choose none."""
    block = preset.get("modality")
    if not isinstance(own, Mapping) or not isinstance(block, Mapping):
        return dict(preset)
    block = {key: value for key, value in block.items() if key != "band_sets" or key not in own}
    if "bands" not in own or not block.get("bands"):
        return {**preset, "modality": block}
    listed = own["bands"] if isinstance(own["bands"], list | tuple) else ()
    bands = [band for band in listed if isinstance(band, str)]
    scoring = dict(preset.get("scoring") or {})
    if scoring.get("bands"):
        scoring["bands"] = [band for band in scoring["bands"] if band in bands]
        if not scoring["bands"]:
            del scoring["bands"]
    return {**preset, "modality": _of_bands(block, bands), "scoring": scoring}


def _of_bands(block: Mapping[str, Any], bands: list[str]) -> Content:
    """What a preset says of each band for some of its bands, in their order; left out where it does not
    know one of them."""
    places = {band: place for place, band in enumerate(block["bands"])}
    known = bool(bands) and all(band in places for band in bands)
    fitted = dict(block)
    for key in _per_band(block):
        del fitted[key]
        if known:
            fitted[key] = [block[key][places[band]] for band in bands]
    if block.get("band_sets"):
        sets = {
            name: [b for b in bands if b in members] for name, members in block["band_sets"].items()
        }
        fitted["band_sets"] = {name: members for name, members in sets.items() if members} or None
    return fitted


def _per_band(block: Mapping[str, Any]) -> list[str]:
    """The keys whose value lists something for each band."""
    ranges = block.get("value_range")
    is_pairs = isinstance(ranges, list | tuple) and all(isinstance(r, list | tuple) for r in ranges)
    return [key for key in ("wavelengths_nm", *["value_range"] * is_pairs) if block.get(key)]
