"""Which files make up a scene, by their names alone. Pure.

A scene is one file or, where the pattern has `{band}`, one file per band: those that agree in every
other placeholder or, where the pattern has neither `{tile}` nor `{date}`, in all of the path but the
band.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ArchiveError
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.bands import texts_of, wanted_bands
from pipeline.sources.files import RasterFile, without_suffix
from pipeline.sources.names import NameMatch, NamePattern, printable, without_band

_SHOWN_BANDS = 10
_Named = tuple[RasterFile, NameMatch]


@dataclass(frozen=True)
class Candidate:
    """Files that make up a scene, before any of them is opened.

    `files` are by band, the mask's among them, or under "" where one file has all bands. `name` is the
    id relative to the modality's source. `texts` are what the names say by placeholder. `problem` says
    why it is no scene, where names show that.
    """

    id: str
    name: str
    files: dict[str, RasterFile]
    texts: dict[str, str]
    problem: str | None = None


@dataclass
class Candidates:
    """Candidates by id, in order; files that are none, by path with suffix; remarks for people."""

    found: list[Candidate] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_candidates(
    files: Iterable[RasterFile], modality: ModalityConfig, pattern: NamePattern | None
) -> Candidates:
    """The candidates among `files`. Raises ArchiveError for two with the same id."""
    result, named = Candidates(), []
    for file in files:
        match = pattern.match(file.name) if pattern else NameMatch({})
        if match is not None:
            named.append((file, match))
        elif pattern is not None:
            result.skipped[printable(file.path)] = (
                f"is not named like modality.pattern {pattern.text}"
            )
    if pattern is not None and "band" in pattern.names:
        found = _with_a_file_per_band(named, modality, result.notes)
    else:
        found = [_with_one_file(file, match) for file, match in named]
    result.found = sorted(found, key=lambda candidate: candidate.id)
    _refuse_equal_ids(result.found)
    return result


def _with_one_file(file: RasterFile, match: NameMatch) -> Candidate:
    name, problem = without_suffix(file.name), _problem([file])
    return Candidate(printable(file.stem), name, {"": file}, match.texts, problem)


def _with_a_file_per_band(
    named: Sequence[_Named], modality: ModalityConfig, notes: list[str]
) -> list[Candidate]:
    groups: dict[tuple[object, ...], list[_Named]] = defaultdict(list)
    for file, match in named:
        others = {name: text for name, text in match.texts.items() if name != "band"}
        cut = without_band(without_suffix(file.name), match.band_spans)
        key = tuple(sorted(others.items())) if {"tile", "date"} & set(others) else (cut,)
        groups[key].append((file, match))
    texts = _band_texts(modality, groups.values())
    found = [_with_bands(members, texts, modality) for members in groups.values()]
    used = {file.href for candidate in found for file in candidate.files.values()}
    unused = sorted({match.texts["band"] for file, match in named if file.href not in used})
    if unused:
        notes.append(f"some or all files of these bands are not used: {_shown(unused)}")
    return found


def _with_bands(
    members: Sequence[_Named], texts: dict[str, tuple[str, ...]], modality: ModalityConfig
) -> Candidate:
    by_text: dict[str, list[_Named]] = defaultdict(list)
    for file, match in members:
        by_text[match.texts["band"]].append((file, match))
    chosen = {
        band: next((text for text in known if text in by_text), None)
        for band, known in texts.items()
    }
    present = {band: by_text[text] for band, text in chosen.items() if text is not None}
    file, match = next(iter(present.values()), members)[0]
    inside = len(file.path) - len(file.name)
    spans = tuple((start + inside, stop + inside) for start, stop in match.band_spans)
    files = {band: found[0][0] for band, found in present.items()}
    return Candidate(
        printable(without_band(without_suffix(file.path), spans)) or modality.name,
        without_band(without_suffix(file.name), match.band_spans),
        files,
        {name: text for name, text in match.texts.items() if name != "band"},
        _band_problem(chosen, by_text) or _problem(files.values()),
    )


def _band_problem(chosen: dict[str, str | None], by_text: dict[str, list[_Named]]) -> str | None:
    """Why the files of a scene are not one per band."""
    lacking = [band for band, text in chosen.items() if text is None]
    if lacking:
        return f"lacks the bands {', '.join(lacking)}; it has {_shown(by_text)}"
    texts = [text for text in chosen.values() if text is not None]
    for band, text in chosen.items():
        if texts.count(str(text)) > 1:
            return f"has one file, of {text}, for two bands; name each in modality.assets"
        found = by_text[str(text)]
        if len(found) > 1:
            paths = " and ".join(printable(file.path) for file, _ in found[:2])
            return (
                f"has {len(found)} files of band {band}, such as {paths}; write what differs into "
                "modality.pattern, as a placeholder or as it is"
            )
    return None


def _band_texts(
    modality: ModalityConfig, groups: Iterable[Sequence[_Named]]
) -> dict[str, tuple[str, ...]]:
    """The possible texts in names by band, in the modality's order; the mask's last."""
    mask = modality.mask.band if modality.mask else None
    mask_texts = texts_of(mask, modality) if mask else ()
    bands = wanted_bands(modality)
    if bands is None:
        bands = _common_bands(groups, mask_texts)
    texts = {band: texts_of(band, modality) for band in bands}
    return {**texts, mask: mask_texts} if mask else texts


def _common_bands(
    groups: Iterable[Sequence[_Named]], mask_texts: tuple[str, ...]
) -> tuple[str, ...]:
    """The bands of an archive whose configuration names none: every scene must have the same."""
    sets = {
        tuple(sorted({match.texts["band"] for _, match in members} - set(mask_texts))): members
        for members in groups
    }
    kinds = sorted(sets)
    if len(kinds) > 1:
        found = " and ".join(
            f"{_shown(bands)} (as {printable(sets[bands][0][0].path)})" for bands in kinds[:2]
        )
        raise ArchiveError(
            f"the scenes have files of different bands, {found}; name the bands in modality.bands"
        )
    unusable = [band for bands in kinds for band in bands or [""] if not _is_identifier(band)]
    if unusable:
        raise ArchiveError(
            f"{printable(unusable[0])!r:.80} cannot be the name of a band; name the bands in "
            "modality.bands, and what stands for them in file names in modality.assets"
        )
    return kinds[0] if kinds else ()


def _is_identifier(text: str) -> bool:
    return re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,63}", text) is not None


def _problem(files: Iterable[RasterFile]) -> str | None:
    """Why files cannot make up a scene, where finding them has shown that."""
    for file in files:
        if printable(file.path) != file.path:
            return "has control characters or no UTF-8 in its name; rename it"
        if file.problem is not None:
            return file.problem
    return None


def _refuse_equal_ids(candidates: Sequence[Candidate]) -> None:
    for first, second in itertools.pairwise(candidates):
        if first.id == second.id:
            one, other = (
                next((file.href for file in candidate.files.values()), candidate.id)
                for candidate in (first, second)
            )
            raise ArchiveError(
                f"{one} and {other} have the same name but for the suffix; rename one, scenes are told "
                "apart by it, or give a modality.pattern that only one of them fits"
            )


def _shown(bands: Iterable[str]) -> str:
    listed = sorted(bands)
    more = ", ..." if len(listed) > _SHOWN_BANDS else ""
    return ", ".join(printable(band) for band in listed[:_SHOWN_BANDS]) + more
