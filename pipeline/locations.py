"""Where things are: local paths and URLs, and which of them may be opened.

Archives are untrusted: a catalogue or a link may point anywhere. Every path and URL is checked against
the roots the user gave before anything opens it.
"""

import errno
import importlib
import os
import posixpath
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import AptileError, ArchiveError, ConfigError, SceneError
from pipeline.scenes import Access

SCHEMES = ("https", "http", "s3", "gs", "az", "abfs")


def is_url(location: str) -> bool:
    """Whether a location is a URL of a remote scheme; anything else is a local path."""
    return _scheme(location) in SCHEMES


def as_root(location: str) -> str:
    """A folder or URL prefix as `Access.roots` holds it. Raises ConfigError for what is neither.

    Local folders become absolute with links resolved; URLs lose a trailing slash.
    """
    scheme = _scheme(location)
    if len(scheme) > 1 and not is_url(location):
        raise ConfigError(
            f"{location}: scheme {scheme!r} is not supported; expected a local path or one of "
            f"{', '.join(f'{s}://' for s in SCHEMES)}"
        )
    return location.rstrip("/") if is_url(location) else str(Path(location).resolve())


def check_allowed(href: str, access: Access) -> None:
    """Raise SceneError unless `href` lies below one of the roots."""
    if not any(_below(href, root) for root in access.roots):
        where = href if is_url(href) else _resolved(href)
        raise SceneError(
            f"points to {where}, outside {', '.join(access.roots)}; if you trust it, add it to run.allow"
        )


def join(base: str, relative: str) -> str:
    """`relative` below the folder or URL `base`; as it is where it is absolute or a URL itself."""
    if is_url(relative) or Path(relative).is_absolute():
        return relative
    if is_url(base):
        parts = urlsplit(base)
        path = posixpath.normpath(posixpath.join(parts.path or "/", relative))
        return parts._replace(path=path, query="").geturl()
    return str(Path(base, relative))


def signed(href: str, access: Access) -> str:
    """The URL to open for `href`: what the user's signing function makes of it, if there is one."""
    if access.sign is None or not is_url(href):
        return href
    return str(_function(access.sign)(href))


def file_fingerprint(path: str) -> str:
    """Size and modification time of a local file; different whenever it was rewritten.

    Raises OSError where there is no such file. Of any file: `pipeline.fetch.files.fingerprint`.
    """
    status = Path(path).stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def reason_of(error: BaseException) -> str:
    """Why something could not be read, on one line: what the system said, where that is behind it."""
    if isinstance(error, AptileError):
        return str(error)
    behind: BaseException | None = error
    while behind is not None:
        # Clients wrap what the system said in texts of their own, or in the bare address.
        error = behind if isinstance(behind, OSError) else error
        behind = behind.__cause__ or behind.__context__
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


def _scheme(location: str) -> str:
    """The scheme of a URL; empty for text that is none."""
    try:
        return urlsplit(location).scheme
    except ValueError:
        return ""


def _resolved(path: str) -> Path:
    """The absolute path with links followed; a circle of links stays as it is, and cannot be opened."""
    return Path(os.path.realpath(path))


def _below(href: str, root: str) -> bool:
    if is_url(href) != is_url(root):
        return False
    if not is_url(href):
        return _resolved(href).is_relative_to(root)
    try:
        parts, allowed = urlsplit(href), urlsplit(root)
    except ValueError:
        return False
    # What a server makes of these is its own affair; none of them is needed in a plain address.
    decoded = unquote(unquote(parts.path)).replace("\\", "/")
    if ".." in decoded.split("/") or "\\" in href or "@" in parts.netloc:
        return False
    same_host = (parts.scheme, parts.netloc.lower()) == (allowed.scheme, allowed.netloc.lower())
    return same_host and (
        parts.path == allowed.path or parts.path.startswith(allowed.path.rstrip("/") + "/")
    )


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArchiveError(
            f"run.sign {name!r} cannot be used ({error}); expected package.module:function"
        ) from None
