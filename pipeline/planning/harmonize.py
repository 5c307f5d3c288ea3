"""One meaning of numbers per modality: scales, offsets, and the processing baselines that changed them.

Pure. A scene's number n means n * scale + offset in physical units. Scenes of one modality may have
different offsets, as Sentinel-2's do before and since processing baseline 04.00; whole numbers are added
on reading so that all have the store's offset. The sensing date is never asked: archives are reprocessed,
and old acquisitions then carry the new offset.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.scenes import Scene
from pipeline.settings.modality import ModalityConfig

# Scales and offsets equal to so many digits are one: some headers hold them as float32.
_DIGITS = 6
_WHOLE = 1e-6
# Shares of what an offset adds: numbers of which the low percentile reaches the first look as if it had
# been added; those below the second look as if it had not. Of real Sentinel-2 scenes, the 1st percentile
# over all bands was 908 ... 1230 where 1000 is added and 9 ... 369 elsewhere.
_LOOKS_ADDED = 0.8
_LOOKS_ABSENT = 0.5


@dataclass(frozen=True)
class Harmonized:
    """Scenes of one modality whose numbers mean the same once `Scene.shift` is added.

    `scale` and `offset` are the store's; None where nothing states them, and where they differ between
    bands, equally in all scenes. `refused` gives a reason by scene id. `notes` say what was decided and
    why, a line each.
    """

    scenes: tuple[Scene, ...]
    scale: float | None
    offset: float | None
    refused: dict[str, str]
    notes: tuple[str, ...]


def harmonize(
    scenes: Sequence[Scene],
    modality: ModalityConfig,
    store: tuple[float | None, float | None] | None = None,
) -> Harmonized:
    """Set the shift of every scene, to the lowest of their offsets: shifts are >= 0, nothing is clipped.

    Scenes that come into an existing store get its offset; `store` is its scale and offset, and those it
    cannot hold without clipping are refused.

    A plane's offset is what the file or catalogue states, else what the scene's processing baseline
    means under `modality.baseline`, else `modality.offset`; its scale is the stated one, else
    `modality.scale`. A shift cannot mend a different scale, nor an offset that nothing states, nor bands
    that differ within a scene: scenes unlike most others in these are refused. Where most scenes' bands
    differ, and all equally (Landsat with its thermal band), nothing is shifted. Raises ArchiveError where
    there is no majority, and ConfigError for a baseline that is no version.
    """
    rule = modality.baseline
    if rule is not None and _version(rule.since) is None:
        raise ConfigError(
            f"modality {modality.name}: baseline.since is {rule.since!r}; expected a version like '04.00'"
        )
    refused, meanings = {}, {}
    # Sources share planes between scenes: few combinations stand for very many scenes.
    known: dict[tuple[object, ...], _Meaning | None] = {}
    for scene in scenes:
        key = (scene.baseline, *(id(asset.planes) for asset in scene.assets))
        if key not in known:
            known[key] = _meaning(scene, modality)
        meaning = known[key]
        if meaning is None:
            refused[scene.id] = (
                f"states neither an offset nor a processing baseline ({scene.baseline or 'none'}), and "
                "baseline.unknown is refuse; give its baseline, or baseline.unknown before or since"
            )
        else:
            meanings[scene.id] = meaning
    if not meanings:
        return Harmonized((), *(store or (modality.scale, modality.offset)), refused, ())
    family = _majority(meanings, modality)
    most = f"most scenes of modality {modality.name} have {family}"
    for scene_id, meaning in meanings.items():
        if meaning.family != family:
            refused[scene_id] = f"has {meaning.family}; {most}"
    kept = [scene for scene in scenes if scene.id not in refused]
    if not meanings[kept[0].id].is_common:
        notes = (f"all {_count(kept)} have {family}: none is shifted",)
        _check_store(meanings[kept[0].id], (None, None), store, modality)
        return Harmonized(tuple(kept), None, None, refused, notes)
    _check_store(meanings[kept[0].id], (meanings[kept[0].id].scale, None), store, modality)
    return _shifted(kept, meanings, modality, refused, store)


def apply_shift(pixels: np.ndarray, valid: np.ndarray, shift: int) -> np.ndarray:
    """Pixels [plane, y, x] with `shift` >= 0 added where valid, bool [y, x]; in their own type.

    Pixels that are not valid keep their numbers. Raises SceneError where a sum does not fit the type.
    """
    if shift == 0 or not valid.any():
        return pixels
    if pixels.dtype.kind != "f":
        limits = np.iinfo(pixels.dtype)
        highest = int(np.max(pixels, initial=limits.min, where=valid))
        if highest + shift > limits.max:
            raise SceneError(
                f"holds the number {highest}; with the {shift} added that harmonise its offset it does not "
                f"fit {pixels.dtype}; leave the scene out, or rewrite the archive in a wider type"
            )
    added = np.array([shift]).astype(pixels.dtype)
    return np.where(valid, pixels + added, pixels)


def baseline_finding(scene: Scene, modality: ModalityConfig, pixels: np.ndarray) -> str | None:
    """One line where valid numbers [n] of all bands, before any shift, contradict the scene's offset.

    Their low percentile (`modality.baseline.low_percentile`) is near what the baseline's offset adds in
    scenes that have it, and near zero in most that do not; bright scenes without shadow or water are
    alike in both. None where nothing contradicts or nothing can be compared.
    """
    rule = modality.baseline
    meaning = _meaning(scene, modality)
    if rule is None or meaning is None or not meaning.is_common or pixels.size == 0:
        return None
    scale, offset = meaning.scale, meaning.offset
    added = -rule.offset / scale if scale else 0.0
    if added <= 0 or offset is None:
        return None
    low = float(np.percentile(pixels, rule.low_percentile))
    measured = f"percentile {rule.low_percentile:g} of its numbers is {low:g}"
    if _key(offset) == _key(rule.offset) and low < _LOOKS_ABSENT * added:
        cause = (
            "the offset may have been removed already"
            if low
            else "zeros may stand for nodata (modality.nodata, modality.zero_border)"
        )
        return f"is said to have offset {offset:g}, which adds {added:g}, but {measured}: {cause}"
    if offset == 0 and low >= _LOOKS_ADDED * added:
        return (
            f"is said to have offset 0, but {measured}: it may have offset {rule.offset:g}, which adds "
            f"{added:g}, or be bright all over, as clouds, snow and desert are"
        )
    return None


@dataclass(frozen=True)
class _Meaning:
    """What a scene's numbers mean: (band, scale, offset) of each, and where its offset comes from."""

    bands: tuple[tuple[str, float | None, float | None], ...]
    origin: str

    @property
    def scale(self) -> float | None:
        """The scale of the first band, and of all where `is_common`; `offset` likewise."""
        return self.bands[0][1]

    @property
    def offset(self) -> float | None:
        return self.bands[0][2]

    @cached_property
    def is_common(self) -> bool:
        """Whether all bands have one scale and one offset."""
        return len({(_key(scale), _key(offset)) for _, scale, offset in self.bands}) == 1

    @cached_property
    def family(self) -> str:
        """What no shift can change, in words."""
        if not self.is_common:
            each = (f"{band} {_words(scale, offset)}" for band, scale, offset in self.bands)
            return f"bands that differ ({'; '.join(each)})"
        text = "no stated scale" if self.scale is None else f"scale {self.scale:.{_DIGITS}g}"
        return f"{text} {'without a known' if self.offset is None else 'with an'} offset"


