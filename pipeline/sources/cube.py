"""Data cubes: Zarr stores (version 2 and 3, with groups) and netCDF files whose time steps are scenes.

Headers and coordinates are read, no pixels. A store that cannot be used is an error where it is the only
one, and refused where a glob found several.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.fetch.buckets import is_bucket, matching
from pipeline.fetch.files import fingerprint
from pipeline.locations import check_allowed, is_url
from pipeline.readers.array_base import scene_errors
from pipeline.readers.arrays import NETCDF_SUFFIXES, is_netcdf, open_array_file
from pipeline.readers.zarr_arrays import DOCUMENTS, zarr_fingerprint
from pipeline.scenes import Access, Listing, Scene
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube_scenes import CubePlanner

_SUFFIXES = (*NETCDF_SUFFIXES, ".zarr")


@dataclass(frozen=True)
class Cube:
    """A store: `href` is its file or root, `inner` the path of a group or array inside, `name` its place
    below the archive."""

    href: str
    inner: str
    name: str

    @property
    def path(self) -> str:
        """`name` without suffix, the start of its scenes' ids."""
        suffix = next((s for s in _SUFFIXES if self.name.lower().endswith(s)), "")
        return self.name[: len(self.name) - len(suffix)] or self.name


def list_cube(
    location: str, archive_root: str, modality: ModalityConfig, access: Access
) -> Listing:
    """The scenes of a Zarr store or netCDF file, of a group or array inside it, or of a glob of them.

    Every time step is a scene, `<path>@20201101T000000`; without a time dimension the store is one, of
    the date that `dates.tag`, a single `time` or the STAC properties of EOPF products state. A static
    modality takes the first step. Stores on one grid with a CRS are one place, others are by themselves.
    Raises ArchiveError where there is no such store, or the only one cannot be used, and ConfigError for
    keys of the modality that mean files.
    """
    _refuse_keys(modality)
    cubes = find_cubes(location, archive_root, access)
    scenes: list[Scene] = []
    refused: dict[str, str] = {}
    notes: list[str] = []
    files: dict[str, str] = {}
    for cube in cubes:
        try:
            files[cube.name] = _fingerprint(cube, access)
            with open_array_file(cube.href, access) as file:
                planner = CubePlanner(file, cube.href, cube.inner, modality, files[cube.name])
                scenes += planner.scenes(cube.path)
        except SceneError as error:
            if len(cubes) == 1:
                raise ArchiveError(f"{cube.href}: {error}") from None
            refused[cube.path] = str(error)
        else:
            refused |= planner.refused
            notes += [f"{cube.name}: {remark}" for remark in dict.fromkeys(planner.remarks)]
    scenes.sort(key=lambda scene: scene.id)
    return Listing(tuple(scenes), refused=refused, files=files, notes=tuple(notes))


def files_of(
    location: str, archive_root: str, modality: ModalityConfig, access: Access
) -> dict[str, str]:
    """`Listing.files` of `list_cube`: a fingerprint per store, without reading headers.

    A Zarr store in a folder changes with any file in it; of one behind a URL only the metadata at its
    root counts (`pipeline.readers.zarr_arrays.zarr_fingerprint`).
    """
    files = {}
    for cube in find_cubes(location, archive_root, access):
        try:
            files[cube.name] = _fingerprint(cube, access)
        except SceneError:
            continue
    return files


def find_cubes(location: str, archive_root: str, access: Access) -> list[Cube]:
    """The stores of a location, sorted by name; ArchiveError if there is none."""
    places = [location]
    if glob.has_magic(location) and not Path(location).exists():
        places = _matches(location, access)
    cubes = []
    for place in places:
        href, inner = _split(place, access)
        cubes.append(Cube(href, inner, _name(href, archive_root)))
    if not cubes:
        raise ArchiveError(f"{location}: nothing matches; expected Zarr stores or netCDF files")
    return sorted(cubes, key=lambda cube: (cube.name, cube.inner))


def _refuse_keys(modality: ModalityConfig) -> None:
    keys = {
        "pattern": modality.pattern,
        "dates.csv": modality.dates and modality.dates.csv,
        "mask.source": modality.mask and modality.mask.source,
    }
    for key, value in keys.items():
        if value is not None:
            raise ConfigError(
                f"modality {modality.name}: {key} {value!r:.60} has no effect on a Zarr or netCDF dataset, "
                "whose dates are coordinates and whose mask is an array (mask.band)"
            )


def _matches(pattern: str, access: Access) -> list[str]:
    if not is_url(pattern):
        return glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute patterns)
    if not is_bucket(pattern):
        raise ArchiveError(
            f"{pattern}: what a folder on a web server holds cannot be listed; name one Zarr store or "
            "netCDF file, or a STAC catalogue"
        )
    try:
        return matching(pattern, access)
    except SceneError as error:
        raise ArchiveError(f"{pattern}: cannot be listed: {error}") from None


def _split(place: str, access: Access) -> tuple[str, str]:
    """The root of the store that a location lies in, and the path inside it.

    In folders it is the outermost one around that has Zarr metadata and may be read; in a URL a name with
    a known suffix ends it.
    """
    if is_url(place):
        parts = urlsplit(place)
        names = parts.path.rstrip("/").split("/")
        last = next((n for n, name in enumerate(names) if name.lower().endswith(_SUFFIXES)), None)
        count = len(names) if last is None else last + 1
        return parts._replace(path="/".join(names[:count])).geturl(), "/".join(names[count:])
    path = Path(os.path.abspath(place))  # noqa: PTH100 (resolving links would change names)
    around = [path, *path.parents]
    file = next((parent for parent in around if parent.is_file()), None)
    if file is not None:
        return str(file), path.relative_to(file).as_posix().removeprefix(".")
    if not path.exists():
        raise ArchiveError(f"{place}: no such file, folder or group")
    root = path
    for parent in around:
        if not any((parent / name).is_file() for name in DOCUMENTS) or not _may_read(
            parent, access
        ):
            break
        root = parent
    return str(root), path.relative_to(root).as_posix().removeprefix(".")


def _may_read(folder: Path, access: Access) -> bool:
    try:
        check_allowed(str(folder), access)
    except SceneError:
        return False
    return True


def _name(href: str, archive_root: str) -> str:
    """Place of a store below the archive; its own name where it is the archive."""
    root = archive_root.rstrip("/")
    if is_url(href):
        path = urlsplit(href).path.rstrip("/")
        below = href.removeprefix(f"{root}/")
        return urlsplit(below).path if below != href else path.rpartition("/")[2]
    for base in (Path(root), Path(root).resolve()):
        if Path(href) != base and Path(href).is_relative_to(base):
            return Path(href).relative_to(base).as_posix()
    return Path(href).name


def _fingerprint(cube: Cube, access: Access) -> str:
    with scene_errors():
        check_allowed(cube.href, access)
        if is_netcdf(cube.href):
            return fingerprint(cube.href, access)
        return zarr_fingerprint(cube.href, access)
