"""Buckets (`s3://`, `gs://`, `az://`) through obstore, which signs requests with the user's credentials.

A bucket is reached at the endpoint that the user's environment names, or its cloud's own; a catalogue can
choose neither. obstore's own retries are off: `pipeline.fetch.retries` counts for all.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import SceneError
from pipeline.fetch.http import Part, Span
from pipeline.fetch.retries import Passing, retrying
from pipeline.scenes import Access, Retries

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "abfs")
# Of these, where requests may have no encryption: only where the user's own setting says so.
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
# A whole answer may take this many times as long as a silence in it.
_ANSWER_TIMES = 20
_FINAL = re.compile(r"status code: (?!408|429)4\d\d")


def is_bucket(url: str) -> bool:
    """Whether a URL names an object or folder of a bucket."""
    return url.partition("://")[0].lower() in SCHEMES


def ask_bucket(url: str, access: Access, span: Span | None, most: int, only_facts: bool) -> Part:
    """As `pipeline.fetch.http.ask`, for an object of a bucket."""
    store, key = _place(url, access)
    import obstore

    def asked() -> Part:
        if only_facts:
            meta = obstore.head(store, key)
            return Part(b"", 0, meta["size"], _tag(meta))
        given = obstore.get(store, key, options=_range(url, store, key, span))
        start, stop = given.range
        if stop - start > most:
            raise SceneError(f"{url} has {stop - start} bytes; expected at most {most}")
        data = bytes(given.bytes())
        wanted = (0, given.meta["size"]) if span is None else span.within(given.meta["size"])
        if (start, stop) != wanted or len(data) != stop - start:
            raise Passing(
                f"{len(data)} bytes from {start} were sent for {wanted[1] - wanted[0]} from {wanted[0]}"
            )
        return Part(data, start, given.meta["size"], _tag(given.meta))

    return _retrying(asked, url, access)


def objects_below(url: str, access: Access) -> Iterator[tuple[str, str]]:
    """URL and fingerprint of every object below a folder of a bucket, in order of names."""
    store, prefix = _place(url, access)
    import obstore

    def listed() -> list[tuple[str, str]]:
        pages = obstore.list(store, prefix or None)
        return sorted((m["path"], f"{m['size']}-{_tag(m)}") for page in pages for m in page)

    for key, mark in _retrying(listed, url, access):
        yield f"{_root(url)}/{key}", mark.replace('"', "")


def children(url: str, access: Access) -> tuple[list[str], list[str]]:
    """Names of the folders and of the objects directly below a folder of a bucket, sorted."""
    store, prefix = _place(url, access)
    import obstore

    given = _retrying(lambda: obstore.list_with_delimiter(store, prefix or None), url, access)
    keys = given["common_prefixes"], [meta["path"] for meta in given["objects"]]
    folders, objects = (sorted(key.rstrip("/").rpartition("/")[2] for key in some) for some in keys)
    return folders, objects


def matching(pattern: str, access: Access) -> list[str]:
    """URLs of the folders and objects of a bucket that a pattern fits, with `*`, `?`, `[...]` and `**`."""
    root = _root(pattern)
    found = {root}
    for part in pattern[len(root) :].strip("/").split("/"):
        found = {url for place in found for url in _matching(place, part, access)}
    return sorted(found)


def _matching(place: str, part: str, access: Access) -> Iterator[str]:
    if not re.search(r"[*?[]", part):
        yield f"{place}/{part}"
        return
    folders, objects = children(place, access)
    if part != "**":
        yield from (f"{place}/{n}" for n in (*folders, *objects) if fnmatch.fnmatchcase(n, part))
        return
    yield place
    for name in folders:
        if not name.endswith(".zarr"):
            yield from _matching(f"{place}/{name}", "**", access)


def _range(url: str, store: Any, key: str, span: Span | None) -> Any:
    import obstore

    if span is None:
        return {}
    if span.stop is not None:
        return {"range": (span.start, span.stop)}
    if span.start < 0 and url.startswith("s3:"):
        return {"range": {"suffix": -span.start}}
    # Not every cloud counts from the end.
    return {"range": span.within(obstore.head(store, key)["size"])}


def _retrying(work: Callable[[], T], url: str, access: Access) -> T:
    from obstore import exceptions

    def tried() -> T:
        try:
            return work()
        except exceptions.GenericError as error:
            if _FINAL.search(str(error)):
                raise SceneError(f"{url} cannot be read: {_words(error)}") from None
            raise Passing(_words(error)) from None
        except (exceptions.BaseError, ValueError) as error:
            if isinstance(error, SceneError):
                raise
            raise SceneError(f"{url} cannot be read: {_words(error)}") from None

    return retrying(tried, url, access.retries)


def _place(url: str, access: Access) -> tuple[Any, str]:
    """The store of a bucket, and the key of an object or folder in it."""
    root = _root(url)
    try:
        return _store(root, access.retries, _endpoints()), url[len(root) :].strip("/")
    except ImportError:
        raise
    except Exception as error:  # every cloud has errors of its own
        raise SceneError(f"{root} cannot be used: {_words(error)}") from None


def _root(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _endpoints() -> tuple[str, ...]:
    return tuple(os.environ.get(name, "") for name in _ENDPOINTS)


@lru_cache(maxsize=64)
def _store(root: str, retries: Retries, endpoints: tuple[str, ...]) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise ImportError("buckets need obstore; install aptile[cloud]") from None

    silence = timedelta(seconds=retries.timeout_s)
    plain = any(endpoint.startswith("http:") for endpoint in endpoints)
    return from_url(
        root,
        client_options={
            "read_timeout": silence, "connect_timeout": silence, "timeout": _ANSWER_TIMES * silence,
            **({"allow_http": True} if plain else {}),
        },
        retry_config={"max_retries": 0, "retry_timeout": _ANSWER_TIMES * silence},
    )  # fmt: skip


def _tag(meta: Any) -> str:
    return str(meta.get("e_tag") or meta["last_modified"].isoformat())


def _words(error: BaseException) -> str:
    """What a client says, without its trace and without what the server sent as XML."""
    text = str(error).partition("\n\nDebug source")[0].partition("<?xml")[0]
    return " ".join(text.split())[:200].rstrip(": ") or type(error).__name__
