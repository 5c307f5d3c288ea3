"""What a STAC item states of one asset: its bands, pixel type, size and checksum.

Pure: JSON values in, facts out. STAC 1.0 (`eo:bands`, `raster:bands`, `proj:epsg`) and 1.1 (`bands`,
`proj:code`) are read alike, and a null means the same as no value at all. A catalogue is untrusted:
every value is checked, and one of the wrong kind raises SceneError with that value.

Sources: the STAC common metadata (bands, data_type, nodata) and the STAC extensions projection, raster,
electro-optical and file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.errors import SceneError

DTYPES = frozenset(
    ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
)
BAND_LISTS = ("bands", "eo:bands", "raster:bands")
# By fact, the names it has in STAC 1.1 and before, in that order.
_BAND_FIELDS = {
    "name": ("name",),
    "alias": ("eo:common_name", "common_name"),
    "dtype": ("data_type",),
    "nodata": ("nodata",),
    "scale": ("raster:scale", "scale"),
    "offset": ("raster:offset", "offset"),
}
BAND_FIELDS = tuple(name for names in _BAND_FIELDS.values() for name in names)
# In STAC 1.1, what all bands have in common stands beside the list.
SHARED_FIELDS = ("data_type", "nodata", "raster:scale", "raster:offset")
FILE_FIELDS = ("href", "file:checksum", "file:size")
MAX_BANDS = 1000
SCALARS = frozenset((str, int, float, bool, type(None)))
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Band(NamedTuple):
    """One band as a catalogue lists it; None where it states nothing. Names are in lower case."""

    name: str | None
    alias: str | None
    dtype: str | None
    nodata: float | None
    scale: float | None
    offset: float | None


@dataclass(frozen=True, slots=True)
class BandList:
    """The bands of an asset in file order; none if it lists none. `names` has all their names and common
    names, in lower case; `shared` is a band without a name, of what the asset states for all of them.
    Where they contradict each other, `error` says how, and only the names are there.
    """

    names: tuple[str, ...]
    bands: tuple[Band, ...]
    shared: Band | None
    error: str | None

    def checked(self) -> tuple[Band, ...]:
        """The bands; SceneError where they contradict each other."""
        if self.error is not None:
            raise SceneError(self.error)
        return self.bands

    def known(self) -> tuple[Band, ...]:
        """The bands, or the one band of a file that lists none."""
        assert self.shared is not None
        return self.bands or (self.shared,)


def stated_bands(asset: Mapping[str, Any]) -> BandList:
    """The bands an asset lists, from all of its lists; never raises.

    What an asset states for all its bands counts for each that says nothing of its own.
    """
    listed = asset.get("bands")
    if isinstance(listed, BandList):
        return listed
    lists = {name: asset[name] for name in BAND_LISTS if asset.get(name)}
    try:
        bands = tuple(_merged(bands, asset) for bands in _side_by_side(lists))
        return BandList(_names(lists), bands, _merged((), asset), None)
    except SceneError as error:
        return BandList(_names(lists), (), None, str(error))


def _side_by_side(lists: dict[str, Any]) -> Iterator[tuple[Mapping[str, Any], ...]]:
    """The entries of each band in all lists; SceneError unless the lists go together."""
    for name, bands in lists.items():
        if not isinstance(bands, list) or len(bands) > MAX_BANDS:
            raise SceneError(f"has {name} {shown(bands)}; expected a list of bands")
        if not all(isinstance(band, Mapping) for band in bands):
            raise SceneError(f"has {name} {shown(bands)}; expected each band to be an object")
    lengths = {name: len(bands) for name, bands in lists.items()}
    if len(set(lengths.values())) > 1:
        found = " and ".join(f"{number} {name}" for name, number in lengths.items())
        raise SceneError(f"lists {found}; expected the same bands in each list")
    yield from zip(*lists.values(), strict=True)


def _names(lists: dict[str, Any]) -> tuple[str, ...]:
    bands = [band for entries in lists.values() if isinstance(entries, list) for band in entries]
    names = [
        band.get(field)
        for band in bands
        if isinstance(band, Mapping)
        for field in (*_BAND_FIELDS["name"], *_BAND_FIELDS["alias"])
    ]
    return tuple(sorted({name.lower() for name in names if isinstance(name, str)}))


def stated_dtype(bands: tuple[Band, ...]) -> str | None:
    """The one pixel type of an asset's bands; None where the catalogue states none."""
    if len(bands) == 1:
        return bands[0].dtype
    types = sorted({band.dtype for band in bands if band.dtype is not None})
    if len(types) > 1:
        raise SceneError(f"has bands of several types {types}; expected one type per file")
    return types[0] if types else None


