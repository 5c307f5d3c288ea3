"""STAC items as scenes: which asset holds which band, and what is known without opening a file.

Pure: an item (a dict, as JSON has it) becomes a `Draft`. A draft whose catalogue states grid and type is
a scene already; where something is missing, `finished` takes it from the file's header, and refuses
what contradicts the catalogue.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.errors import ConfigError, SceneError
from pipeline.readers.compare import compare_header
from pipeline.readers.rasters import RasterHeader
from pipeline.scenes import Asset, Grid, Plane, Scene
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.names import parse_datetime
from pipeline.sources.stac_choice import AssetChoice, in_asset, names_in_words
from pipeline.sources.stac_facts import (
    Band,
    shown,
    stated_checksum,
    stated_dtype,
    stated_fingerprint,
    stated_number,
)
from pipeline.sources.stac_grids import GRID_FIELDS, StatedGrid, shared_grid, stated_grid
from pipeline.sources.stac_links import Hrefs

# The block shape of most cloud-optimised GeoTIFFs; it only decides in which order tiles are laid out.
ASSUMED_BLOCK_SHAPE = (512, 512)
DATE_FIELDS = ("datetime", "start_datetime", "updated")
PROPERTY_FIELDS = (
    *DATE_FIELDS, *GRID_FIELDS, "grid:code", "s2:mgrs_tile", "mgrs:utm_zone", "mgrs:latitude_band",
    "mgrs:grid_square", "s2:processing_baseline", "processing:version", "earthsearch:boa_offset_applied",
)  # fmt: skip
_MAX_CHARACTERS = 512
_MGRS = re.compile(r"(?:MGRS-)?0?(\d{1,2})([C-X])([A-Z]{2})")


@dataclass(frozen=True)
class Wanted:
    """What a modality asks of an item: bands in order, the asset keys given for some, the mask's band."""

    bands: tuple[str, ...]
    keys: dict[str, str]
    mask: str | None

    @property
    def all_bands(self) -> tuple[str, ...]:
        return (*self.bands, *([] if self.mask is None else [self.mask]))


class Stated(NamedTuple):
    """What a catalogue states of one file. `num_bands` is None where it does not list the bands."""

    key: str
    href: str
    planes: tuple[Plane, ...]
    grid: StatedGrid
    dtype: str | None
    num_bands: int | None
    checksum: str | None
    fingerprint: str

    @property
    def complete(self) -> bool:
        """Whether the file need not be opened to plan with it."""
        return self.grid.whole is not None and self.dtype is not None


@dataclass(frozen=True, slots=True)
class Draft:
    """A scene as its catalogue states it."""

    id: str
    modality: str
    assets: tuple[Stated, ...]
    datetime: str | None
    place: str | None
    mask: Stated | None
    baseline: str | None

    @property
    def complete(self) -> bool:
        return all(asset.complete for asset in self.files)

    @property
    def files(self) -> tuple[Stated, ...]:
        return self.assets if self.mask is None else (*self.assets, self.mask)


def wanted_of(modality: ModalityConfig) -> Wanted:
    """What to look for in items. Raises ConfigError for a modality that does not name its bands.

    An item's assets are also previews, metadata and other resolutions; which are meant is never guessed.
    """
    keys = dict(modality.assets or {})
    mask = modality.mask.band if modality.mask is not None else None
    bands = modality.bands or tuple(band for band in keys if band != mask)
    if not bands:
        raise ConfigError(
            f"modality {modality.name}: a STAC catalogue has assets that are no bands; give "
            "modality.bands (and modality.assets, by band the asset key, where they differ)"
        )
    return Wanted(tuple(bands), keys, mask)


def item_id(item: Any) -> str:
    """The item's id; SceneError for what is no item or has no usable id."""
    if not isinstance(item, Mapping):
        raise SceneError(f"is {shown(item)}; expected a STAC item")
    name = item.get("id")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_CHARACTERS:
        raise SceneError(f"has the id {shown(name)}; expected a short text")
    if not name.isprintable():
        raise SceneError(f"has the id {shown(name)}; expected printable characters")
    return name


