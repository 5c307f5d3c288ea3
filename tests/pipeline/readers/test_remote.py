"""Rasters behind a URL: every byte as the file has it, whatever the network does, or an error."""

import re
import socket
import ssl
import subprocess
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from cubes import cube, save
from faulty_server import PASSING, QUICK, faulty_server, listener
from pipeline.errors import SceneError
from pipeline.fetch.addresses import addresses_of
from pipeline.fetch.files import PAGE_BYTES, RemoteFile, merged
from pipeline.fetch.http import WHOLE_BYTES, Question, Span, ask
from pipeline.fetch.retries import asked_wait_s
from pipeline.readers.arrays import open_array_asset
from pipeline.readers.rasters import open_raster, open_raster_asset, read_header
from pipeline.scenes import Access, Asset, Plane, Retries, Window
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube import list_cube
from support import save_scene, textured

PIXELS = textured((3, 256, 320), seed=7)
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
WINDOWS = [Window(0, 0, 256, 320), Window(60, 60, 70, 200), Window(255, 319, 1, 1)]


def access_to(address: str, retries: Retries = QUICK, **facts: object) -> Access:
    return Access((address,), retries=retries, **facts)


def asset_of(href: str, access: Access) -> Asset:
    header = read_header(href, access)
    planes = tuple(Plane(f"B{number}", number) for number in range(header.num_bands))
    return Asset(href, "raster", header.grid, header.dtype, planes, header.block_shape, "")


def pixels_of(href: str, access: Access) -> list[np.ndarray]:
    with open_raster_asset(asset_of(href, access), access) as reader:
        return [reader.read(window) for window in WINDOWS]