def stated_checksum(asset: Mapping[str, Any]) -> str | None:
    """The multihash of the file, in lower-case hex."""
    checksum = asset.get("file:checksum")
    if checksum is None:
        return None
    try:
        # Bytes in hex, without the spaces that Python allows between them.
        known = isinstance(checksum, str) and checksum.isalnum() and bytes.fromhex(checksum)
    except ValueError:
        known = False
    if not known:
        raise SceneError(f"has file:checksum {shown(checksum)}; expected a multihash in hex")
    return str(checksum).lower()


def stated_fingerprint(asset: Mapping[str, Any], checksum: str | None, updated: str | None) -> str:
    """Text that differs when the catalogue says that the file does: checksum, else size and update."""
    if checksum is not None:
        return checksum
    size = asset.get("file:size")
    if size is None:
        return updated or "stated"
    number = stated_number(size, "file:size")
    if number < 0 or number != math.floor(number):
        raise SceneError(f"has file:size {shown(size)}; expected a whole number of bytes")
    return f"{int(number)}-{updated}" if updated else str(int(number))


def stated_number(value: Any, what: str) -> float:
    """A finite number; SceneError for anything else."""
    number = as_float(value)
    if number is None or not math.isfinite(number):
        raise SceneError(f"has {what} {shown(value)}; expected a number")
    return number


def _merged(lists: tuple[Mapping[str, Any], ...], asset: Mapping[str, Any]) -> Band:
    """One band from its entries in several lists, and then from what the asset states for all."""
    facts = []
    for fact, names in _BAND_FIELDS.items():
        found = None
        for entry in lists:
            for name in names:
                if found is None:
                    found = entry.get(name)
        shared = names[0]
        if found is None and shared in SHARED_FIELDS:
            found = asset.get(shared)
        if type(found) not in SCALARS:
            raise SceneError(f"has a band whose {fact} is {shown(found)}; expected one value")
        facts.append(found)
    return _band(*facts)


@lru_cache(maxsize=2**16, typed=True)
def _band(name: Any, alias: Any, dtype: Any, nodata: Any, scale: Any, offset: Any) -> Band:
    factor = None if scale is None else stated_number(scale, "scale")
    if factor == 0:
        raise SceneError("has a band of scale 0, which would make all its numbers equal")
    shift = None if offset is None else stated_number(offset, "offset")
    if factor is None and shift is not None:
        factor = 1.0
    elif factor is not None and shift is None:
        shift = 0.0
    return Band(
        name=_name(name, "name"),
        alias=_name(alias, "common name"),
        dtype=_dtype(dtype),
        nodata=_nodata(nodata),
        scale=factor,
        offset=shift,
    )


def _name(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SceneError(f"has a band whose {what} is {shown(value)}; expected text")
    return value.lower() if value else None


def _dtype(value: Any) -> str | None:
    if value is None or value == "other":
        return None
    if not isinstance(value, str):
        raise SceneError(f"has data_type {shown(value)}; expected text such as uint16")
    if value.startswith(("cint", "cfloat", "complex")):
        raise SceneError(
            f"has complex pixels ({value:.20}); expected real numbers, such as amplitude or power in a "
            "file of its own"
        )
    if value not in DTYPES:
        raise SceneError(
            f"has data_type {shown(value)}; expected one of {', '.join(sorted(DTYPES))}"
        )
    return value


def _nodata(value: Any) -> float | None:
    if value is None:
        return None
    number = _SPECIAL.get(value.lower()) if isinstance(value, str) else as_float(value)
    if number is None:
        raise SceneError(f"has nodata {shown(value)}; expected a number, nan, inf or -inf")
    return number


def as_float(value: Any) -> float | None:
    """The number as a float; None for what is none, or too large for one."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def shown(value: Any) -> str:
    """A value for a message: one line, not too long, whatever it holds."""
    try:
        text = (
            ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        )
    except (RecursionError, ValueError):
        return "something too deep to show"
    return text if len(text) <= 80 else text[:77] + "..."
