"""Which bands of a raster file are those of a modality. Pure: from headers, without opening a file."""

from pipeline.errors import SceneError
from pipeline.readers.rasters import RasterHeader
from pipeline.scenes import Plane
from pipeline.settings.modality import ModalityConfig
from pipeline.settings.presets import band_aliases
from pipeline.sources.names import printable

_SHOWN_BANDS = 20


def choose_planes(
    header: RasterHeader, modality: ModalityConfig
) -> tuple[list[Plane], Plane | None]:
    """The modality's bands, in its order, in a file that has several; and its mask band, if it has one.

    A band is found by the description the file has of it, one of `texts_of`, or by a number that
    `modality.assets` gives for it, counted from 1; further bands of the file do not matter then.
    Where the file describes none of the bands, it must have exactly as many, in the modality's order.
    A modality that names no bands gets all of them but the mask, as band_1, band_2 ...

    The mask's plane has no nodata, scale or offset: a file's tags speak of its measured bands.
    Raises SceneError for a file that lacks bands or has others.
    """
    mask = _mask_number(header, modality)
    numbers = _numbers(header, modality, mask)
    planes = [plane_of(header, number, band, modality) for band, number in numbers.items()]
    if mask is None:
        return planes, None
    assert modality.mask is not None
    return planes, Plane(modality.mask.band or "mask", mask)


def plane_of(header: RasterHeader, number: int, band: str, modality: ModalityConfig) -> Plane:
    """A band, by its 0-based number in the file.

    The modality's nodata wins over the file's. Scale and offset are those the file states: what holds
    where it states none depends on the scene's baseline too (`pipeline.planning.harmonize`).
    """
    nodata = header.nodata[number] if modality.nodata is None else modality.nodata
    return Plane(band, number, nodata, header.scales[number], header.offsets[number])


def texts_of(band: str, modality: ModalityConfig) -> tuple[str, ...]:
    """How files may call a band, the likeliest first: what `modality.assets` says and nothing else, or
    its name and those that products use for a band of that name."""
    given = (modality.assets or {}).get(band)
    return (band, *band_aliases(band)) if given is None else (given,)


def wanted_bands(modality: ModalityConfig) -> tuple[str, ...] | None:
    """Names of the bands: `modality.bands`, else those that `modality.assets` has; None for any."""
    mask = modality.mask.band if modality.mask else None
    named = tuple(band for band in modality.assets or () if band != mask)
    return modality.bands or named or None


def _numbers(header: RasterHeader, modality: ModalityConfig, mask: int | None) -> dict[str, int]:
    """0-based numbers of the bands by name."""
    rest = [number for number in range(header.num_bands) if number != mask]
    if not rest:
        raise SceneError("has no band besides the mask")
    bands = wanted_bands(modality)
    if bands is None:
        return {f"band_{number + 1}": number for number in rest}
    found = {band: _number(band, header, modality) for band in bands}
    known = {band: number for band, number in found.items() if number is not None}
    if len(known) == len(bands):
        _refuse_repeated([*known.values(), *([] if mask is None else [mask])], header)
        return known
    if known or not set(bands).isdisjoint(modality.assets or ()):
        lacking = ", ".join(band for band in bands if band not in known)
        raise SceneError(f"lacks the bands {lacking}; it has {_in_words(header)}")
    if len(rest) != len(bands):
        one_is_mask = ", one of them the mask" if mask is not None else ""
        raise SceneError(
            f"has {_in_words(header)}{one_is_mask}; modality {modality.name} has {len(bands)}; name each "
            "in modality.assets by its description or number"
        )
    return dict(zip(bands, rest, strict=True))


def _mask_number(header: RasterHeader, modality: ModalityConfig) -> int | None:
    if modality.mask is None or modality.mask.band is None:
        return None
    number = _number(modality.mask.band, header, modality)
    if number is None:
        raise SceneError(
            f"lacks the mask band {modality.mask.band}; it has {_in_words(header)}; name it in "
            "modality.assets by its description or number"
        )
    return number


def _number(band: str, header: RasterHeader, modality: ModalityConfig) -> int | None:
    """0-based number of a band that the file describes or whose number the modality states."""
    given = (modality.assets or {}).get(band, "")
    if given.isascii() and given.isdecimal():
        if not 1 <= int(given) <= header.num_bands:
            raise SceneError(
                f"has {header.num_bands} bands; modality.assets says that {band} is number {given}"
            )
        return int(given) - 1
    for text in texts_of(band, modality):
        numbers = [n for n, description in enumerate(header.descriptions) if description == text]
        if len(numbers) > 1:
            raise SceneError(
                f"describes {len(numbers)} of its bands as {text!r:.80}; name {band} in modality.assets by "
                "its number"
            )
        if numbers:
            return numbers[0]
    return None


def _refuse_repeated(numbers: list[int], header: RasterHeader) -> None:
    repeated = next((number for number in numbers if numbers.count(number) > 1), None)
    if repeated is not None:
        raise SceneError(
            f"has one band, number {repeated + 1}, for two of the modality's; it has {_in_words(header)}; "
            "name each in modality.assets"
        )


def _in_words(header: RasterHeader) -> str:
    bands = f"{header.num_bands} band{'s' if header.num_bands > 1 else ''}"
    if not any(header.descriptions):
        return f"{bands} without descriptions"
    different = list(dict.fromkeys(f"{text or '':.40}" for text in header.descriptions))
    shown = ", ".join(different[:_SHOWN_BANDS])
    more = ", ..." if len(different) > _SHOWN_BANDS else ""
    return f"{bands} described as {printable(shown)}{more}"
