"""Which arrays of a Zarr or netCDF file are the bands of a modality. From headers; no pixel is read."""

import re
from collections import defaultdict
from dataclasses import dataclass

from pipeline.errors import SceneError
from pipeline.readers.array_base import (
    ArrayFile,
    ArrayHeader,
    Axes,
    checked_path,
    coordinate,
    find_axes,
    read_whole,
)
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.bands import wanted_bands

_SHOWN = 20
_MOST_BANDS = 10_000
# Attributes by which arrays name others that are no bands.
_REFERRING = ("coordinates", "bounds", "grid_mapping", "ancillary_variables")


@dataclass(frozen=True)
class BandSource:
    """One band: an array with rows and columns, and the position along its band dimension, if any."""

    header: ArrayHeader
    axes: Axes
    position: int | None = None

    @property
    def key(self) -> str:
        """The key of the band's plane (see `pipeline.readers.arrays.plane_key`)."""
        path = self.header.path
        return path if self.position is None else f"{path}[{self.position}]"


def choose_bands(
    file: ArrayFile, inner: str, modality: ModalityConfig
) -> tuple[dict[str, BandSource], BandSource | None]:
    """The modality's bands by name, in its order, and its mask.

    `inner` is a group, or an array whose band dimension holds the bands. A band is the array named like
    it or by `modality.assets`, in the group or as a path from it or from the root; or, where none of
    these exists, a position along the band dimension of the group's only such array: by its coordinate's
    names, or in order where the numbers are equal. Without names, all arrays of one type are bands.
    Raises SceneError where that leaves a choice.
    """
    chooser = _Chooser(file, inner, modality)
    return chooser.bands(), chooser.mask()


