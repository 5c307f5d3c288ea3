"""An S3-compatible server on loopback (moto) whose conditional writes are atomic, as a real one's are."""

import logging
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

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
    make = urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
    urllib.request.urlopen(make).close()  # noqa: S310
    try:
        yield str(host), int(port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
