"""Folders, globs and single files of rasters: GeoTIFF, JPEG, PNG, JPEG 2000; local and remote.

A scene is one file with several bands or, where the pattern has `{band}`, one file per band. Its id is
the path of its file below the archive without suffix; with a file per band, that of its first band's
file with the band cut out (`pipeline.sources.names.without_band`).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rasterio.errors import NotGeoreferencedWarning

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.locations import is_url
from pipeline.readers.rasters import SUFFIXES, RasterHeader, read_header
from pipeline.scenes import Access, Asset, Listing, Plane, Scene
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.bands import choose_planes, plane_of
from pipeline.sources.candidates import Candidate, find_candidates
from pipeline.sources.files import (
    RasterFile,
    below,
    find_rasters,
    fingerprint_of,
    is_file,
    relative,
    suffix,
    waiting_threads,
    without_suffix,
)
from pipeline.sources.names import NamePattern, format_regex, parse_datetime, printable
from pipeline.sources.tables import read_table, scene_key

# Opening a remote file is waiting for its answer.
_REMOTE_THREADS = 8
_SHOWN_TAGS = 20
# What the other sources read.
_CATALOGUES_AND_CUBES = (
    ".json",
    ".geojson",
    ".parquet",
    ".geoparquet",
    ".nc",
    ".nc4",
    ".h5",
    ".zarr",
)


@dataclass(frozen=True)
class _Inputs:
    """What a listing depends on, as found but not opened.

    `masks` are the files of `mask.source`, `one_mask` says that it names a single one; `dates` is the
    location of the table of dates.
    """

    rasters: tuple[RasterFile, ...]
    refused: dict[str, str]
    notes: tuple[str, ...]
    masks: tuple[RasterFile, ...]
    one_mask: bool
    dates: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class _Rules:
    """What turns files into scenes. `masks` are by name, or the only one under ""; `dates` by scene."""

    modality: ModalityConfig
    access: Access
    pattern: NamePattern | None
    masks: dict[str, RasterFile]
    dates: dict[str, str]


def list_folder(
    location: str, archive_root: str, modality: ModalityConfig, access: Access
) -> Listing:
    """The scenes of a folder, glob or file.

    `location` and `archive_root` are absolute paths or URLs; ids and `Listing.files` are relative to
    `archive_root`. Every file is opened once, for its header. Raises ArchiveError for what cannot be
    listed, holds no raster, or has two scenes of one id; ConfigError for keys of `modality` that
    contradict each other.
    """
    pattern = _pattern(modality)
    inputs = _find(location, archive_root, modality, access)
    candidates = find_candidates(inputs.rasters, modality, pattern)
    _refuse_nothing(location, inputs, pattern, len(candidates.found))
    rules = _Rules(
        modality, access, pattern, _masks(inputs, len(candidates.found)),
        read_table(inputs.dates, ("scene", "datetime"), access) if inputs.dates else {},
    )  # fmt: skip
    outcomes = _outcomes(candidates.found, rules, remote=is_url(location))
    scenes = tuple(outcome for outcome in outcomes if isinstance(outcome, Scene))
    refused = {
        candidate.id: outcome
        for candidate, outcome in zip(candidates.found, outcomes, strict=True)
        if isinstance(outcome, str)
    }
    return Listing(
        scenes=scenes,
        refused={**inputs.refused, **refused},
        skipped=candidates.skipped,
        files=inputs.files,
        notes=(*inputs.notes, *candidates.notes, *_slow_files(scenes)),
    )


def files_of(
    location: str, archive_root: str, modality: ModalityConfig, access: Access
) -> dict[str, str]:
    """`Listing.files` of `list_folder`, without opening a raster."""
    return _find(location, archive_root, modality, access).files


def _find(location: str, archive_root: str, modality: ModalityConfig, access: Access) -> _Inputs:
    found = find_rasters(location, archive_root, access)
    masks: tuple[RasterFile, ...] = ()
    one_mask = False
    if modality.mask is not None and modality.mask.source is not None:
        where = below(archive_root, modality.mask.source, "modality.mask.source", access)
        masks, one_mask = tuple(find_rasters(where, archive_root, access).files), is_file(where)
    hrefs = {file.href for file in masks}
    rasters = tuple(file for file in found.files if file.href not in hrefs)
    files = {printable(file.path): file.fingerprint for file in (*rasters, *masks)}
    dates = None
    if modality.dates is not None and modality.dates.csv is not None:
        dates = below(archive_root, modality.dates.csv, "modality.dates.csv", access)
        files[relative(dates, archive_root)] = fingerprint_of(dates, access)
    return _Inputs(
        rasters, found.refused, tuple(found.notes), masks, one_mask, dates, dict(sorted(files.items()))
    )  # fmt: skip


def _pattern(modality: ModalityConfig) -> NamePattern | None:
    """The pattern, if there is one. Raises ConfigError for keys that contradict each other."""
    dates, bands = modality.dates, modality.bands or ()
    date_format = dates.format if dates else None
    if date_format is not None:
        format_regex(date_format)
    pattern = NamePattern(modality.pattern, date_format) if modality.pattern is not None else None
    in_names = pattern is not None and "date" in pattern.names
    elsewhere = dates is not None and (dates.tag is not None or dates.csv is not None)
    if in_names and elsewhere:
        raise ConfigError(
            "modality.dates.tag and csv have no effect beside {date} in modality.pattern; give one of them"
        )
    if date_format is not None and not in_names and not elsewhere:
        raise ConfigError(
            "modality.dates.format has no effect without dates.tag, dates.csv or {date} in modality.pattern"
        )
    mask = modality.mask.band if modality.mask else None
    if mask is not None and mask in bands:
        raise ConfigError(
            f"modality.mask.band {mask} is one of modality.bands; a mask is not stored: leave it out there"
        )
    assets = modality.assets or {}
    unknown = [band for band in assets if bands and band not in (*bands, mask)]
    if unknown or len(set(assets.values())) != len(assets):
        raise ConfigError(
            f"modality.assets has {assets}; expected bands of modality.bands or the mask's "
            f"({', '.join(bands) or 'any'}), each with a text of its own"
        )
    return pattern


def _refuse_nothing(
    location: str, inputs: _Inputs, pattern: NamePattern | None, num_candidates: int
) -> None:
    if num_candidates or inputs.refused:
        return
    if inputs.rasters and pattern is not None:
        raise ArchiveError(
            f"{location}: none of its {len(inputs.rasters)} files, such as "
            f"{printable(inputs.rasters[0].name)}, is named like modality.pattern {pattern.text}; mend it, "
            "it begins below modality.source"
        )
    others: list[str] = []
    if not is_url(location) and Path(location).is_dir():
        others = sorted(printable(path.name) for path in Path(location).iterdir())
    other = next((name for name in others if suffix(name) in _CATALOGUES_AND_CUBES), None)
    advice = f"; give {other} as the source if it is a catalogue or data cube" if other else ""
    if others and not other:
        advice = f"; it holds {others[0]}, which is not read"
    raise ArchiveError(
        f"{location}: no scene found; expected files ending in {', '.join(SUFFIXES)}{advice}"
    )


def _masks(inputs: _Inputs, num_scenes: int) -> dict[str, RasterFile]:
    if inputs.one_mask and num_scenes > 1:
        raise ArchiveError(
            f"modality.mask.source names one file, {inputs.masks[0].path}, for {num_scenes} scenes; name a "
            "folder that has a mask per scene"
        )
    if inputs.one_mask:
        return {"": inputs.masks[0]}
    masks: dict[str, RasterFile] = {}
    for file in inputs.masks:
        known = masks.setdefault(without_suffix(file.name), file)
        if known is not file:
            raise ArchiveError(
                f"{known.href} and {file.href} have the same name but for the suffix; remove one, masks "
                "belong to scenes by it"
            )
    return masks


def _outcomes(candidates: Sequence[Candidate], rules: _Rules, *, remote: bool) -> list[Scene | str]:
    """For every candidate its scene, or why there is none."""

    def outcome(candidate: Candidate) -> Scene | str:
        try:
            return _scene(candidate, rules)
        except SceneError as error:
            return printable(str(error))

    if not remote:
        return [outcome(candidate) for candidate in candidates]
    # Filters that threads set and reset are shared by all: set once around them, they stay the same.
    with warnings.catch_warnings(), waiting_threads(_REMOTE_THREADS) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return list(pool.map(outcome, candidates))


def _scene(candidate: Candidate, rules: _Rules) -> Scene:
    if candidate.problem is not None:
        raise SceneError(candidate.problem)
    headers = [_header(file, band, rules.access) for band, file in candidate.files.items()]
    assets, mask = _assets(candidate, headers, rules.modality)
    texts = candidate.texts
    return Scene(
        id=candidate.id,
        modality=rules.modality.name,
        assets=tuple(assets),
        datetime=_datetime(candidate, headers, rules),
        place=texts.get("tile"),
        mask=_mask_of(candidate, rules) or mask,
        baseline=texts.get("baseline"),
        label=texts.get("label"),
        split=texts.get("split"),
    )


def _header(file: RasterFile, band: str, access: Access) -> RasterHeader:
    """Header of a file; of one that holds a single `band`, if that is not ""."""
    try:
        header = read_header(file.href, access)
        if band and header.num_bands != 1:
            raise SceneError(
                f"has {header.num_bands} bands; expected one, where names have {{band}}"
            )
    except SceneError as error:
        if not band:
            raise
        raise SceneError(f"its file of band {band}: {error}") from None
    return header


def _assets(
    candidate: Candidate, headers: Sequence[RasterHeader], modality: ModalityConfig
) -> tuple[list[Asset], Asset | None]:
    """The assets of the bands, and of the mask if it is one of them."""
    if "" in candidate.files:
        file, header = candidate.files[""], headers[0]
        planes, mask_plane = choose_planes(header, modality)
        mask = _asset(file, header, [mask_plane]) if mask_plane is not None else None
        return [_asset(file, header, planes)], mask
    mask_band = modality.mask.band if modality.mask else None
    assets, mask = [], None
    for (band, file), header in zip(candidate.files.items(), headers, strict=True):
        if band == mask_band:
            mask = _asset(file, header, [Plane(band, 0, header.nodata[0])])
        else:
            assets.append(_asset(file, header, [plane_of(header, 0, band, modality)]))
    return assets, mask


def _asset(file: RasterFile, header: RasterHeader, planes: Sequence[Plane]) -> Asset:
    return Asset(
        href=file.href,
        kind="raster",
        grid=header.grid,
        dtype=header.dtype,
        planes=tuple(planes),
        block_shape=header.block_shape,
        fingerprint=file.fingerprint,
    )


def _mask_of(candidate: Candidate, rules: _Rules) -> Asset | None:
    """The mask of a scene that is a file of `mask.source`; None where there is no such setting."""
    mask = rules.modality.mask
    if mask is None or mask.source is None:
        return None
    file = rules.masks.get("") or rules.masks.get(candidate.name)
    if file is None:
        raise SceneError(
            f"has no mask; expected a file named {candidate.name} in modality.mask.source {mask.source}"
        )
    try:
        if file.problem is not None:
            raise SceneError(file.problem)
        header = read_header(file.href, rules.access)
        if header.num_bands != 1:
            raise SceneError(f"has {header.num_bands} bands; expected one")
    except SceneError as error:
        raise SceneError(f"its mask {file.path}: {error}") from None
    return _asset(file, header, [Plane("mask", 0, header.nodata[0])])


def _datetime(candidate: Candidate, headers: Sequence[RasterHeader], rules: _Rules) -> str | None:
    """The scene's date from where the configuration says it stands; None where it says nothing."""
    dates = rules.modality.dates
    if "date" in candidate.texts:
        assert rules.pattern is not None
        return parse_datetime(candidate.texts["date"], rules.pattern.date_format)
    if dates is None:
        return None
    if dates.csv is not None:
        listed = rules.dates.get(scene_key(candidate.id))
        if listed is None:
            raise SceneError(f"is not in modality.dates.csv {dates.csv}; add a line for it")
        return parse_datetime(listed, dates.format)
    assert dates.tag is not None
    stated = sorted({_tag(header, dates.tag) for header in headers})
    if len(stated) > 1:
        raise SceneError(
            f"its files state different dates in tag {dates.tag}: {stated[0]:.40} and {stated[1]:.40}"
        )
    return parse_datetime(stated[0], dates.format)


def _tag(header: RasterHeader, tag: str) -> str:
    if tag not in header.tags:
        known = ", ".join(f"{name:.40}" for name in sorted(header.tags)[:_SHOWN_TAGS])
        raise SceneError(
            f"has no tag {tag}, which modality.dates.tag names; it has {known or 'none'}"
        )
    return header.tags[tag]


def _slow_files(scenes: Sequence[Scene]) -> list[str]:
    slow = sum(suffix(asset.href) == ".jp2" for scene in scenes for asset in scene.assets)
    if not slow:
        return []
    return [
        f"{slow} files are JPEG 2000, which decodes at about 13 MB/s per core, against about 330 MB/s for "
        "DEFLATE; convert them to GeoTIFF once if they are read more than once"
    ]
