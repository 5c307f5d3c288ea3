"""A proxy before an S3-compatible server that spoils some answers: refusals, resets, short, slow bodies."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
REFUSALS = {"slow_down": 503, "server_error": 500, "too_many": 429}
# Faults before the server hears of a request, after it did, and in what it answers.
FAULTS = (
    "slow_down",
    "server_error",
    "reset_before",
    "reset_after",
    "error_after",
    "short_body",
    "slow_body",
    "long_length",
    "short_length",
    "other_etag",
)
# Those that a client which only reads may meet at every request.
READ_FAULTS = ("server_error", "slow_down", "too_many", "reset_before", "short_body")
_SLOW_S = 0.05


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


# What happens to a request: method, path and headers to the name of a fault, or None.
Choose = Callable[[str, str, http.client.HTTPMessage], str | None]


def at_random(share: float, seed: int, faults: tuple[str, ...] = FAULTS) -> Choose:
    """Every request meets one of the faults with this probability."""
    rng, mutex = random.Random(seed), threading.Lock()  # noqa: S311 (which request fails)

    def choose(*_) -> str | None:
        with mutex:
            return rng.choice(faults) if rng.random() < share else None

    return choose


class FaultyProxy(ThreadingHTTPServer):
    """`choose` says which requests fail and how; `counts` says which did, and how often."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int], choose: Choose) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.choose = upstream, choose
        self.counts: Counter[str] = Counter()

    def handle_error(self, request, client_address) -> None:
        """Clients that meet a fault hang up; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.choose(self.command, self.path, self.headers)
        self.server.counts[fault or "none"] += 1
        if fault == "reset_before":
            self._reset()
            return
        if fault in REFUSALS:
            self._send(Answer(REFUSALS[fault], [], SLOW_DOWN))
            return
        answer = self._forward(body)
        if fault == "reset_after":
            self._reset()
        elif fault == "error_after":
            self._send(Answer(500, [], SLOW_DOWN))
        else:
            self._send(answer, fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle

    def _forward(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(*self.server.upstream)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def _send(self, answer: Answer, fault: str | None = None) -> None:
        self.send_response_only(answer.status)
        length = len(answer.body)
        for name, value in answer.headers:
            lower = name.lower()
            if lower == "content-length" and self.command == "HEAD":
                self.send_header(name, value)
            elif lower == "etag" and fault == "other_etag":
                self.send_header(name, '"0123456789abcdef0123456789abcdef"')
            elif lower not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if self.command != "HEAD":
            stated = {"long_length": length + 7, "short_length": max(0, length - 7)}
            self.send_header("Content-Length", str(stated.get(fault or "", length)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow_body":
            half = length // 2
            self.wfile.write(answer.body[:half])
            self.wfile.flush()
            time.sleep(_SLOW_S)
            self.wfile.write(answer.body[half:])
        elif fault == "short_body":
            self.wfile.write(answer.body[: length // 2])
        else:
            self.wfile.write(answer.body)
        if fault in ("short_body", "long_length", "short_length"):
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextmanager
def faulty_proxy(upstream: tuple[str, int], choose: Choose) -> Iterator[FaultyProxy]:
    """A proxy in its own thread; its address is `server_address`."""
    server = FaultyProxy(upstream, choose)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