def drafted(
    item: Mapping[str, Any], base: str, wanted: Wanted, modality: str, hrefs: Hrefs
) -> Draft | None:
    """The scene an item describes; None if it has none of the bands.

    `base` is the folder or URL that its relative hrefs start from. Raises SceneError for an item that
    lacks some bands, offers one twice, or states what cannot be.
    """
    properties, assets = _object(item, "properties"), _object(item, "assets")
    choice = AssetChoice(assets)
    places = {
        band: place
        for band in wanted.all_bands
        if (place := choice.of(band, wanted.keys.get(band))) is not None
    }
    if not any(band in places for band in wanted.bands):
        return None
    lacking = [band for band in wanted.all_bands if band not in places]
    if lacking:
        raise SceneError(
            f"lacks {lacking}; it has the assets {names_in_words(assets)}; give modality.assets, by band "
            "the asset key"
        )
    of_key: dict[str, list[tuple[str, int]]] = {}
    for band in wanted.bands:
        key, position = places[band]
        of_key.setdefault(key, []).append((band, position))
    item_facts = _ItemFacts(properties, base, hrefs, choice)
    mask = None
    if wanted.mask is not None:
        key, position = places[wanted.mask]
        mask = item_facts.stated(key, [(wanted.mask, position)], is_mask=True)
    return Draft(
        id=item["id"],
        modality=modality,
        assets=tuple(item_facts.stated(key, bands) for key, bands in of_key.items()),
        datetime=_date(properties),
        place=_place(properties),
        mask=mask,
        baseline=_baseline(properties),
    )


def finished(draft: Draft, headers: Mapping[str, tuple[RasterHeader, str]]) -> Scene:
    """The scene of a draft; `headers` has header and fingerprint, by href, of the files opened for it.

    Raises SceneError, with both values, where a header contradicts the catalogue.
    """
    return Scene(
        id=draft.id,
        modality=draft.modality,
        assets=tuple(_asset(stated, headers.get(stated.href)) for stated in draft.assets),
        datetime=draft.datetime,
        place=draft.place,
        mask=None if draft.mask is None else _asset(draft.mask, headers.get(draft.mask.href)),
        baseline=draft.baseline,
    )


def _asset(stated: Stated, opened: tuple[RasterHeader, str] | None) -> Asset:
    if opened is None:
        assert stated.grid.whole is not None
        assert stated.dtype is not None
        return Asset(
            href=stated.href,
            kind="raster",
            grid=stated.grid.whole,
            dtype=stated.dtype,
            planes=stated.planes,
            block_shape=ASSUMED_BLOCK_SHAPE,
            fingerprint=stated.fingerprint,
            header_seen=False,
            checksum=stated.checksum,
        )
    header, fingerprint = opened
    try:
        return _asset_with_header(stated, header, fingerprint)
    except SceneError as error:
        raise SceneError(f"asset {shown(stated.key)} {error}") from None


def _asset_with_header(stated: Stated, header: RasterHeader, fingerprint: str) -> Asset:
    if stated.num_bands is not None and stated.num_bands != header.num_bands:
        raise SceneError(
            f"has {header.num_bands} bands in its file, {stated.num_bands} in its catalogue"
        )
    if stated.num_bands is None and header.num_bands != 1:
        raise SceneError(
            f"has {header.num_bands} bands in its file, and its catalogue does not say which is which; "
            "expected one band, or a list of bands in the catalogue"
        )
    rows, cols = stated.grid.shape or (header.grid.height, header.grid.width)
    crs, transform = stated.grid.crs or header.grid.crs, stated.grid.transform
    asset = Asset(
        href=stated.href,
        kind="raster",
        grid=Grid(rows, cols, crs, transform or header.grid.transform),
        dtype=stated.dtype or header.dtype,
        planes=stated.planes,
        block_shape=header.block_shape,
        fingerprint=fingerprint,
        checksum=stated.checksum,
    )
    compare_header(asset, header)
    # Where both agree, the file's own form counts, so that equal grids are equal objects.
    planes = tuple(_with_header(plane, header) for plane in stated.planes)
    return replace(asset, grid=header.grid, planes=planes)


