"""An S3-compatible server on loopback (moto) whose conditional writes are atomic, as a real one's are, and
a bucket of it whose answers fail as they are told."""

import http.client
import logging
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import obstore
import pytest
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from obstore.store import from_url
from werkzeug.serving import make_server

from faulty_proxy import faulty_proxy

BUCKET = "scenes"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


class _OneConditionAtATime:
    """moto looks at an object, then replaces it: two requests must not do so at once."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._mutex = threading.Lock()

    def __call__(self, environ, start_response):
        if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
            with self._mutex:
                return list(self._app(environ, start_response))
        return self._app(environ, start_response)


class _Quiet(MotoRequestHandler):
    def log(self, *_) -> None:
        pass


@contextmanager
def bucket_server() -> Iterator[tuple[str, int]]:
    """Host and port of a server with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = make_server(
        "127.0.0.1", 0, _OneConditionAtATime(), threaded=True, request_handler=_Quiet
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    # What other servers of this process held is still there.
    for method, path in (("POST", "moto-api/reset"), ("PUT", BUCKET)):
        asked = urllib.request.Request(f"http://{host}:{port}/{path}", method=method)
        urllib.request.urlopen(asked).close()  # noqa: S310
    try:
        yield str(host), int(port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Bucket:
    """A bucket behind a proxy. The first two answers to every request to read have the `fault`, with
    `always` all of them."""

    url: str = f"s3://{BUCKET}"
    fault: str | None = None
    always: bool = False
    injected: Counter[str] = field(default_factory=Counter)
    seen: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    def put(self, key: str, content: bytes) -> None:
        obstore.put(from_url(self.url, client_options={"allow_http": True}), key, content)

    def choose(self, method: str, path: str, headers: http.client.HTTPMessage) -> str | None:
        request = urlsplit(path).path, headers.get("Range")
        self.seen[request] += 1
        if method not in ("GET", "HEAD") or not (self.always or self.seen[request] <= 2):
            return None
        if self.fault is not None:
            self.injected[self.fault] += 1
        return self.fault


@contextmanager
def faulty_bucket(patch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket that the environment leads to."""
    bucket = Bucket()
    with bucket_server() as address, faulty_proxy(address, bucket.choose) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*proxy.server_address))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            patch.setenv(name, CREDENTIALS[name])
        yield bucket