def _meaning(scene: Scene, modality: ModalityConfig) -> _Meaning | None:
    """What a scene's numbers mean; None where its baseline decides, is unknown, and is to be refused."""
    planes = sorted((p for a in scene.assets for p in a.planes), key=lambda plane: plane.band)
    implied, origin = None, ""
    if any(plane.offset is None for plane in planes):
        fallback = _implied_offset(scene, modality)
        if fallback is None:
            return None
        implied, origin = fallback
    if any(plane.offset is not None for plane in planes):
        origin = "whose files or catalogue state it"
    bands = (
        (
            plane.band,
            modality.scale if plane.scale is None else plane.scale,
            implied if plane.offset is None else plane.offset,
        )
        for plane in planes
    )
    return _Meaning(tuple(bands), origin)


def _implied_offset(scene: Scene, modality: ModalityConfig) -> tuple[float | None, str] | None:
    """The offset of planes that state none, and whence, in words."""
    rule = modality.baseline
    if rule is None:
        if modality.offset is None and modality.scale is not None:
            return 0.0, "by modality.scale alone"
        known = modality.offset is not None
        return modality.offset, "by modality.offset" if known else "without a stated offset"
    version, first = _version(scene.baseline), _version(rule.since)
    assert first is not None
    since = rule.unknown == "since" if version is None else version >= first
    which = f"{rule.since} or later" if since else f"before {rule.since}"
    offset = rule.offset if since else modality.offset or 0.0
    if version is not None:
        return offset, f"of baseline {which}"
    return None if rule.unknown == "refuse" else (offset, f"of unknown baseline, taken for {which}")


def _majority(meanings: Mapping[str, _Meaning], modality: ModalityConfig) -> str:
    """The family that most scenes have."""
    example = {meaning.family: scene_id for scene_id, meaning in meanings.items()}
    ranked = Counter(meaning.family for meaning in meanings.values()).most_common()
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        found = " and ".join(
            f"{family} ({number}, for example {example[family]})" for family, number in ranked[:2]
        )
        raise ArchiveError(
            f"the scenes of modality {modality.name} have equally often {found}; one modality needs one: "
            "give a source that selects scenes of one kind, or state what is missing in the configuration"
        )
    return ranked[0][0]


