"""Dates and processing baselines of data cubes, from coordinates and attributes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import ArchiveError, SceneError
from pipeline.readers.array_base import (
    ArrayFile,
    ArrayHeader,
    coordinate,
    enclosing,
    read_whole,
    scene_errors,
)
from pipeline.settings.modality import DatesConfig
from pipeline.sources.cube_bands import BandSource
from pipeline.sources.names import normal_baseline, parse_datetime

_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")
_CF_ATTRIBUTES = ("units", "calendar", "_FillValue", "missing_value", "scale_factor", "add_offset")
_MOST_STEPS = 100_000
_SINGLE = ("time", "t", "datetime", "date")
_BASELINE = "s2:processing_baseline"

Dates = tuple[str | None, ...]


def step_dates(file: ArrayFile, sources: Sequence[BandSource]) -> Dates | None:
    """ISO dates in UTC, whole seconds, of the time steps that all sources share; None for one missing.

    None without a time dimension, or with one of a single step without date. Raises SceneError for steps
    without dates, of one date, or that differ between arrays, and for calendars no clock follows.
    """
    found: dict[str, Dates | None] = {}
    for source in sources:
        dim, header = source.axes.time, source.header
        if dim is not None:
            own = coordinate(file, header, dim)
            key = own.path if own else f"{header.path}:{dim}"
            if key not in found:
                found[key] = _dates_along(file, header, dim, own)
    different = list(dict.fromkeys(found.values()))
    if len(different) > 1:
        raise SceneError(
            f"its time coordinates {', '.join(found)} differ; name bands with the same time steps"
        )
    return different[0] if different else None


def single_date(file: ArrayFile, header: ArrayHeader, config: DatesConfig | None) -> str | None:
    """ISO date in UTC of a store without a time dimension; None where nothing states it.

    `dates.tag` names an attribute, with dots for those inside others. Otherwise it is a single `time`, or
    what the STAC properties of an EOPF product say.
    """
    if config is not None and config.tag is not None:
        value = _attribute(file, header, config.tag)
        if value is None:
            raise SceneError(f"has no attribute {config.tag} (dates.tag)")
        return parse_datetime(str(value), config.format)
    for found in _beside(file, header, _SINGLE):
        if int(np.prod(found.shape)) == 1:
            (when,) = _decoded(file, found)
            return when
    for name in ("datetime", "start_datetime"):
        value = _attribute(file, header, f"stac_discovery.properties.{name}")
        if isinstance(value, str) and value not in ("", "null"):
            return parse_datetime(value)
    return None


def baselines(file: ArrayFile, header: ArrayHeader, num_steps: int) -> list[str | None]:
    """Processing baseline, such as 04.00, of every time step; None where nothing states it.

    Taken from the array or STAC property s2:processing_baseline.
    """
    for found in _beside(file, header, (_BASELINE,)):
        values = np.atleast_1d(read_whole(file, found.path)).tolist()
        if len(values) in (1, num_steps):
            texts: list[str | None] = [_baseline(value) for value in values]
            return texts * num_steps if len(texts) == 1 else texts
    properties = _attribute(file, header, "stac_discovery.properties")
    value = properties.get(_BASELINE) if isinstance(properties, Mapping) else None
    return [None if value is None else _baseline(value)] * num_steps


def _dates_along(
    file: ArrayFile, header: ArrayHeader, dim: str, own: ArrayHeader | None
) -> Dates | None:
    length = header.shape[header.dims.index(dim)]
    if own is None:
        if length == 1:
            return None
        raise SceneError(
            f"has {length} time steps along {dim}, but no coordinate {dim} with their dates"
        )
    if not 0 < length <= _MOST_STEPS:
        raise SceneError(f"has {length} time steps along {dim}; expected 1 to {_MOST_STEPS}")
    dates = _decoded(file, own)
    seen: dict[str, int] = {}
    for step, when in enumerate(dates):
        if when is not None and seen.setdefault(when, step) != step:
            raise SceneError(
                f"has two time steps of {when}, positions {seen[when]} and {step} of {own.path}; drop one, "
                "scenes are told apart by their second"
            )
    return dates


def _decoded(file: ArrayFile, header: ArrayHeader) -> Dates:
    values = header.numbers(read_whole(file, header.path)).reshape(-1)
    if values.dtype.kind in "SUO":
        texts = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]
        return tuple(parse_datetime(text) if text.strip() else None for text in texts)
    if values.dtype.kind != "M":
        values = _from_cf(header, values)
    texts = np.datetime_as_string(values.astype("M8[s]"), unit="s").tolist()
    return tuple(None if text == "NaT" else f"{text}Z" for text in texts)


def _from_cf(header: ArrayHeader, values: np.ndarray) -> np.ndarray:
    """datetime64 of numbers with CF units such as `days since 1990-01-01`."""
    units, calendar = (str(header.attrs.get(name, "")) for name in ("units", "calendar"))
    if " since " not in units:
        raise SceneError(
            f"its coordinate {header.path} has units {units!r:.60}; expected such as "
            "'days since 1990-01-01'"
        )
    if calendar and calendar.lower() not in _CALENDARS:
        raise SceneError(
            f"its coordinate {header.path} has calendar {calendar!r:.40}, whose days are no dates; "
            f"expected one of {', '.join(_CALENDARS)}"
        )
    try:
        import xarray as xr
    except ImportError:
        raise ArchiveError("dates of data cubes need xarray; install aptile[xarray]") from None
    attrs = {name: header.attrs[name] for name in _CF_ATTRIBUTES if name in header.attrs}
    with scene_errors():
        coder = xr.coders.CFDatetimeCoder(use_cftime=False)
        coded = xr.Dataset({"time": ("step", values, attrs)})
        return xr.decode_cf(coded, decode_times=coder, decode_timedelta=False)["time"].to_numpy()


def _beside(file: ArrayFile, header: ArrayHeader, names: Sequence[str]) -> Iterator[ArrayHeader]:
    """Arrays of these names in the group of an array or one around it."""
    for group in enclosing(header.group):
        for name in names:
            found = file.header(f"{group}/{name}" if group else name)
            if found is not None:
                yield found


def _attribute(file: ArrayFile, header: ArrayHeader, name: str) -> Any:
    """An attribute of the array or of a group around it; dots lead into nested ones."""
    for attrs in (header.attrs, *(file.group_attrs(group) for group in enclosing(header.group))):
        value: Any = attrs.get(name)
        if value is None:
            value = attrs
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _baseline(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return f"{value:05.2f}" if isinstance(value, float) else normal_baseline(str(value).strip())
