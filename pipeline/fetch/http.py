"""Asking web servers: connections to checked addresses, no redirects, every length and range compared.

A server may send too little, something else than was asked for, or nothing at all; whatever may pass is
tried again, and the rest is an error.
"""

import re
import ssl
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util.ssl_match_hostname import CertificateError

from pipeline.errors import SceneError
from pipeline.fetch.addresses import addresses_of
from pipeline.fetch.retries import Passing, asked_wait_s, retrying
from pipeline.scenes import Access

# What a server that sends no parts of files may send whole.
WHOLE_BYTES = 256 * 2**20
# Slower than this, averaged over the time limit of silence, a server has failed.
LEAST_BYTES_PER_S = 1024
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_PIECE_BYTES = 2**18
_CONNECT_TIMEOUT_S = 10.0
# Rest of an error's page that is read so that its connection can be used again.
_DRAINED_BYTES = 2**16
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


@dataclass(frozen=True)
class Span:
    """Bytes from `start` up to but without `stop`; with a negative start and no stop, the last ones."""

    start: int
    stop: int | None = None

    def header(self) -> str:
        if self.stop is None:
            return f"bytes={self.start}" if self.start < 0 else f"bytes={self.start}-"
        return f"bytes={self.start}-{self.stop - 1}"

    def within(self, size: int) -> tuple[int, int]:
        """Start and stop in a file of so many bytes."""
        start = max(size + self.start, 0) if self.start < 0 else min(self.start, size)
        return start, size if self.stop is None else max(start, min(self.stop, size))


@dataclass(frozen=True)
class Part:
    """Some bytes of a file from `start` on; its size, and what the server calls this version of it."""

    data: bytes
    start: int
    size: int
    tag: str


@dataclass(frozen=True)
class Question:
    """What is asked of a server. `most` is what its answer may have of bytes."""

    url: str
    span: Span | None = None
    most: int = WHOLE_BYTES
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    only_facts: bool = False


def shown(url: str) -> str:
    """A URL for messages: without its query, which may hold a signature."""
    return url.partition("?")[0]


def ask(question: Question, access: Access) -> Part:
    """The file, or a part of it; all of it where the server sends no parts.

    Raises FileNotFoundError where the server has no such file, SceneError for any other failure and
    for an address that must not be connected to.
    """
    return retrying(lambda: _asked(question, access), shown(question.url), access.retries)


def _asked(question: Question, access: Access) -> Part:
    response = _response(question, access)
    try:
        return _part(question, response, access.retries.timeout_s)
    except BaseException:
        response.close()
        raise
    finally:
        response.release_conn()


