"""Files by path or URL: whole, in parts, or as Python files for libraries that want one.

The one place that opens what is remote. Every URL is checked against the roots, signed, asked of a
checked address, retried, and compared in length and version.
"""

import io
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.errors import AptileError, SceneError
from pipeline.fetch.buckets import ask_bucket, is_bucket
from pipeline.fetch.http import WHOLE_BYTES, Part, Question, Span, ask, shown
from pipeline.fetch.retries import Passing, on_disk
from pipeline.locations import check_allowed, is_url, signed
from pipeline.scenes import Access

# Shorter reads are of headers, which come in many small steps; they are served from pages.
PAGE_BYTES = 2**14
_PAGES_KEPT = 256
_PAGES_AHEAD = 64
# One request takes at most this, so that a broken one costs little; so many run at once.
_REQUEST_BYTES = 2**24
_REQUESTS = 8
# Two parts are fetched as one if what lies between is at most this share of the first.
_GAP_SHARE = 32


class OpenFile(Protocol):
    """A file that is read in parts. Every failure is a SceneError."""

    size: int

    def read(self, start: int, length: int) -> bytes:
        """Bytes from `start` on: exactly `length`, or up to the file's end."""

    def read_parts(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several parts, each given by start and length."""


class RemoteFile:
    """A file behind a URL; SceneError if it is another one while it is read."""

    def __init__(self, href: str, access: Access) -> None:
        self._url, self._access = _address(href, access), access
        first = fetch(self._url, access, Span(0, PAGE_BYTES))
        self.size, self._tag = first.size, first.tag
        self._whole = first.data if len(first.data) == first.size else None
        self._pages = OrderedDict({0: first.data})
        self._next, self._ahead = 1, 1

    def read(self, start: int, length: int) -> bytes:
        stop = min(start + length, self.size)
        if stop <= start:
            return b""
        if self._whole is not None:
            return self._whole[start:stop]
        if stop - start >= PAGE_BYTES:
            return self.read_parts([(start, stop - start)])[0]
        first, last = start // PAGE_BYTES, (stop - 1) // PAGE_BYTES
        joined = b"".join(self._page(number, last) for number in range(first, last + 1))
        return joined[start - first * PAGE_BYTES : stop - first * PAGE_BYTES]

    def read_parts(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        spans = [(start, min(start + length, self.size)) for start, length in parts]
        if self._whole is not None:
            return [self._whole[start:stop] for start, stop in spans]
        runs = merged(spans)
        asked = [Span(at, min(at + _REQUEST_BYTES, stop)) for start, stop in runs
                 for at in range(start, stop, _REQUEST_BYTES)]  # fmt: skip
        came = self._fetched(asked)
        held = dict(zip([span.start for span in asked], came, strict=True))
        runs_held = [
            _Run(start, b"".join(held[at] for at in range(start, stop, _REQUEST_BYTES)))
            for start, stop in runs
        ]
        return [_cut(runs_held, start, stop) for start, stop in spans]

    def _fetched(self, spans: list[Span]) -> list[bytes]:
        if len(spans) == 1:
            return [self._fetch(spans[0])]
        return list(_threads().map(self._fetch, spans))

    def _fetch(self, span: Span) -> bytes:
        try:
            part = fetch(self._url, self._access, span)
        except FileNotFoundError:
            raise SceneError(f"{shown(self._url)} is gone since it was opened") from None
        if (part.size, part.tag) != (self.size, self._tag):
            raise SceneError(
                f"{shown(self._url)} changed while it was read (from {self.size} bytes, {self._tag}, to "
                f"{part.size}, {part.tag}); run the command again when it is complete"
            )
        return part.data

    def _page(self, number: int, last: int) -> bytes:
        if number not in self._pages:
            # Whoever reads on and on gets more at once.
            self._ahead = min(2 * self._ahead, _PAGES_AHEAD) if number == self._next else 1
            count = max(self._ahead, last + 1 - number)
            start, self._next = number * PAGE_BYTES, number + count
            data = self._fetch(Span(start, min(start + count * PAGE_BYTES, self.size)))
            for place in range(0, len(data), PAGE_BYTES):
                self._pages[number + place // PAGE_BYTES] = data[place : place + PAGE_BYTES]
            while len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
        self._pages.move_to_end(number)
        return self._pages[number]


class LocalFile:
    """A local file, opened afresh where the operating system says that it could not read it just now."""

    def __init__(self, path: str, access: Access) -> None:
        check_allowed(path, access)
        self._path, self._access = path, access
        self._descriptor: int | None = None
        self._known: tuple[int, int] | None = None
        self.size = on_disk(self._opened, path, access.retries)[1]

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def read(self, start: int, length: int) -> bytes:
        try:
            return on_disk(lambda: self._read(start, length), self._path, self._access.retries)
        except OSError as error:
            raise SceneError(f"{self._path} cannot be read: {error.strerror}") from None

    def read_parts(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(start, length) for start, length in parts]

    def _read(self, start: int, length: int) -> bytes:
        descriptor, size = self._opened()
        pieces, at, stop = [], start, min(start + length, size)
        try:
            while at < stop:
                pieces.append(os.pread(descriptor, stop - at, at))
                at += len(pieces[-1])
                if not pieces[-1]:
                    raise Passing(f"it ended after {at} of {size} bytes")
        except (OSError, Passing):
            self.close()
            raise
        return b"".join(pieces)

    def _opened(self) -> tuple[int, int]:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
            found = status.st_size, status.st_mtime_ns
            if found != (self._known or found):
                raise SceneError(f"{self._path} changed while it was read; run the command again")
            self._known = found
        assert self._known is not None
        return self._descriptor, self._known[0]


class PythonFile(io.RawIOBase):
    """An open file as libraries know them."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def fetch(
    url: str, access: Access, span: Span | None = None, most: int = WHOLE_BYTES, facts: bool = False
) -> Part:
    """A remote file or part of it; with `facts`, only its size and tag. The URL is one of `_address`."""
    if is_bucket(url):
        return ask_bucket(url, access, span, most, facts)
    return ask(Question(url, span, most, only_facts=facts), access)


