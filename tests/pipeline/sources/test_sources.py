import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bucket_server import faulty_bucket
from pipeline.errors import ArchiveError, ConfigError
from pipeline.fetch.files import fingerprint
from pipeline.scenes import Listing
from pipeline.settings.modality import ModalityConfig
from pipeline.settings.run import RetriesConfig, RunConfig
from pipeline.sources import archive_access, cube, folder, list_scenes, source_files, stac
from support import save_scene

PIXELS = np.arange(2 * 4 * 5, dtype=np.uint16).reshape(2, 4, 5)
MODALITY = ModalityConfig()


def listed(archive: Path | str, **modality) -> Listing:
    run = RunConfig(retries=RetriesConfig(attempts=1))
    config, access = ModalityConfig(**modality), archive_access(str(archive), run)
    listing = list_scenes(str(archive), config, access)
    assert source_files(str(archive), config, access) == listing.files
    return listing


def ids(listing: Listing) -> list[str]:
    return [scene.id for scene in listing.scenes]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("x/a.tif", "x/b.tif", "y/a.tif", "y/deep/a.TIF", "y/.hidden/a.tif", "z[1]/a.tif"):
        save_scene(tmp_path / "archive" / name, PIXELS)
    (tmp_path / "archive/x/a.txt").touch()
    return tmp_path / "archive"


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*/a.tif", ["x/a", "y/a", "z[1]/a"]),
        ("**/a.*", ["x/a", "y/a", "y/deep/a", "z[1]/a"]),
        ("**/*.tif", ["x/a", "x/b", "y/a", "z[1]/a"]),
        ("y/**", ["a", "deep/a"]),
        ("x/[b-z].tif", ["b"]),
        ("x/?.tif", ["a", "b"]),
        ("*/deep/../a.tif", []),
        ("x/*", ["a", "b"]),
        ("z[1]", ["a"]),
        ("y/a.tif", ["a"]),
        ("y", ["a", "deep/a"]),
    ],
)
def test_globs_and_what_ids_are_relative_to(archive, glob, expected):
    if not expected:
        with pytest.raises(ArchiveError, match="no scene found"):
            listed(archive / glob)
        return
    listing = listed(archive / glob)
    assert ids(listing) == expected
    assert [name.rpartition(".")[0] for name in listing.files] == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x", ["x/a", "x/b"]),
        ("y/*.tif", ["y/a"]),
        ("x/b.tif", ["x/b"]),
        ("./y/../x/", ["x/a", "x/b"]),
    ],
)
def test_the_source_of_a_modality_lies_below_the_archive(archive, source, expected):
    assert ids(listed(archive, source=source)) == expected


def test_a_pattern_begins_at_the_source_and_ids_at_the_archive(archive):
    (scene,) = listed(archive, source="y", pattern="{label}/{tile}.TIF").scenes
    assert (scene.id, scene.label, scene.place) == ("y/deep/a", "deep", "a")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("../elsewhere", ArchiveError, "modality.source '../elsewhere' points to .*add it to run.allow"),
        ("/etc", ArchiveError, "modality.source '/etc' points to /etc, outside"),
        ("/etc/*.tif", ArchiveError, "points to /etc, outside"),
        ("https://host/x", ArchiveError, "points to https://host/x, outside"),
        ("none", ArchiveError, "archive/none: no such folder; give a folder of scenes"),
        ("none/*.tif", ArchiveError, "archive/none: no such folder"),
        ("x/a.txt", ArchiveError, "x/a.txt: no raster; expected a file ending in .tif"),
        ("*.tif", ArchiveError, r"archive/\*.tif: no scene found; expected files ending in .tif"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_used(archive, source, error, message):
    with pytest.raises(error, match=message):
        listed(archive, source=source)


@pytest.mark.parametrize("inside", ["x/a.tif", "*/a.tif"])
def test_a_source_needs_a_folder_as_the_archive(archive, inside):
    with pytest.raises(ConfigError, match="is no folder; give the folder as the archive"):
        listed(archive / inside, source="x")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        ("/none/such", "/none/such: no such folder; give a folder of scenes, a quoted glob"),
        ("/none/such/*.tif", "/none/such: no such folder"),
        ("http://127.0.0.1:9/folder", "cannot be read: tried once, at last: no connection"),
        ("https://host/*.tif", "cannot be listed"),
    ],
)
def test_archives_that_cannot_be_used(archive, message):
    with pytest.raises(ArchiveError, match=message):
        listed(archive)