def _with_header(plane: Plane, header: RasterHeader) -> Plane:
    """A plane with what only the file says of it."""
    number = int(plane.key)
    scale = header.scales[number] if plane.scale is None else plane.scale
    offset = header.offsets[number] if plane.offset is None else plane.offset
    nodata = header.nodata[number] if plane.nodata is None else plane.nodata
    return Plane(plane.band, number, nodata, scale, offset)


class _ItemFacts:
    """States the assets of one item."""

    def __init__(
        self, properties: Mapping[str, Any], base: str, hrefs: Hrefs, choice: AssetChoice
    ) -> None:
        self._base, self._hrefs, self._choice = base, hrefs, choice
        self._grid = shared_grid(properties)
        applied = properties.get("earthsearch:boa_offset_applied")
        if applied is not None and not isinstance(applied, bool):
            raise SceneError(
                f"has earthsearch:boa_offset_applied {shown(applied)}; expected true or false"
            )
        self._offset_removed = bool(applied)
        self._updated = _text(properties, "updated")

    def stated(self, key: str, bands: list[tuple[str, int]], is_mask: bool = False) -> Stated:
        """What the catalogue states of an asset, and the planes of some of its bands."""
        return in_asset(key, self._stated, key, bands, is_mask)

    def _stated(self, key: str, bands: list[tuple[str, int]], is_mask: bool) -> Stated:
        asset, listed = self._choice.assets[key], self._choice.bands(key)
        known = listed.known()
        if len({position for _, position in bands}) != len(bands):
            raise SceneError(
                f"lists {len(listed.bands)} bands, and {[band for band, _ in bands]} are all said to be "
                "in it; expected a list of its bands"
            )
        removed = self._offset_removed and not is_mask
        checksum = stated_checksum(asset)
        return Stated(
            key=key,
            href=self._hrefs.raster(asset.get("href"), self._base),
            planes=_planes(tuple(bands), known, removed),
            grid=stated_grid(asset, self._grid),
            dtype=stated_dtype(known),
            num_bands=len(listed.bands) or None,
            checksum=checksum,
            fingerprint=stated_fingerprint(asset, checksum, self._updated),
        )


@lru_cache(maxsize=4096)
def _planes(
    bands: tuple[tuple[str, int], ...], stated: tuple[Band, ...], offset_removed: bool
) -> tuple[Plane, ...]:
    """Planes of (band, position) pairs. Remembered, so that scenes share them.

    Earth Search says per item that the offset its assets still list is no longer in their numbers.
    """
    return tuple(
        Plane(
            band,
            at,
            stated[at].nodata,
            stated[at].scale,
            0.0 if offset_removed else stated[at].offset,
        )
        for band, at in bands
    )


def _object(item: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = item.get(name)
    if not isinstance(value, Mapping):
        raise SceneError(f"has {name} {shown(value)}; expected an object")
    return value


def _text(properties: Mapping[str, Any], name: str) -> str | None:
    value = properties.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_CHARACTERS:
        raise SceneError(f"has {name} {shown(value)}; expected a short text")
    return value or None


def _date(properties: Mapping[str, Any]) -> str | None:
    """The date of the scene, or the start of the period it is made of."""
    text = _text(properties, "datetime") or _text(properties, "start_datetime")
    return None if text is None else parse_datetime(text)


def _place(properties: Mapping[str, Any]) -> str | None:
    """The tile code; codes of the military grid have one form, "05VMG", whatever field they stand in."""
    code = _text(properties, "grid:code") or _text(properties, "s2:mgrs_tile")
    parts = [
        properties.get(f"mgrs:{part}") for part in ("utm_zone", "latitude_band", "grid_square")
    ]
    if code is None and None not in parts:
        code = "".join(map(str, parts))
    if code is None:
        return None
    match = _MGRS.fullmatch(code)
    return code if match is None else f"{int(match[1]):02d}{match[2]}{match[3]}"


def _baseline(properties: Mapping[str, Any]) -> str | None:
    """The processing baseline as text, "04.00" also where a catalogue holds the number 4.0."""
    for name in ("s2:processing_baseline", "processing:version"):
        value = properties.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{stated_number(value, name):05.2f}"
        if value is not None:
            return _text(properties, name)
    return None