class _Chooser:
    def __init__(self, file: ArrayFile, inner: str, modality: ModalityConfig) -> None:
        self.file, self.modality = file, modality
        self.only = file.header(inner) if inner else None
        self.group = self.only.group if self.only else inner
        self.mask_name = modality.mask.band if modality.mask else None

    def bands(self) -> dict[str, BandSource]:
        wanted = wanted_bands(self.modality)
        if wanted is None:
            return self._all()
        found = {band: self._named(band) for band in wanted}
        known = {band: source for band, source in found.items() if source is not None}
        if len(known) == len(wanted):
            return known
        stacks = [] if known else self._stacks()
        if len(stacks) == 1:
            return self._along(stacks[0], wanted)
        lacking = ", ".join(band for band in wanted if band not in known)
        raise SceneError(
            f"has no array for {lacking}; it has {self._shown()}: name the arrays in modality.assets"
        )

    def mask(self) -> BandSource | None:
        if self.mask_name is None:
            return None
        source = self._named(self.mask_name)
        if source is not None:
            return source
        stacks = self._stacks()
        if len(stacks) == 1:
            names = self._names(stacks[0])
            wanted = self._asset(self.mask_name)
            if names is not None and wanted in names:
                return BandSource(*stacks[0], names.index(wanted))
        raise SceneError(
            f"has no array for the mask {self.mask_name}; it has {self._shown()}: name it in "
            "modality.assets"
        )

    def _asset(self, band: str) -> str:
        return (self.modality.assets or {}).get(band, band)

    def _named(self, band: str) -> BandSource | None:
        """The array that is a band of itself; None if there is no array of that name."""
        path = checked_path(self._asset(band))
        for place in dict.fromkeys((f"{self.group}/{path}" if self.group else path, path)):
            header = self.file.header(place)
            if header is not None:
                axes = self._axes(header)
                if axes.band is not None and _length(header, axes.band) > 1:
                    raise SceneError(
                        f"its array {place} has {_length(header, axes.band)} bands along {axes.band}, not "
                        f"one; name them in modality.bands and leave {place} out of modality.assets"
                    )
                return BandSource(header, axes)
        return None

    def _axes(self, header: ArrayHeader) -> Axes:
        axes = find_axes(self.file, header)
        if axes is None:
            raise SceneError(
                f"its array {header.path} has dimensions {', '.join(header.dims) or 'none'}; expected rows "
                "and columns such as y and x, lat and lon"
            )
        further = [dim for dim in axes.rest if _length(header, dim) > 1]
        if further:
            raise SceneError(
                f"its array {header.path} has a further dimension {further[0]} of length "
                f"{_length(header, further[0])}; expected y, x, time and band: select one position of it"
            )
        return axes

    def _images(self) -> list[tuple[ArrayHeader, Axes]]:
        """Arrays of the group with rows and columns that hold numbers and are no coordinates."""
        found = []
        members = (self.only.path,) if self.only else self.file.members(self.group)
        headers = [header for path in members if (header := self.file.header(path))]
        aside = {
            name.rpartition(":")[2]
            for header in headers
            for key in _REFERRING
            for name in str(header.attrs.get(key, "")).split()
        } | {self._asset(self.mask_name or "")}
        for header in headers:
            axes = find_axes(self.file, header)
            if axes and header.name not in aside and header.stored.kind in "iufb":
                found.append((header, axes))
        return found

    def _stacks(self) -> list[tuple[ArrayHeader, Axes]]:
        """Arrays with a band dimension."""
        return [(header, axes) for header, axes in self._images() if axes.band is not None]

    def _along(
        self, stack: tuple[ArrayHeader, Axes], wanted: tuple[str, ...]
    ) -> dict[str, BandSource]:
        header, axes = stack[0], self._axes(stack[0])
        assert axes.band is not None
        names, length = self._names(stack), _length(header, axes.band)
        if names is None:
            if length != len(wanted):
                raise SceneError(
                    f"its array {header.path} has {length} bands without names; modality "
                    f"{self.modality.name} has {len(wanted)}: {', '.join(wanted)}"
                )
            return {band: BandSource(header, axes, place) for place, band in enumerate(wanted)}
        lacking = [band for band in wanted if self._asset(band) not in names]
        if lacking:
            raise SceneError(
                f"its array {header.path} has no bands {', '.join(lacking)}; it has "
                f"{_listed(names)}: name them in modality.assets"
            )
        return {band: BandSource(header, axes, names.index(self._asset(band))) for band in wanted}

    def _names(self, stack: tuple[ArrayHeader, Axes]) -> list[str] | None:
        """Names along a band dimension; None where its coordinate has none, or numbers."""
        header, axes = stack
        assert axes.band is not None
        found = coordinate(self.file, header, axes.band)
        if found is None:
            found = self._char_coordinate(header, axes.band)
        if found is None or found.stored.kind not in "SUO":
            return None
        values = read_whole(self.file, found.path)
        if values.ndim == 2:
            values = values.astype("S1").view(f"S{values.shape[1]}")[:, 0]
        names = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]
        names = [name.strip().rstrip("\0") for name in names]
        if len(set(names)) < len(names):
            raise SceneError(f"its coordinate {found.path} names a band twice: {_listed(names)}")
        return names

    def _char_coordinate(self, header: ArrayHeader, dim: str) -> ArrayHeader | None:
        """Names as classic netCDF has them: characters along a second dimension."""
        found = self.file.header(f"{header.group}/{dim}" if header.group else dim)
        fits = found is not None and len(found.dims) == 2 and found.dims[0] == dim
        return found if fits and found is not None and found.stored.kind == "S" else None

    def _all(self) -> dict[str, BandSource]:
        images = self._images()
        stacks = self._stacks()
        if len(images) == len(stacks) == 1:
            header, axes = images[0][0], self._axes(images[0][0])
            assert axes.band is not None
            count = min(_length(header, axes.band), _MOST_BANDS)
            names = self._names(images[0]) or [f"band_{n + 1}" for n in range(count)]
            return {
                name: BandSource(header, axes, place)
                for place, name in enumerate(_identifiers(names))
            }
        types = defaultdict(list)
        for header, _ in images:
            types[header.dtype.name].append(header.name)
        if not self.file.arrays():
            raise SceneError(
                "has no arrays; give the path of a dataset that was written completely"
            )
        if len(types) != 1 or stacks:
            raise SceneError(
                f"does not say which arrays are bands: it has {self._shown()}; name them in modality.bands "
                "or modality.assets"
            )
        names = _identifiers([header.name for header, _ in images])
        return {
            name: BandSource(header, self._axes(header))
            for name, (header, _) in zip(names, images, strict=True)
        }

    def _shown(self) -> str:
        """The arrays with rows and columns, those of other groups where this one has none."""
        images = [
            f"{header.name} ({header.dtype.name}, {' x '.join(map(str, header.shape))})"
            for header, _ in self._images()
        ]
        if images:
            return _listed(images)
        inside = [path for path in self.file.arrays() if path.startswith(self.group)]
        return (
            f"no images in group {self.group or '/'}, but {_listed(inside)}"
            if inside
            else "no arrays"
        )


def _length(header: ArrayHeader, dim: str) -> int:
    return header.shape[header.dims.index(dim)]


def _identifiers(names: list[str]) -> list[str]:
    """Names as a configuration would spell them: letters, digits and _, a letter first."""
    plain = [re.sub(r"\W", "_", name, flags=re.ASCII) for name in names]
    wrong = [name for name in plain if not re.match(r"[A-Za-z]", name) or len(name) > 64]
    if wrong or len(set(plain)) < len(plain):
        raise SceneError(
            f"has arrays whose names cannot be told apart as bands: {_listed(names)}; name them in "
            "modality.assets"
        )
    return plain


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"{name:.60}" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
