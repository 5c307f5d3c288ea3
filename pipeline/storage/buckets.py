"""Stores in object stores (s3://, gs://, az://): whole objects, replaced on condition.

`obstore` signs, retries and checks what it sends; credentials and endpoints come from the variables of the
environment that the providers' own tools use.
"""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.storage.commit import MEND
from pipeline.storage.layout import ROOT_METADATA
from pipeline.storage.objects import Contents, check_name, entry

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import ClientConfig

# How the variables of the environment begin, by scheme.
_PROVIDERS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE"}
SCHEMES = tuple(_PROVIDERS)
# Names that end so are logs: rows are added to them.
LOG_SUFFIX = ".jsonl"
# Requests that run beside each other: each one mostly waits for its answer.
_AT_ONCE = 32
# From so many objects of one array on, listing them all costs less than looking at each.
_LIST_FROM = 32
# A conditional write whose fate is unknown is looked into so often.
_SWAP_TRIES = 6
# Parts of arrays carry their checksum; one that arrives spoilt is asked for again so often.
READ_TRIES = 4
_CONNECT_TIMEOUT = timedelta(seconds=5)
_LOCK = ".lock"
_GONE = (NotFoundError, FileNotFoundError)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Patience:
    """How often a request is tried, each time after a longer wait; how long in all, and how long once."""

    retries: int
    in_all: timedelta
    once: timedelta


# A whole shard travels in one request, so that nothing half is left of it.
FOR_DATA = Patience(10, timedelta(seconds=150), timedelta(seconds=240))
# A lock that needs longer than this for one beat is better tried again.
FOR_LOCK = Patience(3, timedelta(seconds=8), timedelta(seconds=5))


