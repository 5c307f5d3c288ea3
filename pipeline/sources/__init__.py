"""Where scenes come from: folders of rasters, data cubes, STAC catalogues; told apart by their names.

A source is imported when it is used, so that a library that only one of them needs can be absent.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.fetch.files import exists
from pipeline.locations import as_root, is_url
from pipeline.readers.gates import refuse_many_pixels
from pipeline.scenes import Access, Listing, Retries
from pipeline.settings.modality import ModalityConfig
from pipeline.settings.run import RunConfig
from pipeline.sources.checksums import checksum_file, with_checksums
from pipeline.sources.files import below, is_file, require, split_glob, suffix

_SEARCH = "stac+"
_CATALOGUES = (".json", ".geojson", ".parquet", ".geoparquet")
_CUBE_FILES = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".netcdf")
_ZARR_METADATA = ("zarr.json", ".zmetadata", ".zgroup", ".zarray")
_JPEG2000_DRIVER = "JP2OpenJPEG"

_List = Callable[[str, str, ModalityConfig, Access], Listing]
_FilesOf = Callable[[str, str, ModalityConfig, Access], dict[str, str]]


def archive_access(archive: str, run: RunConfig) -> Access:
    """What a job may open: what lies below the archive, the first of the roots, and `run.allow`.

    Below the archive is below the folder or URL prefix, the fixed part of the glob, or the file's
    parent. Raises ArchiveError where there is no such folder, ConfigError for a scheme that is not known.
    """
    root, _ = _split(archive)
    drivers = (*Access.drivers, _JPEG2000_DRIVER) if run.jpeg2000 else Access.drivers
    return Access(
        roots=(root, *map(as_root, run.allow)),
        drivers=drivers,
        max_block_bytes=run.max_block_bytes,
        max_scene_px=run.max_scene_px,
        sign=run.sign,
        checksums=run.checksums,
        allow_private_addresses=run.allow_private_addresses,
        retries=Retries(**run.retries.model_dump()),
    )


def list_scenes(archive: str, modality: ModalityConfig, access: Access) -> Listing:
    """The scenes of one modality of an archive.

    The archive, or `modality.source` below it, is a folder, glob or file of rasters, a netCDF file or Zarr
    hierarchy, or a catalogue: JSON, GeoParquet, or a search `stac+https://host/path?collections=...`.
    Raises ArchiveError for what holds no scene or cannot be listed, ConfigError for keys of the modality
    that contradict the source.
    """
    location, root = _locate(archive, modality, access)
    try:
        list_source, _ = _source(location, access)
        listing = list_source(location, root, modality, access)
    except ImportError as error:
        raise _missing(location, error) from None
    listing = _of_bounded_size(listing, access)
    return listing if access.checksums is None else with_checksums(listing, root, access)


def source_files(archive: str, modality: ModalityConfig, access: Access) -> dict[str, str]:
    """`Listing.files` of `list_scenes` as they are now, found without opening any raster."""
    location, root = _locate(archive, modality, access)
    try:
        _, files_of = _source(location, access)
        return {**files_of(location, root, modality, access), **checksum_file(root, access)}
    except ImportError as error:
        raise _missing(location, error) from None


def _source(location: str, access: Access) -> tuple[_List, _FilesOf]:
    if location.startswith(_SEARCH) or _is_catalogue(location):
        from pipeline.sources import stac

        return stac.list_stac, stac.files_of
    if _cube_in(location) or _has_zarr_metadata(location, access):
        from pipeline.sources import cube

        return cube.list_cube, cube.files_of
    from pipeline.sources import folder

    return folder.list_folder, folder.files_of


def _of_bounded_size(listing: Listing, access: Access) -> Listing:
    """The listing without scenes of too many pixels, whichever header or catalogue states them."""
    scenes, refused = [], dict(listing.refused)
    for scene in listing.scenes:
        try:
            for asset in scene.assets:
                refuse_many_pixels(asset.grid.height, asset.grid.width, access.max_scene_px)
            scenes.append(scene)
        except SceneError as error:
            refused[scene.id] = str(error)
    if len(scenes) == len(listing.scenes):
        return listing
    return replace(listing, scenes=tuple(scenes), refused=dict(sorted(refused.items())))


def _is_catalogue(location: str) -> bool:
    folder = not is_url(location) and Path(location).is_dir()
    return suffix(location) in _CATALOGUES and not folder


def _cube_in(location: str) -> str | None:
    """The first part of a location that is a cube, with what is before it; None if it has none.

    A cube is a netCDF file or what is named .zarr; after it may come the path of a group or array inside.
    """
    by_name = is_url(location) or split_glob(location)[1]
    address = location.partition("?")[0] if is_url(location) else location
    names = address.split("/")
    for count, name in enumerate(names, start=1):
        place = "/".join(names[:count])
        kind = PurePosixPath(name).suffix.lower()
        if kind == ".zarr" or (kind in _CUBE_FILES and (by_name or Path(place).is_file())):
            return place
    return None


def _has_zarr_metadata(location: str, access: Access) -> bool:
    """Whether a folder or URL without a telling name is a Zarr hierarchy."""
    if split_glob(location)[1] or is_file(location):
        return False
    places = (f"{location.rstrip('/')}/{name}" for name in _ZARR_METADATA)
    if not is_url(location):
        return any(Path(place).is_file() for place in places)
    try:
        return any(exists(place, access) for place in places)
    except SceneError as error:
        raise ArchiveError(str(error)) from None


def _locate(archive: str, modality: ModalityConfig, access: Access) -> tuple[str, str]:
    """Where a modality's scenes are, absolute, and what their ids are relative to."""
    root, inside = _split(archive)
    source = modality.source
    if source is None:
        if archive.startswith(_SEARCH):
            return archive, root
        return f"{root.rstrip('/')}/{inside}" if inside else root, root
    if source.startswith(_SEARCH):
        return source, root
    if inside and not is_url(source) and not Path(source).is_absolute():
        raise ConfigError(
            f"modality.source {source} lies below the archive, but {archive} is no folder; give the "
            "folder as the archive"
        )
    location = below(root, source, "modality.source", access)
    if _cube_in(location) is None:
        require(location)
    return location, root


def _split(archive: str) -> tuple[str, str]:
    """The archive's root, and the glob or name of a file below it; "" for a whole folder.

    A search has the API's address as its root, what lies inside a cube the cube or its folder. Links of
    a local root are resolved.
    """
    if not archive.strip():
        raise ArchiveError("the source is empty text; give a folder, file, glob or URL")
    if archive.startswith(_SEARCH):
        return as_root(urlsplit(archive.removeprefix(_SEARCH))._replace(query="").geturl()), ""
    if not is_url(archive):
        as_root(archive)  # refuses a scheme that is not known
        archive = str(Path(archive).absolute())
    base, wildcards = split_glob(archive)
    if wildcards:
        require(archive)
        return as_root(base), "/".join(wildcards)
    address, mark, query = archive.partition("?") if is_url(archive) else (archive, "", "")
    cube = _cube_in(archive)
    if cube is None:
        require(archive)
    elif cube.lower().endswith(".zarr"):
        return as_root(cube), address[len(cube) :].strip("/")
    if cube is None and not is_file(archive) and not _is_catalogue(archive):
        return as_root(archive), ""
    parent, _, name = (cube or address).rpartition("/")
    return as_root(parent or "/"), name + address[len(cube or address) :] + mark + query


def _missing(location: str, error: ImportError) -> ArchiveError:
    return ArchiveError(
        f"{location} cannot be read: {error}; install it with: pip install 'aptile[stac,xarray,cloud]'"
    )