@contextmanager
def opened(location: str, access: Access) -> Iterator[OpenFile]:
    """A local or remote file to read parts of. Raises OSError where there is none."""
    if is_url(location):
        yield RemoteFile(location, access)
    else:
        with closing(LocalFile(location, access)) as file:
            yield file


def open_file(location: str, access: Access) -> Any:
    """A local or remote file as a Python file, a context. Raises OSError where there is none."""
    if is_url(location):
        return PythonFile(RemoteFile(location, access))
    check_allowed(location, access)
    on_disk(lambda: refuse_special_file(location), location, access.retries)
    return on_disk(lambda: Path(location).open("rb"), location, access.retries)


def read_bytes(location: str, access: Access, most: int = WHOLE_BYTES) -> bytes:
    """All of a file. Raises OSError where there is none, SceneError where it is longer than `most`."""
    if is_url(location):
        return fetch(_address(location, access), access, most=most).data
    check_allowed(location, access)

    def read() -> bytes:
        refuse_special_file(location)
        with Path(location).open("rb") as file:
            return file.read(most + 1)

    data = on_disk(read, location, access.retries)
    if len(data) > most:
        raise SceneError(f"{location} has more than {most} bytes; expected at most that")
    return data


def read_part(location: str, access: Access, span: Span, most: int) -> Part:
    """A part of a remote file. Raises as `read_bytes`."""
    part = fetch(_address(location, access), access, span, most)
    start, stop = span.within(part.size)
    if len(part.data) != stop - start:
        # A server that sends no parts.
        return Part(part.data[start:stop], start, part.size, part.tag)
    return part


def fingerprint(location: str, access: Access) -> str:
    """Size and modification time of a local file, size and entity tag of a remote one.

    Cheap, and different whenever a file was rewritten. Raises OSError where there is no such file.
    """
    if not is_url(location):
        status = on_disk(lambda: Path(location).stat(), location, access.retries)
        return f"{status.st_size}-{status.st_mtime_ns}"
    part = fetch(_address(location, access), access, Span(0, 1), facts=True)
    return f"{part.size}-{part.tag}".replace('"', "")


def exists(location: str, access: Access) -> bool:
    """Whether there is a file behind a URL; SceneError where that cannot be found out."""
    try:
        fetch(_address(location, access), access, Span(0, 1), facts=True)
    except FileNotFoundError:
        return False
    return True


def refuse_special_file(path: str) -> None:
    """Raise SceneError for a folder, pipe or device, which would never end being read."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise SceneError("is no regular file")


def merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs (start, stop) in which some spans are fetched: those that touch, or nearly, are one."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if runs and start - runs[-1][1] <= (runs[-1][1] - runs[-1][0]) // _GAP_SHARE:
            runs[-1] = runs[-1][0], max(stop, runs[-1][1])
        else:
            runs.append((start, stop))
    return runs


class _Run(NamedTuple):
    start: int
    data: bytes


def _cut(runs: list[_Run], start: int, stop: int) -> bytes:
    if stop <= start:
        return b""
    run = next(run for run in reversed(runs) if run.start <= start)
    if (start, stop - start) == (run.start, len(run.data)):
        return run.data
    return run.data[start - run.start : stop - run.start]


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="fetch")


def _address(href: str, access: Access) -> str:
    """The URL to ask for an href that may be opened."""
    check_allowed(href, access)
    try:
        return signed(href, access)
    except AptileError:
        raise
    except Exception as error:  # a function of the user's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SceneError(f"{href} cannot be signed: run.sign {access.sign} says {reason}") from None
