"""Finding raster files: below a folder, by a glob, or one by its name; local and remote.

Nothing is opened here. A location is an absolute path or a URL (`pipeline.locations`); a glob has `*`,
`?` or `[...]` within a name and `**` for any number of folders. Names that begin with a dot are hidden.
"""

import fnmatch
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.fetch.buckets import is_bucket, objects_below
from pipeline.fetch.files import fingerprint
from pipeline.locations import (
    as_root,
    check_allowed,
    file_fingerprint,
    is_url,
    join,
    reason_of,
)
from pipeline.readers.rasters import SUFFIXES
from pipeline.scenes import Access
from pipeline.sources.names import printable

# Name below what is searched, fingerprint, problem.
_State = tuple[str, str, str | None]


@dataclass(frozen=True, slots=True)
class RasterFile:
    """A file as it was found.

    `path` is relative to the archive, or the `href` itself where that is not below it; `name` is relative
    to the folder, or the fixed part of the glob, that was searched. `problem` says why it cannot be
    opened, where that shows without opening it.
    """

    href: str
    path: str
    name: str
    fingerprint: str
    problem: str | None = None

    @property
    def stem(self) -> str:
        """`path` without its suffix, the id of a scene that is one file."""
        return without_suffix(self.path)


@dataclass
class Found:
    """The raster files of a location, sorted by path. `refused` are linked folders that lead outside the
    roots, by path with a slash at the end; `notes` are remarks for people."""

    files: list[RasterFile] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextmanager
def waiting_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for servers; whoever leaves by an error or Ctrl-C does not wait for them."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def find_rasters(location: str, archive_root: str, access: Access) -> Found:
    """The raster files of a folder and its subfolders, of a glob, or one file.

    Raises ArchiveError where there is no such place or it cannot be listed.
    """
    found = Found()
    base, wildcards = split_glob(location)
    if is_file(location):
        base, _, name = location.rpartition("/")
        states = iter([(name, *_single(location, access))])
    elif is_url(location):
        states = _listed(base, wildcards, location, access)
    else:
        require(location)
        states = _walk(base, wildcards, archive_root, access, found)
    for name, mark, problem in states:
        href = f"{base.rstrip('/')}/{name}"
        path = relative(href, archive_root)
        found.files.append(RasterFile(href, path, name, mark, problem))
    found.files.sort(key=lambda file: file.path)
    return found


def split_glob(location: str) -> tuple[str, tuple[str, ...]]:
    """A location's folders before its first wildcard, and the parts from there on.

    No parts where there is no wildcard, or where a local file or folder has that very name.
    """
    if not _has_wildcard(location) or (not is_url(location) and Path(location).exists()):
        return location, ()
    parts = location.split("/")
    first = next(place for place, part in enumerate(parts) if _has_wildcard(part))
    return "/".join(parts[:first]) or "/", tuple(parts[first:])


def require(location: str) -> None:
    """Raise ArchiveError unless a local location exists; of a glob, its fixed part."""
    base, _ = split_glob(location)
    if base.startswith("/vsi") and not Path(base).exists():
        raise ArchiveError(
            f"{base}: paths of GDAL's virtual file systems are not read; give a URL such as s3://bucket/folder"
        )
    if not is_url(location) and not Path(base).exists():
        raise ArchiveError(
            f"{base}: no such folder; give a folder of scenes, a quoted glob such as 'scenes/*.tif', a "
            "Zarr or netCDF dataset, or a STAC catalogue"
        )


def below(root: str, given: str, key: str, access: Access) -> str:
    """The location that the configuration gives under `key`, relative to the archive.

    Raises ArchiveError for one outside the roots, ConfigError for a scheme that is not known.
    """
    if "://" in given:
        try:
            as_root(given)
        except ConfigError as error:
            raise ConfigError(f"{key} {error}") from None
    location = join(root, given)
    if not is_url(location):
        location = os.path.normpath(location)
    try:
        check_allowed(split_glob(location)[0], access)
    except SceneError as error:
        raise ArchiveError(f"{key} {given!r} {error}") from None
    return location


def is_file(location: str) -> bool:
    """Whether a location is one file: a local one, or a URL with a suffix of rasters."""
    if is_url(location):
        return suffix(location) in SUFFIXES and not _has_wildcard(location)
    return Path(location).is_file()


def fingerprint_of(location: str, access: Access) -> str:
    """The fingerprint of a file that the user named. Raises ArchiveError where there is none."""
    try:
        return fingerprint(location, access)
    except (OSError, SceneError) as error:
        raise ArchiveError(
            f"{location}: cannot be reached: {reason_of(error)}; check the path or address"
        ) from None


