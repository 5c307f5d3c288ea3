"""Where the hrefs of a STAC catalogue may lead, on disk and over a network."""

import hashlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import ArchiveError, SceneError
from pipeline.readers.compare import verify_checksum
from pipeline.sources.stac import files_of, list_stac
from pipeline.sources.stac_links import Hrefs
from stac_catalogues import MODALITY, access_to, item_of, write_catalogue, write_json, write_rasters

ROOT = "https://data.example/scenes"


@pytest.mark.parametrize(
    ("href", "reason"),
    [
        ("https://elsewhere.example/scenes/x.tif", "outside"),
        ("https://data.example/scenes/../x.tif", "outside"),
        ("https://data.example/scenes/%2e%2e/x.tif", "outside"),
        ("https://data.example@elsewhere.example/scenes/x.tif", "outside"),
        ("https://data.example/scenesandmore/x.tif", "outside"),
        ("../x.tif", "outside"),
        ("/scenes/x.tif", "outside"),
        ("/vsicurl/https://data.example/scenes/x.tif", "virtual file"),
        ("/vsis3/bucket/x.tif", "virtual file"),
        ("GTIFF_DIR:1:/scenes/x.tif", "prefix 'GTIFF_DIR:'"),
        ('NETCDF:"x.nc":band', "prefix 'NETCDF:'"),
        ("s3://bucket/x.tif", "outside"),
        ("x.jp2", "set run.jpeg2000"),
        ("x.vrt", "ends in '.vrt'; expected one of"),
        ("x", "ends in ''"),
        ("x?y=/z.tif", "ends in ''"),
        (7, "expected a path or URL"),
        (None, "expected a path or URL"),
    ],
)
def test_hrefs_that_may_not_be_opened(href, reason):
    with pytest.raises(SceneError) as error:
        Hrefs(access_to(ROOT)).raster(href, ROOT)
    assert reason in str(error.value)


@pytest.mark.parametrize("href", ["x.tif?sig=a/b", "X.TIFF", "sub/./x.tif", f"{ROOT}/x.tif"])
def test_hrefs_that_may_be_opened(href):
    assert Hrefs(access_to(ROOT)).raster(href, ROOT).startswith(ROOT)


def test_local_links_out_of_the_roots(tmp_path: Path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "x.tif").write_bytes(b"")
    (tmp_path / "inside/link.tif").symlink_to(tmp_path / "x.tif")
    (tmp_path / "inside/up").symlink_to(tmp_path)
    hrefs = Hrefs(access_to(tmp_path / "inside"))
    for href in ("link.tif", "up/x.tif", "../x.tif", "up/inside/../x.tif"):
        with pytest.raises(SceneError, match="outside"):
            hrefs.raster(href, str(tmp_path / "inside"))
    found = [
        hrefs.raster(href, str(tmp_path / "inside"))
        for href in ("a.tif", "up/inside/a.tif", "./b/../a.tif")
    ]
    assert found == [str(tmp_path / "inside/a.tif")] * 3


def test_a_root_that_is_one_file(tmp_path: Path):
    hrefs = Hrefs(access_to(tmp_path / "a.tif"))
    assert hrefs.raster("a.tif", str(tmp_path)) == str(tmp_path / "a.tif")
    with pytest.raises(SceneError, match="outside"):
        hrefs.raster("b.tif", str(tmp_path))
    with pytest.raises(SceneError, match="outside"):
        Hrefs(access_to(tmp_path)).raster("/b.tif", str(tmp_path))


def test_jpeg_2000_only_where_its_driver_is_allowed(tmp_path: Path):
    allowed = access_to(tmp_path, drivers=("GTiff", "JP2OpenJPEG"))
    assert Hrefs(allowed).raster("a.jp2", str(tmp_path)) == str(tmp_path / "a.jp2")


