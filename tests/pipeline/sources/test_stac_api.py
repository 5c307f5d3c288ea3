"""Searching a STAC API, played by a server on this machine."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.sources.stac import files_of, list_stac
from pipeline.sources.stac_api import _connection, search_items, search_parts
from stac_catalogues import MODALITY, access_to, item_of, write_collection

CONFORMANCE = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/item-search",
    "https://api.stacspec.org/v1.0.0/item-search#query",
    "http://www.opengis.net/spec/ogcapi-features-1/1.0/conf/geojson",
]


@dataclass
class Api:
    """What the server answers, and what it was asked."""

    pages: list[Any]
    address: str = ""
    search: str | None = None
    next_page: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    def landing(self) -> dict[str, Any]:
        search = self.search or f"{self.address}/v1/search"
        links = [
            {"rel": "self", "href": f"{self.address}/v1"},
            {"rel": "root", "href": f"{self.address}/v1"},
            {"rel": "search", "href": search, "method": "POST", "type": "application/geo+json"},
        ]
        return {
            "type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "made for a test",
            "conformsTo": CONFORMANCE, "links": links,
        }  # fmt: skip

    def page(self, number: int) -> Any:
        page = self.pages[number]
        if isinstance(page, list):
            more = {
                "rel": "next", "method": "POST", "href": f"{self.address}/v1/search", "merge": True,
                "body": {"token": number + 1}, **self.next_page,
            }  # fmt: skip
            links = [more] if number + 1 < len(self.pages) else []
            return {"type": "FeatureCollection", "features": page, "links": links}
        return page


@contextmanager
def serving(api: Api) -> Iterator[Api]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api.asked.append(("GET", self.path, None))
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/v1")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(api.landing() if self.path == "/v1" else None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            api.asked.append(("POST", self.path, body))
            self._send(api.page(body.get("token", 0)) if self.path == "/v1/search" else None)

        def _send(self, content: Any) -> None:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            del args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def remote(name: str, **properties: Any) -> dict[str, Any]:
    return item_of(name, rasters="https://data.example/x", **properties)


def listed(api: Api, query: str = "collections=test", path: str = "v1"):
    location = f"stac+{api.address}/{path}?{query}"
    access = access_to(api.address)
    access = replace(access, roots=(api.address, "https://data.example"))
    listing = list_stac(location, "/archive", MODALITY, access)
    assert files_of(location, "/archive", MODALITY, access) == listing.files
    return listing


def test_all_pages_of_a_search_become_scenes():
    pages = [[remote("b"), remote("a")], [remote("c"), item_of("d", bands=("VV",))]]
    with serving(Api(pages)) as api:
        listing = listed(api, "collections=s2,s1&bbox=1,2,3,4&datetime=2023&limit=2&query=x%3C10")
    assert [scene.id for scene in listing.scenes] == ["a", "b", "c"]
    assert list(listing.skipped) == ["d"]
    assert listing.scenes[0].assets[0].href == "https://data.example/x/a_B02.tif"
    method, path, body = api.asked[1]
    assert (method, path) == ("POST", "/v1/search")
    assert body["collections"] == ["s2", "s1"]
    assert body["bbox"] == [1.0, 2.0, 3.0, 4.0]
    assert body["datetime"].startswith("2023-01-01T00:00:00Z/2023-12-31")
    assert body["limit"] == 2
    assert body["query"] == {"x": {"lt": "10"}}


def test_the_listing_has_one_entry_that_tells_changes():
    prints = []
    for items in (
        [remote("a"), remote("b")],
        [remote("b"), remote("a")],
        [remote("a"), remote("b", updated="2030-01-01")],
    ):
        with serving(Api([items])) as api:
            ((name, fingerprint),) = listed(api).files.items()
            assert name == f"stac+{api.address}/v1?collections=test"
        prints.append(fingerprint)
    assert len(prints[0]) == 64
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_pages_that_overlap_count_an_item_once_but_not_two_that_differ():
    with serving(Api([[remote("a"), remote("b")], [remote("b")]])) as api:
        assert [scene.id for scene in listed(api).scenes] == ["a", "b"]
    with (
        serving(Api([[remote("a")], [remote("a", datetime="2020-01-01")]])) as api,
        pytest.raises(ArchiveError, match="two items have the id 'a'"),
    ):
        listed(api)


def test_an_empty_search_is_an_empty_listing():
    with serving(Api([[]])) as api:
        assert listed(api).scenes == ()


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ([{"features": [7], "links": 3}], "does not answer"),
        ([b"{"], "does not answer"),
        ([b"[" * 100_000], "does not answer"),
        ([[1, None, "x", remote("a")]], None),
        ([{"features": "abc"}], None),
        ([7], "does not answer"),
    ],
)
def test_answers_that_are_none(pages, reason):
    with serving(Api(pages)) as api:
        if reason is None:
            assert len(listed(api).refused) == 3
        else:
            with pytest.raises(ArchiveError, match=reason):
                listed(api)


@pytest.mark.parametrize(
    "link",
    [
        {"href": "https://elsewhere.example/search"},
        {"href": "http://169.254.169.254/latest/meta-data", "method": "GET"},
        {"href": "file:///etc/passwd", "method": "GET"},
        {"href": "/etc/passwd", "method": "GET"},
        {"method": "DELETE"},
        {"href": 7},
        {"href": None},
    ],
)
def test_only_the_allowed_api_is_asked_whatever_it_links_to(link):
    with serving(Api([[remote("a")], [remote("b")]], next_page=link)) as api:
        with pytest.raises(ArchiveError, match="does not answer a STAC search"):
            listed(api)
        assert {path for _, path, _ in api.asked} <= {"/v1", "/v1/search"}
        assert {method for method, _, _ in api.asked} <= {"GET", "POST"}


@pytest.mark.parametrize(
    "search", ["https://elsewhere.example/search", "file:///etc/passwd", "LOCAL"]
)
def test_an_api_whose_search_is_somewhere_else(tmp_path, search):
    page = write_collection(tmp_path / "page.json", [remote("a")])
    with serving(Api([[remote("a")]], search=search.replace("LOCAL", str(page)))) as api:
        with pytest.raises(ArchiveError, match="does not answer a STAC search"):
            listed(api)
        assert "/v1/search" not in [path for _, path, _ in api.asked]


def test_the_client_opens_no_local_file(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    connection = _connection(access_to(tmp_path))
    for source in (str(tmp_path / "x.json"), f"file://{tmp_path}/x.json"):
        with pytest.raises(SceneError, match="expected a URL"):
            connection.read_text(source)


def test_a_server_that_sends_one_elsewhere_is_not_followed():
    with serving(Api([[remote("a")]])) as api:
        with pytest.raises(ArchiveError, match="does not answer"):
            listed(api, path="moved")
        assert api.asked == [("GET", "/moved", None)]


def test_nothing_is_asked_outside_the_roots():
    with serving(Api([[remote("a")]])) as api:
        with pytest.raises(ArchiveError, match="outside"):
            list(search_items(f"stac+{api.address}/v1?ids=a", access_to("https://data.example")))
        assert api.asked == []


def test_an_api_that_is_not_there():
    with serving(Api([])) as api:
        pass
    with pytest.raises(ArchiveError, match="does not answer a STAC search"):
        listed(api)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "searches for everything there is; give collections, bbox or datetime"),
        ("limit=5", "searches for everything there is"),
        ("collection=a", "parameter 'collection' is not known; expected one of bbox, collections"),
        ("bbox=a,b", "bbox is 'a,b'; expected numbers"),
        ("ids=a&limit=x", "limit is 'x'; expected numbers"),
        ("ids=a&ids=b", "ids is given twice"),
    ],
)
def test_addresses_that_cannot_be_searched(query, reason):
    with pytest.raises(ConfigError, match=reason):
        search_parts(f"stac+https://host.example/v1?{query}")


def test_the_parts_of_an_address():
    url, arguments = search_parts(
        "stac+https://h.example:8080/v1/?collections=a&query=x=1&query=y>2"
    )
    assert url == "https://h.example:8080/v1/"
    assert arguments == {"collections": ["a"], "query": ["x=1", "y>2"]}


def test_without_the_client_the_import_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "pystac_client", None)
    with pytest.raises(ImportError, match="pystac_client"):
        list(search_items("stac+https://h.example/v1?ids=a", access_to("https://h.example")))