def test_a_folder_without_scenes_tells_what_else_is_there(tmp_path):
    with pytest.raises(ArchiveError, match=r"no scene found; expected files ending in [^;]*$"):
        listed(tmp_path)
    (tmp_path / "catalog.json").touch()
    with pytest.raises(ArchiveError, match="give catalog.json as the source if it is a catalogue"):
        listed(tmp_path)


def test_what_may_be_opened(archive, tmp_path):
    run = RunConfig(
        allow=(str(tmp_path), "s3://bucket/"), jpeg2000=True, sign="a:b", max_block_bytes=9
    )
    access = archive_access(f"{archive}/y/*/a.tif", run)
    assert access.roots == (f"{archive}/y", str(tmp_path), "s3://bucket")
    assert access.drivers == ("GTiff", "JPEG", "PNG", "JP2OpenJPEG")
    assert (access.sign, access.max_block_bytes) == ("a:b", 9)
    assert archive_access(f"{archive}/x/a.tif", RunConfig()).roots == (f"{archive}/x",)
    assert archive_access("https://h/d/x.tif?sig=1", RunConfig()).roots == ("https://h/d",)
    with pytest.raises(ConfigError, match="scheme 'ftp' is not supported"):
        archive_access("ftp://host/folder", RunConfig())


def test_a_relative_archive_is_made_absolute(archive, monkeypatch):
    monkeypatch.chdir(archive)
    for given in (".", "*/[ab].tif", "x/.."):
        assert all(Path(s.assets[0].href).is_absolute() for s in listed(given).scenes)
    monkeypatch.chdir(archive / "x")
    assert ids(listed("a.tif")) == ["a"]


def test_an_archive_that_is_a_link(archive, tmp_path):
    (tmp_path / "current").symlink_to(archive)
    assert ids(listed(tmp_path / "current", source="x")) == ["x/a", "x/b"]


