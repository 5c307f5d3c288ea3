"""Grids of array variables: from coordinates, stated transforms and the many places where a CRS may stand.

Conventions: CF (https://cfconventions.org), rioxarray's `GeoTransform`, and the `proj:` attributes of STAC
and GeoZarr. Coordinates are those of pixel centres. Nothing is guessed: what contradicts itself is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rasterio.crs import CRS

from pipeline.errors import SceneError
from pipeline.georef import canonical_crs
from pipeline.readers.array_base import (
    ArrayFile,
    ArrayHeader,
    Axes,
    coordinate,
    enclosing,
    read_whole,
)
from pipeline.scenes import Grid, Transform

# Coordinates may stray from a regular grid by this share of a pixel.
_TOLERANCE_PX = 1e-3
_WKT_KEYS = ("crs_wkt", "spatial_ref", "proj:wkt2", "esri_pe_string")
_CODE_KEYS = (
    "proj:code",
    "proj:epsg",
    "epsg",
    "epsg_code",
    "EPSG_code",
    "crs",
    "horizontal_CRS_code",
)
_METRES = {"m": 1.0, "meter": 1.0, "metre": 1.0, "meters": 1.0, "metres": 1.0,
           "km": 1000.0, "kilometer": 1000.0, "kilometre": 1000.0}  # fmt: skip
_MAPPING_NAMES = ("spatial_ref", "crs")


def grid_of(file: ArrayFile, header: ArrayHeader, axes: Axes) -> tuple[Grid, list[str]]:
    """The grid of an array's rows and columns, and remarks on what was decided.

    Without a CRS, or without coordinates and a stated transform, it is an engineering grid. Raises
    SceneError for coordinates that are irregular, contradict a stated transform or have an unknown unit.
    """
    lengths = dict(zip(header.dims, header.shape, strict=True))
    height, width = lengths[axes.y], lengths[axes.x]
    if not height or not width:
        raise SceneError(f"its array {header.path} has {height} x {width} px; expected some")
    crs, remarks = _crs(file, header, axes)
    rows = _coordinate(file, header, axes.y, crs)
    cols = _coordinate(file, header, axes.x, crs)
    stated = _stated_transform(file, header)
    if rows is None or cols is None:
        transform = stated
    else:
        transform, remark = _reconciled(rows, cols, stated)
        remarks += remark
    if crs is not None and transform is not None:
        return Grid(height, width, crs, transform), remarks
    if transform is not None:
        remarks.append("its coordinates have no CRS, so it is used without georeference")
    elif crs is not None:
        remarks.append("its pixels have no coordinates, so it is used without georeference")
    return Grid(height, width, None, None), remarks


def grid_facts(header: ArrayHeader, axes: Axes) -> tuple[object, ...]:
    """What a grid is made from, as far as the array itself says: equal for arrays on one grid of a file."""
    lengths = dict(zip(header.dims, header.shape, strict=True))
    names = ("grid_mapping", "proj:transform", "spatial:transform", *_WKT_KEYS, *_CODE_KEYS)
    own = tuple(repr(header.attrs.get(name)) for name in names)
    return (header.group, axes.y, axes.x, lengths[axes.y], lengths[axes.x], *own)


class _Coordinate:
    """Centres of the pixels along one dimension, float64, in units of the CRS."""

    def __init__(self, name: str, values: np.ndarray, rounding: float) -> None:
        self.name, self.values, self.rounding = name, values, rounding

    def line(self) -> tuple[float, float]:
        """Start of the first pixel and the step; SceneError unless the step is the same everywhere."""
        count = len(self.values)
        if count < 2:
            raise SceneError(
                f"its coordinate {self.name} has a single value, so the pixel size is unknown; expected a "
                "GeoTransform attribute of its grid mapping"
            )
        first, step = self.values[0], (self.values[-1] - self.values[0]) / (count - 1)
        regular = first + np.arange(count) * step
        worst = np.abs(self.values - regular).max() / abs(step) if step else np.inf
        if not worst <= _TOLERANCE_PX:
            raise SceneError(
                f"its coordinate {self.name} is not regular: it strays {worst:.3g} px from equal steps of "
                f"{step:.10g}, at most {_TOLERANCE_PX} are allowed; resample it, or write a GeoTransform"
            )
        return _rounded(first - step / 2), _rounded(step)

    def offset_px(self, start: float, step: float) -> float | None:
        """Where in the pixels of a stated grid all values lie: 0.5 is their centre; None if it varies."""
        places = (self.values - start) / step - np.arange(len(self.values))
        tolerance = max(_TOLERANCE_PX, self.rounding / abs(step))
        middle = (places.max() + places.min()) / 2
        return float(middle) if np.ptp(places) <= 2 * tolerance else None


def _reconciled(
    rows: _Coordinate, cols: _Coordinate, stated: Transform | None
) -> tuple[Transform, list[str]]:
    if stated is None:
        (f, e), (c, a) = rows.line(), cols.line()
        return (a, 0.0, c, 0.0, e, f), []
    a, b, c, d, e, f = stated
    if b or d:
        raise SceneError(
            f"states a rotated transform {stated} beside coordinates; remove one of them"
        )
    found = cols.offset_px(c, a), rows.offset_px(f, e)
    for place, remark in (
        (0.5, []),
        (0.0, ["its coordinates are corners of pixels by the transform it states, which counts"]),
    ):
        if all(offset is not None and abs(offset - place) < 0.05 for offset in found):
            return stated, remark
    ends = [f"{cols.values[i]:.10g}, {rows.values[i]:.10g}" for i in (0, -1)]
    raise SceneError(
        f"has coordinates {' ... '.join(ends)}, which contradict the transform it states, {stated}"
    )


def _coordinate(
    file: ArrayFile, header: ArrayHeader, dim: str, crs: str | None
) -> _Coordinate | None:
    found = coordinate(file, header, dim)
    if found is None or found.stored.kind not in "iuf":
        return None
    stored = found.numbers(read_whole(file, found.path))
    values = stored.astype(np.float64)
    if not np.isfinite(values).all():
        raise SceneError(f"its coordinate {found.path} is not finite everywhere")
    scale, offset = scale_and_offset(found)
    factor = _unit_factor(found, crs)
    values = (values * (scale or 1.0) + (offset or 0.0)) * factor
    rounding = 0.0
    if stored.dtype.kind == "f":
        rounding = float(np.spacing(np.abs(stored).max())) * abs((scale or 1.0) * factor)
    return _Coordinate(found.path, values, rounding)


def _unit_factor(found: ArrayHeader, crs: str | None) -> float:
    """Units of the CRS per unit of a coordinate; SceneError for a unit that does not fit."""
    unit = str(found.attrs.get("units", "")).lower()
    if crs is None or unit in ("", "1"):
        return 1.0
    system = CRS.from_user_input(crs)
    if system.is_geographic and unit.startswith("degree"):
        return 1.0
    if system.is_projected and unit in _METRES:
        factor: float = _METRES[unit] / system.linear_units_factor[1]
        return round(factor, 12)
    raise SceneError(
        f"its coordinate {found.path} is in {unit!r:.40}, which does not fit its CRS {crs:.60}; expected "
        f"{'degrees' if system.is_geographic else 'metres'}"
    )


def scale_and_offset(header: ArrayHeader) -> tuple[float | None, float | None]:
    """`scale_factor` and `add_offset` of an array; both None where it states neither, or 1 and 0."""
    scale, offset = (_as_float(header, name) for name in ("scale_factor", "add_offset"))
    pair = (1.0 if scale is None else scale, 0.0 if offset is None else offset)
    return (None, None) if pair == (1.0, 0.0) else pair


def _as_float(header: ArrayHeader, name: str) -> float | None:
    given = header.attrs.get(name)
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise SceneError(f"its array {header.path} has {name} {given!r:.40}; expected a number")
    return value


def _stated_transform(file: ArrayFile, header: ArrayHeader) -> Transform | None:
    mapping = _grid_mapping(file, header)
    given = mapping.attrs.get("GeoTransform") if mapping else None
    if given is not None:
        c, a, b, f, d, e = _six(given, "GeoTransform")
        return (a, b, c, d, e, f)
    for attrs in (header.attrs, file.group_attrs(header.group)):
        for key in ("proj:transform", "spatial:transform"):
            if attrs.get(key) is not None:
                return _six(attrs[key], key)
    return None


def _six(given: Any, name: str) -> Transform:
    try:
        numbers = [float(part) for part in (given.split() if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == 9 and numbers[6:] == [0, 0, 1]:
        numbers = numbers[:6]
    if len(numbers) != 6 or not np.isfinite(numbers).all():
        raise SceneError(f"states {name} {given!r:.100}; expected six numbers")
    a, b, c, d, e, f = numbers
    # GDAL's order has the first and third column in other places, but the same pixel vectors.
    if not (b * f - c * e if name == "GeoTransform" else a * e - b * d):
        raise SceneError(f"states {name} {given!r:.100}, whose pixels have no size")
    return (a, b, c, d, e, f)


def _crs(file: ArrayFile, header: ArrayHeader, axes: Axes) -> tuple[str | None, list[str]]:
    mapping = _grid_mapping(file, header)
    places = [mapping.attrs] if mapping else []
    for attrs in [*places, *_attribute_places(file, header)]:
        for key in (*_WKT_KEYS, *_CODE_KEYS):
            stated = _crs_text(key, attrs.get(key))
            if stated is not None:
                return canonical_crs(stated), []
    found = [coordinate(file, header, dim) for dim in (axes.y, axes.x)]
    units = [str(c.attrs.get("units", "")).lower() if c else "" for c in found]
    if all(u.startswith(("degree", "degrees")) for u in units) and (
        units[0].endswith(("_north", "_n", "n")) and units[1].endswith(("_east", "_e", "e"))
    ):
        return "EPSG:4326", []
    name = mapping.attrs.get("grid_mapping_name") if mapping else None
    if name:
        return None, [f"its grid mapping {name!r:.40} has no WKT (crs_wkt), so its CRS is unknown"]
    return None, []


def _crs_text(key: str, given: Any) -> str | None:
    """A CRS as text that names it; None for an attribute that holds none."""
    if isinstance(given, bool) or given is None or (isinstance(given, str) and not given.strip()):
        return None
    if isinstance(given, int | np.integer):
        return f"EPSG:{given}"
    if not isinstance(given, str):
        return None
    text = given.strip().removeprefix("+init=")
    return f"EPSG:{text}" if text.isdecimal() else text


def _attribute_places(file: ArrayFile, header: ArrayHeader) -> Iterator[Mapping[str, Any]]:
    """Attributes that may state a CRS: the array's, those of its groups outwards, and what EOPF nests."""
    for attrs in (header.attrs, *(file.group_attrs(group) for group in enclosing(header.group))):
        yield attrs
        discovery = attrs.get("stac_discovery")
        if isinstance(discovery, dict) and isinstance(discovery.get("properties"), dict):
            yield discovery["properties"]
        if isinstance(attrs.get("other_metadata"), dict):
            yield attrs["other_metadata"]


def _grid_mapping(file: ArrayFile, header: ArrayHeader) -> ArrayHeader | None:
    """The variable whose attributes describe the CRS: the one the array names, or one of usual name."""
    named = str(header.attrs.get("grid_mapping", "")).split(":")[0].strip()
    for name in [named] if named else _MAPPING_NAMES:
        for group in enclosing(header.group):
            found = file.header(f"{group}/{name}" if group else name)
            if found is not None and (named or not found.shape):
                return found
    return None


def _rounded(value: float) -> float:
    """Twelve significant digits: what is lost in computing equal steps is not a fact of the grid."""
    return float(f"{value:.12g}")
