"""Scenes of one data cube: assets by grid and type, time steps, nodata, scale and offset.

From headers and coordinates; no pixel is read.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import SceneError
from pipeline.readers.array_base import ArrayFile, ArrayHeader
from pipeline.scenes import Asset, Grid, Plane, Scene
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube_bands import BandSource, choose_bands
from pipeline.sources.cube_dates import baselines, single_date, step_dates
from pipeline.sources.cube_grid import grid_facts, grid_of, scale_and_offset

_NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32",
            "float64")  # fmt: skip


class CubePlanner:
    """Plans the scenes of one open store.

    After `scenes`, `refused` holds reasons by scene id and `remarks` what was decided, for people.
    """

    def __init__(
        self, file: ArrayFile, href: str, inner: str, modality: ModalityConfig, fingerprint: str
    ) -> None:
        self._file, self._href, self._inner = file, href, inner
        self._modality, self._fingerprint = modality, fingerprint
        self._grids: dict[Any, Grid] = {}
        self._time_dims: set[str] = set()
        self.remarks: list[str] = []
        self.refused: dict[str, str] = {}

    def scenes(self, path: str) -> list[Scene]:
        """The scenes in file order; their ids begin with `path`."""
        bands, mask = choose_bands(self._file, self._inner, self._modality)
        sources = [*bands.values(), *([mask] if mask else [])]
        for source in sources:
            self._check(source.header)
        images = self._assets(bands)
        name = (self._modality.mask and self._modality.mask.band) or "mask"
        masks = self._assets({name: mask}, is_mask=True) if mask else []
        dates = step_dates(self._file, sources)

        def at(step: int) -> Scene:
            return self._scene(path, images, masks, step)

        if self._modality.static:
            if dates is not None and len(dates) > 1:
                self.remarks.append(
                    f"the modality is static, so the first of its {len(dates)} time steps is taken"
                )
            return [at(0)]
        stated = baselines(self._file, sources[0].header, len(dates or (None,)))
        if dates is None:
            when = single_date(self._file, sources[0].header, self._modality.dates)
            return [replace(at(0), datetime=when, baseline=stated[0])]
        scenes = []
        for step, when in enumerate(dates):
            if when is None:
                self.refused[f"{path}@{step}"] = f"has no date: time step {step} is missing"
                continue
            name = when.replace("-", "").replace(":", "").removesuffix("Z")
            scenes.append(
                replace(at(step), id=f"{path}@{name}", datetime=when, baseline=stated[step])
            )
        return scenes

    def _scene(
        self, path: str, images: Sequence[Asset], masks: Sequence[Asset], step: int
    ) -> Scene:
        placed = all(asset.grid.crs is not None for asset in images)
        return Scene(
            id=path,
            modality=self._modality.name,
            assets=tuple(self._at(asset, step) for asset in images),
            # Where no grid says where pixels lie, the store says that its steps belong together.
            place=None if placed else path,
            mask=self._at(masks[0], step) if masks else None,
        )

    def _at(self, asset: Asset, step: int) -> Asset:
        """The asset at another time step; one without time dimension is the same at every step."""
        select = tuple((dim, step if dim in self._time_dims else at) for dim, at in asset.select)
        return replace(asset, select=select)

    def _check(self, header: ArrayHeader) -> None:
        self._file.check(header.path)
        if header.dtype.name not in _NUMBERS:
            raise SceneError(
                f"its array {header.path} is {header.dtype.name}; expected integers, float32 or float64"
            )

    def _assets(self, bands: Mapping[str, BandSource], is_mask: bool = False) -> list[Asset]:
        """Bands by grid, type and further dimensions, in the order of their first bands, at the first
        time step."""
        groups: dict[Any, dict[str, BandSource]] = defaultdict(dict)
        for band, source in bands.items():
            axes = source.axes
            band_dim = None if source.position is None else axes.band
            fixed = {*axes.rest, axes.time, axes.band} - {band_dim}
            select = tuple(sorted(dim for dim in fixed if dim is not None))
            key = (self._grid(source), source.header.dtype.name, band_dim, select)
            groups[key][band] = source
        return [
            Asset(
                href=self._href,
                kind="array",
                grid=grid,
                dtype=dtype,
                planes=tuple(
                    Plane(band, source.key) if is_mask else self._plane(band, source)
                    for band, source in members.items()
                ),
                block_shape=self._block_shape(grid, members.values()),
                fingerprint=self._fingerprint,
                select=tuple((dim, 0) for dim in select),
                band_dim=band_dim,
            )
            for (grid, dtype, band_dim, select), members in groups.items()
        ]

    def _block_shape(self, grid: Grid, members: Iterable[BandSource]) -> tuple[int, int]:
        """Rows and columns of the largest block."""
        rows, cols = 1, 1
        for source in members:
            lengths = dict(zip(source.header.dims, source.header.block_shape, strict=True))
            rows, cols = max(rows, lengths[source.axes.y]), max(cols, lengths[source.axes.x])
            if source.axes.time is not None:
                self._time_dims.add(source.axes.time)
                self._remark_long_chunks(source, lengths[source.axes.time])
        return min(rows, grid.height), min(cols, grid.width)

    def _grid(self, source: BandSource) -> Grid:
        key = grid_facts(source.header, source.axes)
        if key not in self._grids:
            self._grids[key], remarks = grid_of(self._file, source.header, source.axes)
            self.remarks += remarks
        return self._grids[key]

    def _plane(self, band: str, source: BandSource) -> Plane:
        header, modality = source.header, self._modality
        scale, offset = scale_and_offset(header)
        nodata = modality.nodata
        if nodata is None:
            nodata = self._stated_nodata(header)
        return Plane(band, source.key, nodata, scale, offset)

    def _stated_nodata(self, header: ArrayHeader) -> float | None:
        """`_FillValue` and `missing_value` in the type that is read; SceneError where they differ."""
        stated: list[float] = []
        for name in ("_FillValue", "missing_value"):
            given = header.attrs.get(name)
            for value in [] if given is None else np.atleast_1d(np.asarray(given)).tolist():
                number = _in_type(value, header)
                if number is None:
                    self.remarks.append(f"{name} {value!r:.40} cannot occur in {header.dtype.name}")
                elif not any(same_number(number, other) for other in stated):
                    stated.append(number)
        if len(stated) > 1:
            raise SceneError(
                f"its array {header.path} states several numbers without data, {stated}; give the one that "
                "counts as modality.nodata"
            )
        return stated[0] if stated else None

    def _remark_long_chunks(self, source: BandSource, steps: int) -> None:
        if steps > 1:
            self.remarks.append(
                f"one chunk of {source.header.path} holds {steps} time steps, and reading one decodes all; "
                "in chunks of one step it would be read faster"
            )


def same_number(one: float, other: float) -> bool:
    """Equality under which NaN equals NaN."""
    return one == other or (math.isnan(one) and math.isnan(other))


def _in_type(value: Any, header: ArrayHeader) -> float | None:
    """A stated number as one of the array's own; None if it has no such number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if header.dtype.kind == "f":
        return float(header.dtype.type(number))
    if not number.is_integer():
        return None
    whole, limits = int(value), np.iinfo(header.dtype)
    if header.stored.kind == "i" and header.dtype.kind == "u" and whole < 0:
        whole += limits.max + 1
    return float(whole) if limits.min <= whole <= limits.max else None
