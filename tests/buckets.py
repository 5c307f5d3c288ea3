"""An S3-compatible server on this machine (moto), behind a proxy that fails as it is told."""

import contextlib
import http.client
import logging
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import from_url

# What the proxy can do instead of answering.
FAULTS = ("500", "503", "429", "reset", "cut")


@dataclass
class Bucket:
    """A bucket at `url` behind the proxy. The first two answers to every request below `path` are
    `fault`, with `always` all of them."""

    url: str
    fault: str | None = None
    always: bool = False
    injected: Counter[str] = field(default_factory=Counter)
    seen: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    def put(self, key: str, content: bytes) -> None:
        obstore.put(from_url(self.url, client_options={"allow_http": True}), key, content)


@contextmanager
def s3_bucket(patch: pytest.MonkeyPatch, name: str = "scenes") -> Iterator[Bucket]:
    """A bucket that the environment leads to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    bucket = Bucket(f"s3://{name}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _proxy(bucket, moto.get_host_and_port()))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(key, "test")
    patch.setenv("AWS_REGION", "us-east-1")
    try:
        client = http.client.HTTPConnection(*moto.get_host_and_port())
        # What other servers of this process held is still there.
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{name}")):
            client.request(method, path)
            answer = client.getresponse()
            answer.read()
            assert answer.status == 200
        client.close()
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        moto.stop()


def _proxy(bucket: Bucket, behind: tuple[str, int]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            request = urlsplit(self.path).path, self.headers.get("Range")
            bucket.seen[request] += 1
            is_due = self.command in ("GET", "HEAD") and (
                bucket.always or bucket.seen[request] <= 2
            )
            fault = bucket.fault if is_due else None
            if fault is not None:
                bucket.injected[fault] += 1
            with contextlib.suppress(ConnectionError):
                self._fail_or_forward(fault)

        do_GET = do_HEAD = do_PUT = _answer

        def _fail_or_forward(self, fault: str | None) -> None:
            if fault == "reset":
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
            elif fault is not None and fault != "cut":
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._forward(is_cut=fault == "cut")

        def _forward(self, is_cut: bool) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            client = http.client.HTTPConnection(*behind)
            client.request(self.command, self.path, body, dict(self.headers))
            answer = client.getresponse()
            content = answer.read()
            client.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if is_cut else content)

        def log_message(self, *message: object) -> None:
            """Silent."""

    return Handler