def relative(href: str, root: str) -> str:
    """`href` below `root`, with forward slashes; `href` itself where it is not below."""
    return href.removeprefix(root.rstrip("/") + "/")


def suffix(location: str) -> str:
    """The suffix of a path, or of the path of a URL, in lower case."""
    name = urlsplit(location).path if is_url(location) else location
    return PurePosixPath(name).suffix.lower()


def without_suffix(name: str) -> str:
    """A path without the suffix of its last part."""
    return name.removesuffix(PurePosixPath(name).suffix)


def _walk(
    folder: str, wildcards: tuple[str, ...], archive_root: str, access: Access, found: Found
) -> Iterator[_State]:
    """Every raster below `folder` that fits; linked folders as in `_followed`."""
    searched = [Path(folder).resolve()]
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        for entry in _entries(f"{folder}/{inside}"):
            name = inside + entry.name
            if _is_dir(entry):
                path = relative(entry.path, archive_root)
                if not entry.is_symlink() or _followed(entry.path, path, access, searched, found):
                    waiting.append(f"{name}/")
            elif _is_wanted(name, wildcards):
                yield name, *_local_state(entry)


def _followed(link: str, path: str, access: Access, searched: list[Path], found: Found) -> bool:
    """Whether a linked folder is searched: if it leads to an allowed place that is not searched anyway,
    so that no file comes twice and a circle of links has an end."""
    target = Path(link).resolve()
    try:
        check_allowed(link, access)
    except SceneError as error:
        found.refused[f"{printable(path)}/"] = str(error)
        return False
    if any(target.is_relative_to(top) or top.is_relative_to(target) for top in searched):
        found.notes.append(
            printable(f"{path} is a link to {target}, where scenes are looked for anyway")
        )
        return False
    searched.append(target)
    return True


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, in order of names; not what is hidden, nor Zarr groups."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if _is_shown(f"{entry.name}/")]
    except OSError as error:
        raise ArchiveError(
            f"{folder}: cannot be listed: {error.strerror}; make it readable or name another folder"
        ) from None
    return sorted(shown, key=lambda entry: entry.name)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def _local_state(entry: os.DirEntry[str]) -> tuple[str, str | None]:
    """Fingerprint, and the problem of what is no file; a pipe would never end being read."""
    try:
        if entry.is_file():
            return file_fingerprint(entry.path), None
        problem = "is a broken link" if entry.is_symlink() else "is no regular file"
    except OSError as error:
        problem = f"cannot be looked at: {error.strerror}"
    status = entry.stat(follow_symlinks=False)
    return f"{status.st_size}-{status.st_mtime_ns}", problem


def _listed(
    base: str, wildcards: tuple[str, ...], location: str, access: Access
) -> Iterator[_State]:
    """As `_walk`, for a folder of a remote store."""
    if not is_bucket(location):
        raise ArchiveError(
            f"{location}: what a folder on a web server holds cannot be listed; name one file ending in "
            f"{', '.join(SUFFIXES)}, or a STAC catalogue"
        )
    try:
        for href, mark in objects_below(base, access):
            name = relative(href, base)
            if _is_wanted(name, wildcards) and _is_shown(name):
                yield name, mark, None
    except SceneError as error:
        raise ArchiveError(f"{location}: cannot be listed: {error}") from None


def _single(location: str, access: Access) -> tuple[str, str | None]:
    if suffix(location) not in SUFFIXES:
        raise ArchiveError(
            f"{location}: no raster; expected a file ending in {', '.join(SUFFIXES)}"
        )
    return fingerprint_of(location, access), None


def _has_wildcard(location: str) -> bool:
    """A question mark begins the query of a URL."""
    return any(character in location for character in ("*[" if is_url(location) else "*?["))


def _is_shown(name: str) -> bool:
    *folders, _ = parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and not any(folder.endswith(".zarr") for folder in folders)


def _is_wanted(name: str, wildcards: tuple[str, ...]) -> bool:
    """Whether a name has a suffix of rasters, and its folders and it are those of a glob, if any."""
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        return False
    if not wildcards:
        return True
    parts = name.split("/")
    reached = {0}
    for wildcard in wildcards:
        if wildcard == "**":
            reached = {end for start in reached for end in range(start, len(parts) + 1)}
        else:
            reached = {
                place + 1
                for place in reached
                if place < len(parts) and fnmatch.fnmatchcase(parts[place], wildcard)
            }
    return len(parts) in reached
