"""What a STAC item states of the grids of its assets, after the projection extension.

Pure. A catalogue is untrusted: every value is checked, and one of the wrong kind raises SceneError with
that value. A CRS is only taken in the forms of a code, WKT or PROJJSON.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import rasterio

from pipeline.errors import SceneError
from pipeline.georef import canonical_crs
from pipeline.scenes import Grid, Transform
from pipeline.sources.stac_facts import SCALARS, as_float, shown

GRID_FIELDS = (
    "proj:code", "proj:epsg", "proj:wkt2", "proj:projjson", "proj:shape", "proj:transform",
)  # fmt: skip
MAX_SIDE_PX = 2**31 - 1
_MAX_CRS_CHARACTERS = 20_000
# PROJ and GDAL take file names and addresses for a CRS too; only these two forms reach them.
_CODE = re.compile(r"(?:EPSG|ESRI|IAU_\d{4}|IGNF|NKG|OGC):[A-Z0-9_.]+")
_WKT = re.compile(r"\s*[A-Z][A-Z0-9_]+\s*[\[(]")


@dataclass(frozen=True, slots=True)
class StatedGrid:
    """What a catalogue states of a grid. `whole` is the grid itself where it states all of it."""

    crs: str | None
    shape: tuple[int, int] | None
    transform: Transform | None
    whole: Grid | None


class SharedGrid(NamedTuple):
    """An item's own grid facts; shape and transform not yet checked."""

    crs: str | None
    shape: tuple[Any, ...] | None
    transform: tuple[Any, ...] | None


def shared_grid(properties: Mapping[str, Any]) -> SharedGrid:
    """What an item's properties state for the grids of all its assets."""
    return SharedGrid(
        _crs(properties),
        _scalars(properties.get("proj:shape"), "proj:shape", 2),
        _scalars(properties.get("proj:transform"), "proj:transform", 9),
    )


def stated_grid(asset: Mapping[str, Any], shared: SharedGrid) -> StatedGrid:
    """The asset's grid; what it does not state itself, the item states for it.

    A shape without a transform (or the reverse) that differs from the item's own belongs to another
    resolution, so the item's other half does not count for it.
    """
    shape = _scalars(asset.get("proj:shape"), "proj:shape", 2)
    transform = _scalars(asset.get("proj:transform"), "proj:transform", 9)
    if shape is None and transform is None:
        shape, transform = shared.shape, shared.transform
    elif shape is None and shared.transform in (None, transform):
        shape = shared.shape
    elif transform is None and shared.shape in (None, shape):
        transform = shared.transform
    return _grid(_crs(asset) or shared.crs, shape, transform)


def _crs(level: Mapping[str, Any]) -> str | None:
    """The CRS in `pipeline.georef`'s form that asset or properties state; None if they state none."""
    code, epsg = level.get("proj:code"), level.get("proj:epsg")
    if code is not None:
        crs = _crs_of_code(code) if isinstance(code, str) else _no_crs("proj:code", code)
        if epsg is not None and _crs_of_epsg(epsg) != crs:
            raise SceneError(
                f"has proj:code {shown(code)} and proj:epsg {shown(epsg)}; expected one CRS"
            )
        return crs
    if epsg is not None:
        return _crs_of_epsg(epsg)
    wkt, projjson = level.get("proj:wkt2"), level.get("proj:projjson")
    if wkt is not None:
        if not isinstance(wkt, str) or not _WKT.match(wkt) or len(wkt) > _MAX_CRS_CHARACTERS:
            _no_crs("proj:wkt2", wkt)
        return _known("proj:wkt2", wkt, wkt)
    return None if projjson is None else _crs_of_projjson(projjson)


@lru_cache(maxsize=4096)
def _crs_of_code(code: str) -> str:
    if not _CODE.fullmatch(code.upper()):
        _no_crs("proj:code", code)
    return _known("proj:code", code, code.upper())


def _crs_of_epsg(epsg: Any) -> str:
    number = as_float(epsg)
    if number is None or not 0 < number < 2**31 or number != int(number):
        _no_crs("proj:epsg", epsg)
    return _crs_of_code(f"EPSG:{int(number)}")


def _crs_of_projjson(value: Any) -> str:
    """PROJJSON as an object, or as the text of one, which tables hold."""
    try:
        system = _without_nulls(json.loads(value) if isinstance(value, str) else value)
        text = json.dumps(system) if isinstance(system, dict) else ""
    except (ValueError, RecursionError):
        text = ""
    if not text or len(text) > _MAX_CRS_CHARACTERS:
        _no_crs("proj:projjson", value)
    return _known("proj:projjson", value, text)


def _without_nulls(value: Any) -> Any:
    """A table's object has every key that any row's has."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _known(what: str, value: Any, text: str) -> str:
    try:
        # Inside an environment GDAL writes what it thinks of a CRS to the log, not to the terminal.
        with rasterio.Env():
            return canonical_crs(text)
    except (ValueError, TypeError, RecursionError):
        # SceneError is a ValueError; this one names the field.
        _no_crs(what, value)


def _no_crs(what: str, value: Any) -> NoReturn:
    raise SceneError(f"has {what} {shown(value)}; expected a known CRS such as EPSG:32632")


@lru_cache(maxsize=2**16)
def _grid(
    crs: str | None, shape: tuple[Any, ...] | None, transform: tuple[Any, ...] | None
) -> StatedGrid:
    """The facts checked. Remembered, so that scenes on one grid share one object."""
    size = None if shape is None else _size(shape)
    affine = None if transform is None else _affine(transform)
    if crs is None or size is None or affine is None:
        return StatedGrid(crs, size, affine, None)
    return StatedGrid(crs, size, affine, Grid(*size, crs, affine))


def _size(shape: tuple[Any, ...]) -> tuple[int, int]:
    sides = [as_float(side) for side in shape]
    if len(sides) != 2 or not all(s and 1 <= s <= MAX_SIDE_PX and s == int(s) for s in sides):
        raise SceneError(
            f"has proj:shape {shown(list(shape))}; expected rows and columns, both at least 1"
        )
    rows, cols = (int(side) for side in sides if side)
    return rows, cols


def _affine(transform: tuple[Any, ...]) -> Transform:
    numbers = [as_float(number) for number in transform]
    last_row = numbers[6:] in ([], [0.0, 0.0, 1.0])
    if len(numbers) < 6 or not last_row or not all(n is not None for n in numbers):
        raise SceneError(
            f"has proj:transform {shown(list(transform))}; expected the six numbers of an affine "
            "transform, or nine that end in 0, 0, 1"
        )
    a, b, c, d, e, f = (float(n) for n in numbers[:6] if n is not None)
    determinant = a * e - b * d
    if not all(map(math.isfinite, (a, b, c, d, e, f, determinant))) or determinant == 0:
        raise SceneError(
            f"has proj:transform {shown(list(transform))}, whose pixels have no area; expected "
            "[pixel width, 0, left, 0, -pixel height, top] in this order"
        )
    return (a, b, c, d, e, f)


def _scalars(value: Any, what: str, longest: int) -> tuple[Any, ...] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) > longest
        or not all(type(v) in SCALARS for v in value)
    ):
        raise SceneError(f"has {what} {shown(value)}; expected a list of numbers")
    return tuple(value)
