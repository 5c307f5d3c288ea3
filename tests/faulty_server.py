"""A web server on this machine that serves a folder and fails as it is told, counting all it does."""

import contextlib
import re
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipeline.scenes import Retries

# Patient in number, not in time.
QUICK = Retries(6, first_wait_s=0.001, factor=2, longest_wait_s=0.01, timeout_s=0.3, budget_s=60)
# What a server may do that passes.
PASSING = (
    "408", "429", "500", "502", "503", "504", "reset", "close", "cut", "reset in body", "slow", "silent",
    "less", "wrong range", "no range stated",
)  # fmt: skip


@dataclass
class Served:
    """What a server does and did. The first two answers to any request are `twice`, others are taken from
    `faults` one by one, then `always`; only for paths that `where` finds. A fault is one of PASSING, "to
    URL" for a redirect, "whole" (no ranges), "changed" (another version), or a status."""

    folder: Path
    address: str = ""
    faults: deque[str] = field(default_factory=deque)
    always: str | None = None
    twice: str | None = None
    where: Callable[[str], bool] = lambda path: True
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    retry_after: str = "0"
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, path: str, part: str | None) -> str | None:
        """What to do now; the request is counted."""
        with self.lock:
            before = self.asked.count(("GET", path, part))
            self.asked.append(("GET", path, part))
            if not self.where(path):
                return None
            fault = self.faults.popleft() if self.faults else self.always
            fault = self.twice if self.twice and before < 2 else fault
            if fault is not None:
                self.injected[fault] += 1
            return fault


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients of a server that fails hang up."""


@contextmanager
def faulty_server(folder: Path) -> Iterator[Served]:
    served = Served(folder)
    server = _Quiet(("127.0.0.1", 0), _handler(served))
    server.daemon_threads = True
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield served
    finally:
        served.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def listener() -> Iterator[tuple[str, list[object]]]:
    """The address of a socket that nobody should connect to, and who did."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = listening.accept()
                    came.append(peer)
                    connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", came
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fault = served.next_fault(self.path, self.headers.get("Range"))
            with contextlib.suppress(ConnectionError):
                self._answer(fault)

        def _answer(self, fault: str | None) -> None:
            if fault is not None and fault.isdecimal():
                self._state(int(fault), **{"Retry-After": served.retry_after})
            elif fault is not None and fault.startswith("to "):
                self._state(302, Location=fault.removeprefix("to "))
            elif fault == "reset":
                self._reset()
            elif fault == "close":
                self.close_connection = True
            elif fault == "silent":
                self.connection.recv(1)  # until the client goes
                self.close_connection = True
            else:
                self._send_file(fault)

        def _state(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def _send_file(self, fault: str | None) -> None:
            file = served.folder / self.path.partition("?")[0].lstrip("/")
            if not file.is_file():
                self._state(404)
                return
            content = file.read_bytes()
            start, stop = _asked(self.headers.get("Range"), len(content))
            ranged = self.headers.get("Range") is not None and fault != "whole"
            if not ranged:
                start, stop = 0, len(content)
            if ranged and start >= len(content):
                self._state(416, **{"Content-Range": f"bytes */{len(content)}"})
                return
            if fault == "less" and ranged:
                stop = max(start + 1, stop - 1)
            shift = 1 if fault == "wrong range" else 0
            body = content[start:stop]
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"v2"' if fault == "changed" else '"v1"')
            if ranged and fault != "no range stated":
                stated = f"bytes {start + shift}-{stop - 1 + shift}/{len(content)}"
                self.send_header("Content-Range", stated)
            self.end_headers()
            self._send_body(body, fault)

        def _send_body(self, body: bytes, fault: str | None) -> None:
            half = len(body) // 2
            if fault == "slow":
                self.close_connection = True
                for byte in body:
                    self._write(bytes([byte]))
                    if served.stopping.wait(0.02):
                        return
            elif fault == "cut":
                self._write(body[:half])
                self.close_connection = True
            elif fault == "reset in body":
                self._write(body[:half])
                self._reset()
            else:
                self._write(body)

        def _write(self, data: bytes) -> None:
            with served.lock:
                served.sent_bytes += len(data)
            self.wfile.write(data)
            self.wfile.flush()

        def _reset(self) -> None:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True

        def log_message(self, *message: object) -> None:
            """Silent."""

    return Handler


def _asked(header: str | None, size: int) -> tuple[int, int]:
    part = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if part is None:
        return 0, size
    if not part[1]:
        return max(0, size - int(part[2])), size
    return int(part[1]), min(size, int(part[2]) + 1) if part[2] else size