def _response(question: Question, access: Access) -> Any:
    """The answer without its body, from the first address of the host that can be connected to."""
    parts = _split(question.url)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    failure: Exception = SceneError(f"{host} has no address")
    for address in addresses_of(host, port, access):
        try:
            return _sent(question, parts, _pool(parts.scheme, address, port, host), access)
        except (NewConnectionError, ConnectTimeoutError) as error:
            said = error.__cause__ or error.__context__ or error
            failure = Passing(f"no connection to {address} ({_words(said)})")
        except SSLError as error:
            failure = _of_encryption(host, error)
        except ReadTimeoutError:
            failure = Passing(f"no answer in {access.retries.timeout_s:g} s")
        except HTTPError as error:
            failure = Passing(f"the connection broke off ({_words(error)})")
    raise failure


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SceneError(f"{shown(url)!a:.200} is no address ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SceneError(f"{shown(url)!a:.200} is no address of a web server")
    return parts


def _sent(question: Question, parts: SplitResult, pool: Any, access: Access) -> Any:
    target = urllib3.util.parse_url(question.url).request_uri
    # Bytes as they are: a compressed answer has other lengths than the file.
    headers = {"Host": parts.netloc, "User-Agent": "aptile", "Accept-Encoding": "identity"}
    headers |= dict(question.headers)
    if question.span is not None:
        headers["Range"] = question.span.header()
    timeout_s = access.retries.timeout_s
    timeout = urllib3.Timeout(connect=min(timeout_s, _CONNECT_TIMEOUT_S), read=timeout_s)
    return pool.urlopen(
        question.method, target, question.body, headers, retries=False, redirect=False, timeout=timeout,
        assert_same_host=False, preload_content=False, decode_content=False,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _pool(scheme: str, address: str, port: int, host: str) -> Any:
    """Connections to one address, whose certificate must be that of the host."""
    if scheme == "http":
        return urllib3.HTTPConnectionPool(address, port, maxsize=16)
    return urllib3.HTTPSConnectionPool(
        address, port, maxsize=16, cert_reqs="CERT_REQUIRED", server_hostname=host, assert_hostname=host
    )  # fmt: skip


def _part(question: Question, response: Any, timeout_s: float) -> Part:
    headers, status = response.headers, response.status
    if status not in (200, 206):
        return _refused(question, response)
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    stated = headers.get("Content-Length")
    length = int(stated) if stated is not None and stated.isdecimal() else None
    start, size = 0, length
    if status == 206:
        start, stop, size = _content_range(question, headers.get("Content-Range", ""))
        if length not in (None, stop - start):
            raise Passing(f"{length} bytes were announced for a range of {stop - start}")
        length = stop - start
    if question.only_facts:
        response.close()
        return Part(b"", start, -1 if size is None else size, tag)
    if length is not None and length > question.most:
        raise SceneError(_too_long(question, length, status))
    data = _body(question, response, timeout_s)
    if length is not None and len(data) != length:
        raise Passing(f"the body ended after {len(data)} of {length} bytes")
    return Part(data, start, len(data) if size is None else size, tag)


def _refused(question: Question, response: Any) -> Part:
    """Raise what an answer other than the file means; of a range behind the end, an empty part."""
    status, headers = response.status, response.headers
    url, reason = shown(question.url), f"{response.status} {response.reason or ''}".strip()
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if int(headers.get("Content-Length") or _DRAINED_BYTES) < _DRAINED_BYTES:
        response.drain_conn()
    else:
        response.close()
    if status == 416 and found:
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        return Part(b"", int(found[3]), int(found[3]), tag)
    if status in _BUSY:
        raise Passing(reason, asked_wait_s(headers.get("Retry-After")))
    if status in (404, 410):
        raise FileNotFoundError(2, "No such file or directory", url)
    if 300 <= status < 400:
        to = shown(str(headers.get("Location")))
        raise SceneError(
            f"{url} leads elsewhere ({reason}, to {to!a:.100}), which is not followed; if you trust that "
            "address, name it instead"
        )
    hint = "; if it needs a signature, see run.sign" if status in (401, 403) else ""
    raise SceneError(f"{url} cannot be read: the server says {reason}{hint}")


def _content_range(question: Question, header: str) -> tuple[int, int, int]:
    """Start, stop and size of the file, as the answer states them and the question wants them."""
    found = _CONTENT_RANGE.fullmatch(header.strip())
    if question.span is None or found is None or found[1] is None:
        raise Passing(f"a part was sent with Content-Range {header!a:.60}")
    start, stop, size = int(found[1]), int(found[2]) + 1, int(found[3])
    if (start, stop) != question.span.within(size):
        raise Passing(f"asked for {question.span.header()}, was sent {header!a:.60}")
    return start, stop, size


def _body(question: Question, response: Any, timeout_s: float) -> bytes:
    pieces, count = [], 0
    since, before = time.monotonic(), 0
    try:
        while piece := response.read1(_PIECE_BYTES):
            pieces.append(piece)
            count += len(piece)
            if count > question.most:
                raise SceneError(_too_long(question, None, response.status))
            now = time.monotonic()
            if now - since >= timeout_s:
                if count - before < LEAST_BYTES_PER_S * (now - since):
                    raise Passing(f"only {count} bytes arrived, too slowly")
                since, before = now, count
    except ReadTimeoutError:
        raise Passing(f"nothing arrived for {timeout_s:g} s, after {count} bytes") from None
    except HTTPError as error:
        raise Passing(f"the connection broke off after {count} bytes ({_words(error)})") from None
    return b"".join(pieces)


def _too_long(question: Question, length: int | None, status: int) -> str:
    size = f"more than {question.most}" if length is None else str(length)
    if question.span is not None and status == 200:
        return (
            f"{shown(question.url)} has {size} bytes, and its server sends no parts of files (HTTP "
            "ranges); copy it, or serve it by another server"
        )
    return f"{shown(question.url)} has {size} bytes; expected at most {question.most}"


def _of_encryption(host: str, error: SSLError) -> Exception:
    cause = error.args[0] if error.args else error
    if isinstance(cause, ssl.CertificateError | CertificateError):
        reason = getattr(cause, "verify_message", None) or cause
        return SceneError(
            f"{host} has a certificate that is not trusted ({reason}); if it is yours, name its authority "
            "in SSL_CERT_FILE"
        )
    return Passing(f"the encrypted connection failed ({_words(error)})")


def _words(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:120] or type(error).__name__