def _shifted(
    scenes: Sequence[Scene],
    meanings: Mapping[str, _Meaning],
    modality: ModalityConfig,
    refused: dict[str, str],
    store: tuple[float | None, float | None] | None,
) -> Harmonized:
    """Harmonise scenes of one family; `refused` are those that are not of it."""
    scale = meanings[scenes[0].id].scale
    offsets = [meaning.offset for scene in scenes if (meaning := meanings[scene.id])]
    store_offset = min(offsets, key=lambda offset: (offset or 0.0) / (scale or 1.0))
    if store is not None:
        store_offset = store[1]
    groups = defaultdict(list)
    for scene in scenes:
        groups[_key(meanings[scene.id].offset), meanings[scene.id].origin].append(scene)
    shifts: dict[str, int] = {}
    clauses = []
    for (offset, origin), group in groups.items():
        shift = _whole_shift(offset, _key(store_offset), scale)
        clause = f"{_count(group)} {origin}" + ("" if offset is None else f" (offset {offset:g})")
        if shift is None or shift < 0:
            reason = _no_shift(offset, store_offset, scale, shift)
            refused = {**refused, **{scene.id: reason for scene in group}}
            clause += " refused"
        else:
            shifts |= {scene.id: shift for scene in group}
            clause += f", to whose numbers {shift} is added" if shift else ""
        clauses.append(clause)
    kept = tuple(replace(scene, shift=shifts[scene.id]) for scene in scenes if scene.id in shifts)
    notes = [f"{'; '.join(clauses)}: the store has {_words(scale, store_offset)}"]
    if scale is None and store_offset is None:
        notes = []
    return Harmonized(kept, scale, store_offset, refused, (*notes, *_remarks(kept, modality)))


def _check_store(
    meaning: "_Meaning",
    known: tuple[float | None, float | None],
    store: tuple[float | None, float | None] | None,
    modality: ModalityConfig,
) -> None:
    """Raise ArchiveError where further scenes have another scale than the store."""
    if store is not None and _key(known[0]) != _key(store[0]):
        raise ArchiveError(
            f"the new scenes of modality {modality.name} have {meaning.family}, but the store has "
            f"{_words(*store)}; preprocess them into a store of their own"
        )


def _whole_shift(
    offset: float | None, store_offset: float | None, scale: float | None
) -> int | None:
    """The number to add for an offset to become the store's; None where it is not whole or not known."""
    if offset == store_offset:
        return 0
    if offset is None or store_offset is None:
        return None
    if not scale:
        return None
    shift = (offset - store_offset) / scale
    return round(shift) if abs(shift - round(shift)) <= _WHOLE * max(1.0, abs(shift)) else None


def _no_shift(
    offset: float | None, store_offset: float | None, scale: float | None, shift: int | None
) -> str:
    if offset is None or store_offset is None:
        own, other = (
            "no known offset" if o is None else f"offset {o:g}" for o in (offset, store_offset)
        )
        return (
            f"has {own}, the store {other}; state modality.offset, or preprocess into another store"
        )
    if shift is not None:
        return (
            f"has offset {offset:g}, the store {store_offset:g}: {-shift} would have to be taken from its "
            "numbers, which clips dark pixels; preprocess the whole archive into a new store"
        )
    text = f"has offset {offset:g}, others {store_offset:g}"
    if not scale:
        return f"{text}, and nothing states a scale to convert them with; give modality.scale"
    return (
        f"{text}; at scale {scale:g} they are {(offset - store_offset) / scale:.10g} apart, which is no "
        "whole number; give a source that selects scenes of one offset"
    )


def _remarks(scenes: Sequence[Scene], modality: ModalityConfig) -> list[str]:
    """What people should know of baselines: those that cannot be read, or contradict a stated offset."""
    if modality.baseline is None:
        return []
    unread = sorted({s.baseline for s in scenes if s.baseline and _version(s.baseline) is None})
    remarks = [f"baseline {text!r:.40} is no version: taken for unknown" for text in unread]
    against = []
    for scene in scenes:
        implied = _implied_offset(scene, modality)
        stated = {_key(p.offset) for a in scene.assets for p in a.planes} - {None}
        if _version(scene.baseline) and implied and stated - {_key(implied[0])}:
            against.append(scene)
    if against:
        remarks.append(
            f"{_count(against)} with a stated offset that is not their baseline's (for example "
            f"{against[0].id}): what is stated counts"
        )
    return remarks


def _version(baseline: str | None) -> float | None:
    """A processing baseline ("04.00", "5.1", "N0400") as a number; None where it is none."""
    found = re.fullmatch(r"N?(\d\d)(\d\d)|N?(\d{1,2})(?:\.(\d{1,2}))?", (baseline or "").strip())
    if found is None:
        return None
    major, minor = (part for part in (found[1] or found[3], found[2] or found[4] or "0"))
    return float(f"{major}.{minor}")


def _key(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.{_DIGITS}g}")


def _words(scale: float | None, offset: float | None) -> str:
    known = {"scale": scale, "offset": offset}
    return ", ".join(
        f"{name} {'not stated' if value is None else f'{value:.{_DIGITS}g}'}"
        for name, value in known.items()
    )


def _count(scenes: Sequence[Scene]) -> str:
    return f"{len(scenes)} scene{'s' if len(scenes) != 1 else ''}"
