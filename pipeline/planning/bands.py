"""Which bands form one array: sets of one native resolution and pixel type. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from pipeline.errors import ArchiveError
from pipeline.planning.gridding import ratio_between
from pipeline.planning.stacks import Stack, finest
from pipeline.scenes import Asset, Plane, Scene, asset_of, bands_of
from pipeline.scorers.config import ExternalConfig
from pipeline.settings.config import ModalitySettings

# Scenes that differ from all others are damaged or strays up to this share, a mixture above it.
_FEW = 0.01


@dataclass(frozen=True)
class SetShape:
    """A band set as it becomes an array."""

    name: str
    bands: tuple[str, ...]
    dtype: str
    tile_size_px: int

    @property
    def frame_bytes(self) -> int:
        """Pixels of one frame, uncompressed."""
        return len(self.bands) * self.tile_size_px**2 * np.dtype(self.dtype).itemsize


def with_nodata(scenes: Sequence[Scene], nodata: float | None) -> Sequence[Scene]:
    """Scenes whose bands have that nodata, whatever their source says; as they are without one."""
    if nodata is None:
        return scenes
    known: dict[int, tuple[Plane, ...]] = {}

    def changed(asset: Asset) -> Asset:
        key = id(asset.planes)
        if key not in known:
            known[key] = tuple(replace(plane, nodata=nodata) for plane in asset.planes)
        return replace(asset, planes=known[key])

    return [replace(scene, assets=tuple(map(changed, scene.assets))) for scene in scenes]


def conform(
    settings: ModalitySettings, scenes: Sequence[Scene]
) -> tuple[list[Scene], dict[str, str]]:
    """Scenes whose bands can form the modality's band sets, and the reason for each that cannot.

    A set's bands must share grid and type. Raises ArchiveError where the scenes contradict each other and
    nothing says which are right.
    """
    accepted, refused = [], {}
    # Sources share grids and planes between scenes: few combinations stand for very many scenes.
    known: dict[tuple[object, ...], str | None] = {}
    for scene in scenes:
        key = tuple((id(a.grid), id(a.warp_onto), a.dtype, id(a.planes)) for a in scene.assets)
        if key not in known:
            known[key] = _contradiction(settings, scene)
        reason = known[key]
        if reason is None and settings.config.mask is not None and scene.mask is None:
            reason = (
                "has no mask, which modality.mask asks for; leave the setting out, or add the mask"
            )
        if reason is None:
            accepted.append(scene)
        else:
            refused[scene.id] = reason
    if settings.config.bands is None:
        names = [", ".join(bands_of(s)) for s in accepted]
        accepted = _of_one_kind(accepted, "bands", names, settings, refused)
    types = [
        "/".join(asset_of(s, bands[0])[0].dtype for _, bands in _sets(settings, s))
        for s in accepted
    ]
    accepted = _of_one_kind(accepted, "pixel type", types, settings, refused)
    if accepted:
        _check_scored(settings, accepted[0])
        _check_ranges(settings, accepted[0])
        _check_numbers(settings, accepted[0])
    return accepted, refused


def set_shapes(
    settings: ModalitySettings, tile_px: int, stacks: Sequence[Stack], scenes: Sequence[Scene]
) -> list[SetShape]:
    """The band sets of a modality, the one that is scored (or the finest) first.

    `tile_px` is a tile's side in px of the stacks' leading grids. Raises ArchiveError where tiles would
    not hold a whole number of a set's pixels, or scenes differ in resolution.
    """
    if not scenes:
        raise ArchiveError(
            f"modality {settings.name} has no scene that belongs to one of the others; check its "
            "source, or leave it out"
        )
    sizes: Counter[tuple[Fraction, ...]] = Counter()
    for stack in stacks:
        for scene in stack.scenes[settings.name]:
            if scene is not None:
                sizes[_ratios(settings, stack, scene)] += 1
    if len(sizes) > 1:
        listed = " and ".join(
            "/".join(f"{float(ratio):g}" for ratio in ratios) for ratios in sorted(sizes)[:2]
        )
        raise ArchiveError(
            f"scenes of modality {settings.name} have pixels {listed} times as long as those of the first "
            "modality; one modality needs one resolution: set grid.warp, or make them two modalities"
        )
    (ratios,) = sizes
    shapes = [
        SetShape(
            name, bands, asset_of(scenes[0], bands[0])[0].dtype, _tile_px(settings, tile_px, ratio)
        )
        for (name, bands), ratio in zip(_sets(settings, scenes[0]), ratios, strict=True)
    ]
    scored = _scored_set(settings, shapes)
    return [scored, *(shape for shape in shapes if shape is not scored)]


def _sets(settings: ModalitySettings, scene: Scene) -> list[tuple[str, tuple[str, ...]]]:
    if settings.config.band_sets is None:
        return [("", settings.config.bands or bands_of(scene))]
    return [(name, tuple(bands)) for name, bands in settings.config.band_sets.items()]


def _contradiction(settings: ModalitySettings, scene: Scene) -> str | None:
    for name, bands in _sets(settings, scene):
        absent = [band for band in bands if band not in bands_of(scene)]
        if absent:
            return f"has no band {', '.join(absent)}; it has {', '.join(bands_of(scene))}"
        assets = [asset_of(scene, band)[0] for band in bands]
        grids = {asset.shown_grid for asset in assets}
        if len(grids) > 1:
            shown = " and ".join(sorted(grid.in_words() for grid in grids)[:2])
            advice = "give modality.band_sets" if not name else f"band set {name} needs one"
            return f"its bands lie on several grids ({shown}); {advice}"
        types = sorted({asset.dtype for asset in assets})
        if len(types) > 1:
            return f"its bands have several types {types}; expected one per band set"
    own = finest(scene)
    for asset in scene.assets:
        if ratio_between(own, asset.shown_grid) is None:
            return (
                f"its bands lie on grids without a common corner and extent: {own.in_words()} and "
                f"{asset.shown_grid.in_words()}"
            )
    return None


def _ratios(settings: ModalitySettings, stack: Stack, scene: Scene) -> tuple[Fraction, ...]:
    """Leading pixels per pixel of every set, in the order of the sets."""
    ratios = []
    for _, bands in _sets(settings, scene):
        ratio = ratio_between(stack.grid, asset_of(scene, bands[0])[0].shown_grid)
        assert ratio is not None
        ratios.append(ratio)
    return tuple(ratios)


def _tile_px(settings: ModalitySettings, tile_px: int, ratio: Fraction) -> int:
    size = tile_px / ratio
    if size.denominator != 1:
        raise ArchiveError(
            f"a tile of {tile_px} px (store.tile_size_px) holds {float(size):g} px of modality "
            f"{settings.name}, whose pixels are {float(ratio):g} times as long; give a multiple of "
            f"{ratio.numerator} px"
        )
    return int(size)


def _scored_set(settings: ModalitySettings, shapes: list[SetShape]) -> SetShape:
    """The set whose bands are scored; the finest where all or none are."""
    finest_first = sorted(shapes, key=lambda shape: -shape.tile_size_px)
    wanted = set(getattr(settings.scoring, "bands", None) or ())
    if not wanted or len(shapes) == 1:
        if len(shapes) > 1 and settings.scoring is not None:
            raise ArchiveError(
                f"modality {settings.name} has bands of several resolutions; give scoring.bands of one "
                f"of them, for example {', '.join(finest_first[0].bands[:3])}"
            )
        return finest_first[0]
    for shape in finest_first:
        if wanted <= set(shape.bands):
            return shape
    raise ArchiveError(
        f"scoring.bands {sorted(wanted)} of modality {settings.name} lie on several grids; choose bands of "
        "one: " + "; ".join(f"{shape.name} has {', '.join(shape.bands)}" for shape in finest_first)
    )


def _of_one_kind(
    scenes: list[Scene],
    what: str,
    values: Sequence[str],
    settings: ModalitySettings,
    refused: dict[str, str],
) -> list[Scene]:
    """The scenes with the value that nearly all have; the few others, most likely damaged, are refused.

    Raises ArchiveError where they are more than a few: which kind is meant is not ours to choose.
    """
    groups: dict[str, list[str]] = {}
    for scene, value in zip(scenes, values, strict=True):
        groups.setdefault(value, []).append(scene.id)
    usual = max(groups, key=lambda value: len(groups[value]), default="")
    if len(scenes) - len(groups.get(usual, ())) > _FEW * len(scenes):
        found = ", ".join(
            f"{value} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
            for value, names in sorted(groups.items())
        )
        advice = "name the bands" if what == "bands" else "convert them"
        raise ArchiveError(
            f"the scenes of modality {settings.name} differ in their {what}: {found}; one modality needs "
            f"one: give a glob that selects the scenes of one kind, or {advice}"
        )
    for scene, value in zip(scenes, values, strict=True):
        if value != usual:
            refused[scene.id] = (
                f"has the {what} {value:.80}; nearly all scenes of modality {settings.name} have "
                f"{usual:.80}"
            )
    return [scene for scene, value in zip(scenes, values, strict=True) if value == usual]


def _check_scored(settings: ModalitySettings, scene: Scene) -> None:
    scored = getattr(settings.scoring, "bands", None)
    names = settings.config.bands or bands_of(scene)
    unknown = [band for band in scored or () if band not in names]
    if unknown:
        raise ArchiveError(f"scoring.bands names {unknown}; {scene.id} has {', '.join(names)}")
    if settings.scoring is not None and not isinstance(settings.scoring, ExternalConfig):
        try:
            settings.scoring.check_bands(len(scored or names))
        except ValueError as error:
            raise ArchiveError(f"modality {settings.name}: {error}") from None


def _check_numbers(settings: ModalitySettings, scene: Scene) -> None:
    """Raise ArchiveError for a number in the configuration that no pixel can have."""
    types = {np.dtype(asset.dtype) for asset in scene.assets}
    for key in ("nodata", "ignore_index"):
        number = getattr(settings.config, key)
        if number is not None and not any(_can_hold(dtype, number) for dtype in types):
            raise ArchiveError(
                f"{key} of modality {settings.name} is {number:g}, which no pixel of type "
                f"{' or '.join(sorted(dtype.name for dtype in types))} can be ({scene.id}); give the "
                "number that is in the files, or leave it out"
            )


def _can_hold(dtype: np.dtype, number: float) -> bool:
    if dtype.kind == "f":
        return True
    limits = np.iinfo(dtype)
    return limits.min <= number <= limits.max and float(number).is_integer()


def _check_ranges(settings: ModalitySettings, scene: Scene) -> None:
    ranges, number = settings.config.value_ranges(), len(bands_of(scene))
    if ranges is not None and len(ranges) not in {1, number}:
        raise ArchiveError(
            f"value_range of modality {settings.name} has {len(ranges)} pairs; give one, or one per band: "
            f"{scene.id} has {number} bands"
        )