@pytest.mark.parametrize(
    ("given", "source", "kind", "location", "root"),
    [
        ("", None, "folder", "", ""),
        ("c/catalog.json", None, "stac", "c/catalog.json", "c"),
        ("", "c/items.parquet", "stac", "c/items.parquet", ""),
        ("c.json", None, "folder", "c.json", "c.json"),
        ("n/x.nc", None, "cube", "n/x.nc", "n"),
        ("n/x.nc/group", None, "cube", "n/x.nc/group", "n"),
        ("", "n/x.nc/group", "cube", "n/x.nc/group", ""),
        ("n/*.nc", None, "cube", "n/*.nc", "n"),
        ("dir.nc", None, "folder", "dir.nc", "dir.nc"),
        ("z.zarr", None, "cube", "z.zarr", "z.zarr"),
        ("z.zarr", "r10m/b02", "cube", "z.zarr/r10m/b02", "z.zarr"),
        ("z.zarr/r10m", None, "cube", "z.zarr/r10m", "z.zarr"),
        ("", "v2", "cube", "v2", ""),
        ("v3", None, "cube", "v3", "v3"),
    ],
)
def test_sources_are_told_apart(tmp_path, monkeypatch, given, source, kind, location, root):
    for name in ("c/catalog.json", "c/items.parquet", "n/x.nc", "z.zarr/r10m/b02/.zarray"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("c.json/x", "dir.nc/x", "v2/.zgroup", "v3/zarr.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    calls = recorded(monkeypatch)
    archive = str(tmp_path / given) if given else str(tmp_path)
    access = archive_access(archive, RunConfig())
    assert list_scenes(archive, ModalityConfig(source=source), access) == Listing(())
    assert source_files(archive, ModalityConfig(source=source), access) == {}
    expected = tuple(str(tmp_path / name) if name else str(tmp_path) for name in (location, root))
    assert calls == [(kind, *expected)] * 2


@pytest.mark.parametrize(
    ("archive", "kind", "root"),
    [
        ("stac+https://host/v1?collections=a", "stac", "https://host/v1"),
        ("https://host/c/catalog.json", "stac", "https://host/c"),
        ("s3://bucket/items.parquet", "stac", "s3://bucket"),
        ("https://host/d/x.zarr", "cube", "https://host/d/x.zarr"),
        ("https://host/d/x.nc", "cube", "https://host/d"),
        ("s3://bucket/d/*.zarr", "cube", "s3://bucket/d"),
    ],
)
def test_remote_sources_are_told_apart_by_name(monkeypatch, archive, kind, root):
    calls = recorded(monkeypatch)
    list_scenes(archive, MODALITY, archive_access(archive, RunConfig()))
    assert calls == [(kind, archive, root)]


def recorded(monkeypatch) -> list[tuple[str, str, str]]:
    """What is called instead of the sources: their name, the location and the archive's root."""
    calls = []
    for module, kind in ((stac, "stac"), (cube, "cube"), (folder, "folder")):
        for function, answer in ((f"list_{kind}", Listing(())), ("files_of", {})):
            monkeypatch.setattr(
                module,
                function,
                lambda location, root, _m, _a, kind=kind, answer=answer: (
                    calls.append((kind, location, root)) or answer
                ),
            )
    return calls


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def absent(*_):
        raise ModuleNotFoundError("No module named 'pystac_client'")

    monkeypatch.setattr(stac, "list_stac", absent)
    archive = "stac+https://host/v1?collections=a"
    with pytest.raises(ArchiveError, match="No module named .pystac_client.; install it with"):
        list_scenes(archive, MODALITY, archive_access(archive, RunConfig()))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A folder in a bucket that holds scenes, one of them broken, and other things."""
    scene = save_scene(tmp_path / "a.tif", PIXELS).read_bytes()
    with faulty_bucket(monkeypatch) as bucket:
        for name in ("a/x.tif", "b/y.tif", "b/z.txt", ".c/x.tif", "d.zarr/x.tif"):
            bucket.put(f"data/{name}", scene)
        bucket.put("data/a/broken.tif", b"broken")
        yield f"{bucket.url}/data"


def test_buckets_are_listed(bucket):
    access = archive_access(bucket, RunConfig())
    listing = listed(bucket)
    assert ids(listing) == ["a/x", "b/y"]
    assert "not recognized" in listing.refused["a/broken"]
    assert listing.files["a/x.tif"] == fingerprint(f"{bucket}/a/x.tif", access)
    assert listing.scenes[0].assets[0].href == f"{bucket}/a/x.tif"
    assert listing.scenes[0].assets[0].fingerprint == listing.files["a/x.tif"]
    assert ids(listed(f"{bucket}/*/[xy].tif")) == ["a/x", "b/y"]
    assert ids(listed(f"{bucket}/b/y.tif")) == ["y"]
    assert ids(listed(bucket, source="b", pattern="{tile}.tif")) == ["b/y"]


def test_a_bucket_that_cannot_be_listed(bucket):
    with pytest.raises(ArchiveError, match="s3://absent/data.* cannot be listed: .*404 Not Found"):
        listed("s3://absent/data/*.tif")


@pytest.fixture
def web_server(tmp_path):
    """The address of a server that sends files of tmp_path, and parts of them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = tmp_path / self.path.lstrip("/").partition("?")[0]
            if not file.is_file():
                self.send_error(404)
                return
            content, asked = file.read_bytes(), self.headers.get("Range")
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
            first, last = (int(part[1]), int(part[2] or 2**40)) if part else (0, len(content))
            sent = content[first : last + 1]
            self.send_response(206 if part else 200)
            self.send_header("Content-Length", str(len(sent)))
            self.send_header("ETag", '"v1"')
            self.send_header("Accept-Ranges", "bytes")
            if part:
                last = first + len(sent) - 1
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(sent)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_single_file_on_a_web_server(web_server, tmp_path):
    path = save_scene(tmp_path / "data/a.tif", PIXELS, nodata=0)
    (scene,) = listed(f"{web_server}/data/a.tif").scenes
    (asset,) = scene.assets
    assert (scene.id, asset.href) == ("a", f"{web_server}/data/a.tif")
    assert asset.fingerprint == f"{path.stat().st_size}-v1"
    assert asset.grid.in_words().startswith("4 x 5 px, EPSG:32632, origin (500000, 5000000)")
    assert [plane.nodata for plane in asset.planes] == [0, 0]


def test_a_file_that_a_web_server_does_not_have(web_server):
    with pytest.raises(ArchiveError, match=r"none.tif: cannot be reached"):
        listed(f"{web_server}/none.tif")
