"""The links of a STAC catalogue: where they lead, whether one may go there, and what JSON is there.

A catalogue is untrusted. A link may leave the roots the user named, lead through a symbolic link, name
a GDAL virtual file, or point at a document that never ends.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from pipeline.errors import SceneError
from pipeline.fetch.files import fingerprint, read_bytes
from pipeline.locations import SCHEMES, check_allowed, is_url, join, reason_of
from pipeline.readers.gates import read_regular, refuse_large_document
from pipeline.readers.rasters import DRIVERS
from pipeline.scenes import Access

# What a file gets as fingerprint while it does not exist.
ABSENT = "absent"
_MAX_HREF_CHARACTERS = 4096
# A scheme, or the `DRIVER:` prefix by which GDAL opens parts of files.
_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+._-]*:")
# What makes the last part of an address more than a plain file name.
_UNUSUAL = re.compile(r"[\\%?#;@]|^\.{0,2}$")


class Hrefs:
    """Resolves the hrefs of a catalogue, and refuses those that lead where nothing may be opened.

    Remembers the folders it has seen: a catalogue names few folders, and very many files.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._folders: dict[str, str] = {}
        self._suffixes = {suffix for suffix, name in DRIVERS.items() if name in access.drivers}

    def document(self, href: Any, base: str) -> str:
        """Absolute path or URL of a linked document; `base` is the folder of the file that links to it."""
        location = _checked_text(href)
        remote = is_remote(location)
        if not remote:
            if _PREFIX.match(location):
                location = _path_of_file_url(location)
            location = join(base, location)
            remote = is_remote(location)
            if location.lower().startswith("/vsi"):
                raise SceneError(f"{href!r} is a virtual file of GDAL; expected a path or URL")
        return self._allowed(location, remote)

    def raster(self, href: Any, base: str) -> str:
        """Absolute path or URL of a raster file, of a format that may be opened."""
        location = self.document(href, base)
        # The plain way first: there are a million of these.
        plain = location[location.rfind(".") :].lower() in self._suffixes
        if not plain or "?" in location:
            path = urlsplit(location).path if is_remote(location) else location
            suffix = PurePosixPath(path).suffix.lower()
            if suffix not in self._suffixes:
                self._refuse_suffix(location, suffix)
        return location

    def _allowed(self, location: str, remote: bool) -> str:
        folder, _, name = location.rpartition("/")
        if _UNUSUAL.search(name):
            check_allowed(location, self._access)
            return location if remote else str(Path(location).resolve())
        resolved = self._folders.get(folder)
        if resolved is None:
            resolved = self._folder(folder, location, remote)
        if remote:
            return location
        plain = f"{resolved}{name}"
        if os.path.islink(plain):  # noqa: PTH114 - a million times
            check_allowed(plain, self._access)
        return plain

    def _folder(self, folder: str, location: str, remote: bool) -> str:
        """The folder with a slash, links resolved, once everything in it may be opened."""
        resolved = folder if remote else str(Path(folder + "/").resolve())
        try:
            check_allowed(resolved, self._access)
        except SceneError:
            # A root may be a single file; if this is none, the message names the file.
            check_allowed(location, self._access)
            return resolved.rstrip("/") + "/"
        self._folders[folder] = resolved.rstrip("/") + "/"
        return self._folders[folder]

    def _refuse_suffix(self, location: str, suffix: str) -> NoReturn:
        if suffix in DRIVERS:
            raise SceneError(
                f"{location} is a {suffix} file, which decodes very slowly; set run.jpeg2000 to read it "
                "anyway"
            )
        raise SceneError(
            f"{location} ends in {suffix!r}; expected one of {', '.join(sorted(self._suffixes))}"
        )


def is_remote(location: str) -> bool:
    """Whether a location is a URL: as `is_url`, for those that have a host, and much faster."""
    return location.partition("://")[0].lower() in SCHEMES


def read_json(location: str, access: Access) -> Any:
    """The content of a JSON document; SceneError where there is none that can be read.

    Servers that send one elsewhere are not followed.
    """
    content = _read_bytes(location, access)
    refuse_large_document(content, access.max_block_bytes, location)
    try:
        return json.loads(content)
    except RecursionError:
        raise SceneError(f"{location} is nested too deeply; expected a STAC document") from None
    except ValueError as error:
        raise SceneError(
            f"{location} is not JSON ({reason_of(error)}); expected a STAC document"
        ) from None


def fingerprint_of(location: str, access: Access) -> str:
    """Size and date of a document, or that there is none."""
    try:
        return fingerprint(location, access)
    except (OSError, SceneError):
        # There is nothing to read, as whoever tries to will say.
        return ABSENT


def _read_bytes(location: str, access: Access) -> bytes:
    most = access.max_block_bytes
    try:
        if is_url(location):
            return read_bytes(location, access, most)
        return read_regular(location, most, "run.max_block_bytes")
    except SceneError as error:
        if " bytes; expected at most " in str(error):
            raise SceneError(
                f"{location} has more bytes than run.max_block_bytes {most}; raise that, or give such a "
                "catalogue as stac-geoparquet"
            ) from None
        raise SceneError(str(error) if is_url(location) else f"{location} {error}") from None
    except OSError as error:
        raise SceneError(f"{location} cannot be read: {reason_of(error)}") from None


def _checked_text(href: Any) -> str:
    if not isinstance(href, str) or not 0 < len(href) <= _MAX_HREF_CHARACTERS:
        raise SceneError(f"has the href {ascii(href)[:80]}; expected a path or URL")
    if not href.isprintable():
        raise SceneError(
            f"has the href {ascii(href)[:80]}; expected a path or URL without control characters"
        )
    return href


def _path_of_file_url(href: str) -> str:
    parts = urlsplit(href)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise SceneError(
            f"{href[:80]!r} has the prefix {_PREFIX.match(href)[0]!r}; expected a path, "  # type: ignore[index]
            "file:// or a URL of a supported scheme"
        )
    path = unquote(parts.path)
    if not path.startswith("/"):
        raise SceneError(f"{href[:80]!r} is no absolute path; expected file:///folder/name")
    return _checked_text(path)