@contextmanager
def served(folder: Path, moved: dict[str, str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Address of a loopback server of a folder's files, and what it was asked for."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            asked.append((self.command, self.path))
            if self.path in moved:
                self.send_response(302)
                self.send_header("Location", moved[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            file = folder / self.path.lstrip("/")
            content = file.read_bytes() if file.is_file() else b""
            self.send_response(200 if file.is_file() else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hash(content):x}"')
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            del args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_remote_catalogue_and_what_it_may_not_reach(tmp_path: Path):
    write_json(tmp_path / "cat/one.json", item_of("one", rasters="../data"))
    write_json(tmp_path / "cat/private.json", item_of("private"))
    two = item_of("two", rasters="https://elsewhere.example")
    write_json(tmp_path / "cat/two.json", two)
    write_rasters(tmp_path / "data", "one")
    with served(tmp_path, {}) as (other, asked_elsewhere):
        links = ["one.json", "two.json", "moved.json", f"{other}/cat/one.json", "absent.json"]
        start = write_catalogue(tmp_path / "cat/catalog.json", [("item", link) for link in links])
        moved = {"/cat/moved.json": f"{other}/cat/private.json"}
        with served(tmp_path, moved) as (address, asked):
            location = f"{address}/{start.relative_to(tmp_path)}"
            access = access_to(address)
            listing = list_stac(location, address, MODALITY, access)
            assert files_of(location, address, MODALITY, access) == listing.files
    assert not [path for method, path in asked_elsewhere if method == "GET"]
    assert [scene.id for scene in listing.scenes] == ["one"]
    assert [a.href for a in listing.scenes[0].assets] == [
        f"{address}/data/one_{band}.tif" for band in ("B02", "B03")
    ]
    assert not any(path.endswith(".tif") for _, path in asked)
    reasons = {name.rpartition("/")[2].strip("'"): text for name, text in listing.refused.items()}
    assert "outside" in reasons["two"]
    assert "leads elsewhere (302 Found" in reasons["moved.json"]
    assert "outside" in reasons["one.json"]
    assert "cannot be read" in reasons["absent.json"]


def test_headers_of_remote_files_are_read_where_they_are_needed(tmp_path: Path):
    item = item_of("one")
    for band in ("B02", "B03"):
        del item["assets"][band]["raster:bands"]
    write_json(tmp_path / "one.json", item)
    write_rasters(tmp_path, "one")
    with served(tmp_path, {}) as (address, _):
        listing = list_stac(f"{address}/one.json", address, MODALITY, access_to(address))
    (scene,) = listing.scenes
    assert {(asset.header_seen, asset.dtype) for asset in scene.assets} == {(True, "uint16")}


def test_a_server_that_is_not_there(tmp_path: Path):
    with served(tmp_path, {}) as (address, _):
        pass
    with pytest.raises(ArchiveError, match="cannot be read"):
        list_stac(f"{address}/catalog.json", address, MODALITY, access_to(address))


def test_addresses_are_signed_before_they_are_opened(tmp_path: Path, monkeypatch):
    (tmp_path / "signer.py").write_text("def sign(url):\n    return url + '?token=7'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    write_json(tmp_path / "one.json?token=7", item_of("one"))
    with served(tmp_path, {}) as (address, asked):
        access = access_to(address, sign="signer:sign")
        listing = list_stac(f"{address}/one.json", address, MODALITY, access)
    assert {path for _, path in asked} == {"/one.json?token=7"}
    assert listing.scenes[0].assets[0].href == f"{address}/one_B02.tif"


def test_checksums_of_remote_files(tmp_path: Path):
    content = bytes(1000)
    (tmp_path / "x.tif").write_bytes(content)
    with served(tmp_path, {"/moved.tif": "/x.tif"}) as (address, _):
        known = "1220" + hashlib.sha256(content).hexdigest()
        verify_checksum(f"{address}/x.tif", known, access_to(address))
        with pytest.raises(SceneError, match="in its file"):
            verify_checksum(f"{address}/x.tif", "1220" + "0" * 64, access_to(address))
        with pytest.raises(SceneError, match="cannot be read"):
            verify_checksum(f"{address}/absent.tif", known, access_to(address))
        with pytest.raises(SceneError):
            verify_checksum(f"{address}/moved.tif", known, access_to(address))


def test_a_file_system_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r"buckets need obstore; install aptile.cloud."):
        list_stac("s3://absent/catalog.json", "s3://absent", MODALITY, access_to("s3://absent"))