def assert_pixels(found: list[np.ndarray]) -> None:
    for pixels, (top, left, height, width) in zip(found, WINDOWS, strict=True):
        part = PIXELS[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(pixels, part)


@pytest.fixture
def served(tmp_path):
    """A server of one scene in tiles, one in strips and not compressed, and one of several MB."""
    save_scene(tmp_path / "served/a.tif", PIXELS, **TILED)
    save_scene(tmp_path / "served/raw.tif", PIXELS)
    with faulty_server(tmp_path / "served") as server:
        yield server


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("name", ["a.tif", "raw.tif"])
def test_whatever_passes_changes_no_pixel(served, fault, name):
    access = access_to(served.address)
    served.twice = fault
    assert_pixels(pixels_of(f"{served.address}/{name}", access))
    print(f"{name}: {served.injected[fault]} x {fault!r} injected, pixels as in the file")
    assert served.injected[fault] == 2 * len(set(served.asked)) >= 4


@pytest.mark.parametrize("fault", [*PASSING, "403", "501", "404", "changed"])
@pytest.mark.parametrize("name", ["a.tif", "raw.tif"])
def test_whatever_stays_is_an_error_that_says_how_often_it_was_tried(served, fault, name):
    """From the first read on, and from the first read of pixels on."""
    access = access_to(served.address, Retries(3, 0.001, 2, 0.01, 0.1, 60))
    asset = asset_of(f"{served.address}/{name}", access)
    times = 3 if fault in PASSING else 1
    # What was wrong once is said again at the end, so that nobody takes the pixels before it for good.
    with pytest.raises(SceneError), open_raster_asset(asset, access) as reader:  # noqa: PT012
        served.always = fault
        with pytest.raises(SceneError, match="tried 3 times" if times == 3 else ".") as caught:
            reader.read(WINDOWS[0])
        asked = len(served.asked)
        with pytest.raises(SceneError, match=re.escape(str(caught.value))):
            reader.read(WINDOWS[1])
        assert len(served.asked) == asked
        served.always = None
        with pytest.raises(SceneError, match=re.escape(str(caught.value))):
            reader.read(WINDOWS[2])
    if fault != "changed":
        served.always = fault
        with pytest.raises(SceneError), open_raster(asset.href, access):
            pass
    print(f"{name}: {fault!r} for ever: {caught.value}")


def test_retries_wait_as_the_policy_and_the_server_say(served, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("pipeline.fetch.retries.time.sleep", waits.append)
    access = access_to(served.address, Retries(5, 1.0, 2.0, 5.0, 1.0, 100.0))
    served.always, served.retry_after = "429", "3"
    with pytest.raises(SceneError, match=r"tried 5 times in .*, at last: 429 Too Many Requests"):
        RemoteFile(f"{served.address}/a.tif", access)
    assert waits == [3, 3, 4, 5]
    served.retry_after = "86400"
    waits.clear()
    with pytest.raises(SceneError, match="tried 5 times"):
        RemoteFile(f"{served.address}/a.tif", access)
    assert waits == [5, 5, 5, 5]
    with pytest.raises(SceneError, match="tried once"):
        RemoteFile(f"{served.address}/a.tif", access_to(served.address, Retries(budget_s=1)))


def test_waits_that_servers_ask_for():
    assert asked_wait_s("7") == 7
    assert asked_wait_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert asked_wait_s("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9
    assert [asked_wait_s(text) for text in (None, "", "soon", "-1", "1e9")] == [0] * 5


@pytest.mark.parametrize("name", ["a.tif", "raw.tif"])
def test_a_server_that_sends_no_parts_of_files(served, name, monkeypatch):
    served.always = "whole"
    assert_pixels(pixels_of(f"{served.address}/{name}", access_to(served.address)))
    assert len(served.asked) == 2
    with pytest.raises(SceneError, match="sends no parts of files .HTTP ranges.; copy it"):
        ask(Question(f"{served.address}/{name}", Span(0, 9), most=100), access_to(served.address))
    assert WHOLE_BYTES >= 64 * 2**20


def test_redirects_are_not_followed_and_say_where_they_lead(served):
    with listener() as (elsewhere, came):
        for target in (f"{elsewhere}/a.tif", "http://169.254.169.254/latest", "/raw.tif"):
            served.faults = deque([f"to {target}?signature=secret"])
            with pytest.raises(SceneError, match="leads elsewhere .302 Found") as caught:
                read_header(f"{served.address}/a.tif", access_to(served.address))
            assert "secret" not in str(caught.value)
    assert came == []
    assert len(served.asked) == 3
    print("3 redirects: 3 refused, 0 connections elsewhere")


def test_who_names_an_address_may_ask_it(served):
    port = served.address.rpartition(":")[2]
    for root in (served.address, f"http://localhost:{port}"):
        href = f"{root}/a.tif"
        assert_pixels(pixels_of(href, access_to(root)))
    trusted = access_to("http://127.1:80", allow_private_addresses=True)
    assert addresses_of("127.1", 80, trusted) == ("127.0.0.1",)
    assert addresses_of("93.184.215.14", 80, Access(())) == ("93.184.215.14",)
    assert addresses_of("64:ff9b::5db8:d70e", 80, Access(())) == ("64:ff9b::5db8:d70e",)


def resolving(monkeypatch, *answers: list[str]) -> list[str]:
    """Let name servers answer what a test says, each time the next; what was asked of them."""
    asked: list[str] = []

    real = socket.getaddrinfo

    def getaddrinfo(host, port, *options, **more):
        if host[0].isdecimal():
            return real(host, port, *options, **more)
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr("pipeline.fetch.addresses.socket.getaddrinfo", getaddrinfo)
    return asked


def test_names_that_lead_to_private_addresses(served, monkeypatch):
    """A name server answers for every name what it wants, and the second time something else."""
    port = served.address.rpartition(":")[2]
    url = f"http://data.example:{port}/a.tif"
    access = access_to(f"http://data.example:{port}")
    for answer in (["127.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["169.254.169.254"]):
        resolving(monkeypatch, answer)
        with pytest.raises(SceneError, match=r"data.example is at .*run.allow_private_addresses"):
            read_header(url, access)
    assert served.asked == []
    asked = resolving(monkeypatch, ["127.0.0.1"])
    allowed = access_to(f"http://data.example:{port}", allow_private_addresses=True)
    assert_pixels(pixels_of(url, allowed))
    assert set(asked) == {"data.example"}


def test_the_address_that_was_checked_is_the_one_connected_to(served, monkeypatch):
    """Whatever a name server says after the check, nobody asks it."""
    port = served.address.rpartition(":")[2]
    access = access_to(f"http://data.example:{port}", Retries(1, timeout_s=0.2))
    asked = resolving(monkeypatch, ["192.0.2.1"], ["127.0.0.1"])
    monkeypatch.setattr(
        "pipeline.fetch.addresses._is_public", lambda address: not address.is_loopback
    )
    with pytest.raises(SceneError, match=r"no connection to 192.0.2.1"):
        ask(Question(f"http://data.example:{port}/a.tif"), access)
    assert asked == ["data.example"]
    assert served.asked == []


def test_another_address_of_a_host_is_tried_at_once(served, monkeypatch):
    port = served.address.rpartition(":")[2]
    resolving(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    access = access_to("http://data.example", Retries(1), allow_private_addresses=True)
    assert ask(Question(f"http://data.example:{port}/a.tif"), access).size > 0


def test_certificates_are_verified(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_):
            """Silent."""

    class Quiet(HTTPServer):
        def handle_error(self, *_):
            """Whoever does not trust the certificate hangs up."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Quiet(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        root = f"https://localhost:{server.server_port}"
        with pytest.raises(SceneError, match="certificate that is not trusted .self-signed"):
            ask(Question(f"{root}/x"), access_to(root))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert ask(Question(f"{root}/x"), access_to(root)).data == b"ok"
        other = root.replace("localhost", "127.0.0.1")
        with pytest.raises(SceneError, match="certificate that is not trusted .*127.0.0.1"):
            ask(Question(f"{other}/x"), access_to(other))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_file_that_changes_between_reads(served):
    access = access_to(served.address)
    asset = asset_of(f"{served.address}/raw.tif", access)
    with pytest.raises(SceneError), open_raster_asset(asset, access) as reader:  # noqa: PT012
        np.testing.assert_array_equal(reader.read(WINDOWS[2]), PIXELS[:, 255:, 319:])
        save_scene(served.folder / "raw.tif", PIXELS[:2])
        with pytest.raises(SceneError, match="changed while it was read"):
            reader.read(WINDOWS[1])


@pytest.mark.parametrize("name", ["a.tif", "raw.tif"])
@pytest.mark.parametrize("left", [0.02, 0.5, 0.99])
def test_a_file_that_ends_early_never_reads_as_zeros(served, name, left):
    path = served.folder / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(SceneError):
        pixels_of(f"{served.address}/{name}", access_to(served.address))


def test_little_more_is_fetched_than_the_blocks_that_are_read(tmp_path):
    """Noise, so that blocks are large and of many lengths."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 4000, (4, 1024, 1024)).astype(np.uint16)
    path = tmp_path / "served/cog.tif"
    path.parent.mkdir()
    profile = {"driver": "COG", "count": 4, "height": 1024, "width": 1024, "dtype": "uint16"}
    profile |= {"crs": "EPSG:32632", "transform": Affine(10, 0, 500_000, 0, -10, 5_000_000)}
    with rasterio.open(path, "w", **profile, compress="deflate", blocksize=256) as raster:
        raster.write(pixels)
    for window in (Window(0, 0, 1024, 1024), Window(256, 256, 512, 512), Window(0, 256, 1024, 256)):
        with faulty_server(path.parent) as server:
            access = access_to(server.address)
            with open_raster(f"{server.address}/cog.tif", access) as raster:
                part = rasterio.windows.Window(window.left, window.top, window.width, window.height)
                found = raster.read(window=part)
            needed = block_bytes(path, window, 256)
            requests = len(server.asked)
            amplification = server.sent_bytes / needed
        top, left, height, width = window
        expected = pixels[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(found, expected)
        print(
            f"{window}: {requests} requests, {amplification:.4f} of the {needed} bytes of its blocks"
        )
        assert amplification <= 1.05


def block_bytes(path: Path, window: Window, size: int) -> int:
    """Bytes of the blocks under a window, by the tables of the TIFF file itself."""
    counts = tile_byte_counts(path)
    rows = range(window.top // size, -(-(window.top + window.height) // size))
    cols = range(window.left // size, -(-(window.left + window.width) // size))
    with rasterio.open(path) as raster:
        across = -(-raster.width // size)
    return sum(counts[row * across + col] for row in rows for col in cols)


def tile_byte_counts(path: Path) -> list[int]:
    """Tag 325 of the first directory of a little-endian classic TIFF."""
    content = path.read_bytes()
    assert content[:4] == b"II*\0"
    at = int.from_bytes(content[4:8], "little")
    for entry in range(int.from_bytes(content[at : at + 2], "little")):
        place = at + 2 + 12 * entry
        tag, kind = (int.from_bytes(content[place + n : place + n + 2], "little") for n in (0, 2))
        count = int.from_bytes(content[place + 4 : place + 8], "little")
        if tag == 325:
            width = {3: 2, 4: 4}[kind]
            start = int.from_bytes(content[place + 8 : place + 12], "little")
            return [
                int.from_bytes(content[start + n * width : start + (n + 1) * width], "little")
                for n in range(count)
            ]
    raise AssertionError("no tile byte counts")


def test_parts_that_touch_are_fetched_as_one():
    assert merged([(0, 10), (10, 20), (30, 40)]) == [(0, 20), (30, 40)]
    assert merged([(3200, 6400), (0, 3200), (6500, 7000), (8000, 8001)]) == [
        (0, 7000),
        (8000, 8001),
    ]
    assert merged([(5, 5), (0, 3), (1, 2)]) == [(0, 3)]


def test_a_file_reads_as_it_is_at_every_place(tmp_path):
    rng = np.random.default_rng(11)
    content = rng.bytes(5 * PAGE_BYTES + 123)
    (tmp_path / "x").write_bytes(content)
    with faulty_server(tmp_path) as server:
        file = RemoteFile(f"{server.address}/x", access_to(server.address))
        for start, length in rng.integers(0, len(content) + 9, (60, 2)).tolist():
            length //= int(rng.choice([1, 10, 10_000]))
            assert file.read(start, length) == content[start : start + length]
            parts = [(start // 2, length), (start, length), (start, 0)]
            assert file.read_parts(parts) == [content[s : s + n] for s, n in parts]
    (tmp_path / "empty").write_bytes(b"")
    with faulty_server(tmp_path) as server:
        file = RemoteFile(f"{server.address}/empty", access_to(server.address))
        assert (file.size, file.read(0, 10)) == (0, b"")


def test_a_netcdf_file_whose_server_breaks_off(tmp_path, monkeypatch):
    """HDF5 asks through Python, too; what it had to say must not get lost in the library."""
    monkeypatch.setattr("pipeline.fetch.files.PAGE_BYTES", 256)
    monkeypatch.setattr("pipeline.fetch.files._PAGES_KEPT", 4)
    save(cube(), tmp_path / "a.nc", zlib=True)
    with faulty_server(tmp_path) as server:
        access = access_to(server.address)
        bands = ModalityConfig(bands=("B02", "B03"))
        scene = list_cube(f"{server.address}/a.nc", server.address, bands, access).scenes[0]
        with open_array_asset(scene.assets[0], access) as reader:
            server.always = "503"
            with pytest.raises(SceneError, match="tried 6 times in .* at last: 503"):
                reader.read(Window(0, 0, 20, 30))