class BucketObjects:
    """Objects below a prefix of a bucket."""

    def __init__(self, url: str, patience: Patience = FOR_DATA) -> None:
        self.location, self._patience = _checked(url), patience
        self._process = os.getpid()
        try:
            self.store = from_url(
                self.location,
                retry_config={
                    "max_retries": patience.retries,
                    "retry_timeout": patience.in_all,
                },
                client_options=_client_options(self.location, patience),
            )
        except (BaseError, ValueError) as error:
            raise self.failed("cannot be used", error) from None
        self._logs: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketObjects, (self.location, self._patience)

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that wait for answers."""
        self._check_process()
        return self._threads

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="aptile-objects")

    def read(self, name: str) -> bytes:
        found = self._get(name)
        if found is None:
            raise FileNotFoundError(f"{self.location}/{name}")
        return found[0]

    def size(self, name: str) -> int | None:
        return self.sizes([name]).get(name)

    def range(self, name: str, start: int, end: int) -> Any:
        """A buffer of the bytes `start ... end - 1` of an object; an empty one if there is no object."""
        found = self._tried(
            lambda: obstore.get_range(
                self.store, check_name(self.location, name), start=start, end=end
            ),
            f"cannot read bytes {start} to {end} of {name}",
        )
        return b"" if found is None else found

    def digest(self, name: str) -> dict[str, Any] | None:
        def read() -> dict[str, Any]:
            found, length = hashlib.sha256(), 0
            for piece in obstore.get(self.store, check_name(self.location, name)):
                found.update(piece)
                length += len(piece)
            return {"bytes": length, "sha256": found.hexdigest()}

        return self._tried(read, f"cannot read {name}")

    def modified(self, name: str) -> float:
        head = self._tried(lambda: obstore.head(self.store, name), f"cannot look at {name}")
        if head is None:
            raise FileNotFoundError(f"{self.location}/{name}")
        return head["last_modified"].timestamp()

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.partition("/c/")[0], []).append(name)
        found: dict[str, int] = {}
        single = []
        for array, members in groups.items():
            if len(members) < _LIST_FROM:
                single += members
            else:
                listed = dict(self._listed(f"{array}/c"))
                found |= {name: listed[name] for name in members if name in listed}
        for name, size in zip(single, self.pool.map(self.head, single), strict=True):
            if size is not None:
                found[name] = size
        return found

    def names(self, below: str = "") -> Iterator[str]:
        return (name for name, _ in self._listed(below))

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        self._put(name, content)
        written = entry(content)
        if name.endswith(LOG_SUFFIX):
            # Rows belong to what they were added to; from here on none is left that counts.
            self._logs[name] = written["sha256"]
            self.remove(list(self.names(_rows(name))))
        return written

    def write_all(self, contents: Contents) -> dict[str, dict[str, Any]]:
        joined = (b"".join(pieces) for pieces in contents.values())
        return dict(zip(contents, self.pool.map(self.write, contents, joined), strict=True))

    def swap(self, name: str, content: bytes, seen: bytes | None) -> None:
        failure: Exception | None = None
        for _ in range(_SWAP_TRIES):
            found = self._get(name)
            if found is not None and found[0] == content:
                # A request whose answer was lost is sent again, and meets its own copy.
                return
            if (None if found is None else found[0]) != seen:
                raise LockedError(
                    f"{self.location}/{name} was written by another process meanwhile; run the same "
                    "command again"
                )
            mode: PutMode = "create" if found is None else found[1]
            try:
                obstore.put(self.store, name, content, mode=mode, use_multipart=False)
                return
            except (AlreadyExistsError, PreconditionError, *_GONE):
                failure = None
            except (PermissionDeniedError, UnauthenticatedError, NotImplementedError) as error:
                raise self.failed(f"cannot replace {name}", error) from None
            except BaseError as error:
                failure = error
        if failure is not None:
            raise self.failed(f"cannot replace {name}", failure)
        raise StoreError(
            f"{self.location}/{name}: cannot be replaced on condition: the object store refuses, though "
            "nobody else wrote it; use one that knows If-Match and If-None-Match"
        )

    def append(self, log: str, rows: bytes) -> None:
        if log not in self._logs:
            self._logs[log] = hashlib.sha256(self.read(log)).hexdigest()
        self._put(f"{_rows(log)}/{self._logs[log][:16]}/{_digest(rows)}", rows)

    def lines(self, log: str) -> bytes:
        try:
            head = self.read(log)
        except FileNotFoundError:
            return b""
        self._logs[log] = hashlib.sha256(head).hexdigest()
        names = sorted(self.names(f"{_rows(log)}/{self._logs[log][:16]}"))
        return head + b"".join(self.pool.map(self._row, names))

    def remove(self, names: Iterable[str]) -> None:
        names = list(names)

        def remove() -> bool:
            obstore.delete(self.store, names)
            return True

        if names and not self._tried(remove, f"cannot remove {names[0]}"):
            # Some object stores complain of one that is not there, and stop.
            list(self.pool.map(self._remove, names))

    def sweep(self) -> None:
        """Nothing to do: an object that was not written whole is not there."""

    def clear(self) -> None:
        # What says that this is a store goes last, so that a crash leaves something to go on from.
        everything = list(self.names())
        last = [n for n in everything if n.endswith((ROOT_METADATA, LOG_SUFFIX)) or n == _LOCK]
        self.remove(set(everything) - set(last))
        self.remove([name for name in last if name == ROOT_METADATA])
        self.remove([name for name in last if name not in (ROOT_METADATA, _LOCK)])
        self.remove([name for name in last if name == _LOCK])

    def _listed(self, below: str) -> list[tuple[str, int]]:
        """Name and bytes of every object below a folder."""

        def listed() -> list[tuple[str, int]]:
            pages = obstore.list(self.store, prefix=below or None)
            return [(found["path"], found["size"]) for page in pages for found in page]

        return self._tried(listed, f"cannot list {below}") or []

    def _get(self, name: str) -> tuple[bytes, Any] | None:
        """Content and version of an object; None if there is none."""

        def get() -> tuple[bytes, Any]:
            found = obstore.get(self.store, check_name(self.location, name))
            content = bytes(found.bytes())
            tags = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
            return content, {name: tag for name, tag in tags.items() if tag is not None}

        return self._tried(get, f"cannot read {name}")

    def head(self, name: str) -> int | None:
        """Bytes of an object, asked for in this thread; None if there is none."""
        return self._tried(
            lambda: int(obstore.head(self.store, check_name(self.location, name))["size"]),
            f"cannot look at {name}",
        )

    def _tried(self, request: Callable[[], _Result], what: str) -> _Result | None:
        """The answer to a request that may be sent again; None if what it asks for is not there.

        obstore tries again where the connection fails, not where an answer breaks off.
        """
        self._check_process()
        until = time.monotonic() + self._patience.in_all.total_seconds()
        for left in reversed(range(self._patience.retries)):
            try:
                return request()
            except _GONE:
                return None
            except (PermissionDeniedError, UnauthenticatedError, InvalidPathError) as error:
                raise self.failed(what, error) from None
            except BaseError as error:
                if not left or time.monotonic() > until:
                    raise self.failed(what, error) from None
        raise AssertionError("a request is sent at least once")

    def _check_process(self) -> None:
        """Raise StoreError in a forked process: the threads that wait for answers are not there."""
        if os.getpid() != self._process:
            raise StoreError(
                f"{self.location} was opened before this process was forked from another; open it in this "
                "one, or start processes by spawn or forkserver"
            )

    def _put(self, name: str, content: bytes) -> None:
        what = f"cannot write {len(content)} bytes to {name}"
        if (
            self._tried(lambda: obstore.put(self.store, name, content, use_multipart=False), what)
            is None
        ):
            raise self.failed(what, ValueError("no such bucket"))

    def _remove(self, name: str) -> None:
        self._tried(lambda: obstore.delete(self.store, name), f"cannot remove {name}")

    def _row(self, name: str) -> bytes:
        rows = self.read(name)
        if _digest(rows) != name.rpartition("/")[2]:
            raise IntegrityError(f"{self.location}/{name} does not hold what was written; {MEND}")
        return rows

    def failed(self, what: str, error: Exception) -> StoreError:
        """What is told of a request that failed for good."""
        reason = " ".join(str(error).split("\n\nDebug source")[0].split())
        return StoreError(
            f"{self.location}: {what}: {reason:.300}; check address, credentials and connection, then run "
            "the same command again"
        )


def _client_options(url: str, patience: Patience) -> "ClientConfig":
    """Limits of our own, and what the environment says of connections: giving some hides all of that."""
    provider = _PROVIDERS[urlsplit(url).scheme]
    options: ClientConfig = {"timeout": patience.once, "connect_timeout": _CONNECT_TIMEOUT}
    allow_http = os.environ.get(f"{provider}_ALLOW_HTTP", "")
    options["allow_http"] = allow_http.lower() in ("1", "true", "yes", "on")
    if proxy := os.environ.get(f"{provider}_PROXY_URL"):
        options["proxy_url"] = proxy
    return options


def _rows(log: str) -> str:
    """Below this are the rows that were added to a log: by the log's content, then their own."""
    return f"{log}.rows"


def _digest(rows: bytes) -> str:
    # Named by content: adding the same rows twice is adding them once.
    return hashlib.sha256(rows).hexdigest()[:32]


def _checked(url: str) -> str:
    """A URL without its last slashes; StoreError for one that names no place for a store."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    user = "@" in parts.netloc and parts.scheme != "abfs"
    upwards = any(part in (".", "..") for part in parts.path.split("/"))
    odd = parts.query or parts.fragment or "//" in parts.path.rstrip("/") or "%" in parts.path
    if parts.scheme not in SCHEMES or not parts.netloc or user or upwards or odd:
        expected = ", ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES[:3])
        raise StoreError(
            f"{_without_secrets(url)}: no place for a store; expected a local path, or one of {expected}; "
            "credentials belong into the environment"
        )
    return url.rstrip("/")


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0]
    return f"{scheme}://{place.rpartition('@')[2]}"
