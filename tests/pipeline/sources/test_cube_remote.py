"""Data cubes behind a URL: a web server that this process runs, with and without consolidated metadata."""

import functools
import http.server
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from cubes import cube, save
from pipeline.errors import ArchiveError, SceneError
from pipeline.readers.arrays import open_array_asset
from pipeline.scenes import Access, Listing, Window
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube import files_of, list_cube

BANDS = ModalityConfig(bands=("B02", "B03"))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, parts of them on request; what lies below /moved is elsewhere."""

    def send_head(self):
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return None
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        size = path.stat().st_size
        file = path.open("rb")
        start, stop = 0, size
        stated = self.headers.get("Range")
        if stated:
            first, last = stated.removeprefix("bytes=").split("-")
            start = int(first) if first else size - int(last)
            stop = min(int(last) + 1, size) if first and last else size
        self.send_response(206 if stated else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        file.seek(start)
        self.left = stop - start
        return file

    def copyfile(self, source, outputfile):
        outputfile.write(source.read(self.left))

    def log_message(self, *message):
        """Silent."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def listed(root: str, name: str, **facts: object) -> Listing:
    return list_cube(f"{root}/{name}", root, BANDS, Access((root,), **facts))


def assert_pixels(listing: Listing, root: str, dataset: object) -> None:
    for step, scene in enumerate(listing.scenes):
        (asset,) = scene.assets
        with open_array_asset(asset, Access((root,))) as reader:
            found = reader.read(Window(3, 4, 15, 20))
            assert reader.readable(Window(3, 4, 15, 20)) is None
        stored = np.stack([dataset[band].values[step] for band in ("B02", "B03")])
        np.testing.assert_array_equal(found, stored[:, 3:18, 4:24])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [True, False])
def test_zarr_behind_a_url(served, zarr_format, consolidated):
    folder, root = served
    dataset = cube()
    shards = {"shards": (1, 16, 16)} if zarr_format == 3 else {}
    path = save(dataset, folder / "cubes/a.zarr", zarr_format, chunks=(1, 8, 8), **shards)
    (path / ".zmetadata").unlink(missing_ok=True)
    if consolidated:
        with warnings.catch_warnings():
            # Of version 3, consolidated metadata are no standard yet.
            warnings.simplefilter("ignore", UserWarning)
            zarr.consolidate_metadata(path, zarr_format=zarr_format)
    listing = listed(root, "cubes/a.zarr")
    assert [scene.id[:8] for scene in listing.scenes] == ["cubes/a@"] * 3
    assert listing.scenes[0].assets[0].href == f"{root}/cubes/a.zarr"
    assert listing.scenes[0].assets[0].grid.crs == "EPSG:32632"
    assert_pixels(listing, root, dataset)
    assert listing.files == files_of(f"{root}/cubes/a.zarr", root, BANDS, Access((root,)))


def test_netcdf_behind_a_url(served):
    folder, root = served
    dataset = cube()
    save(dataset, folder / "a.nc", zlib=True)
    listing = listed(root, "a.nc")
    assert_pixels(listing, root, dataset)
    assert list(listing.files) == ["a.nc"]


def test_classic_netcdf_behind_a_url_is_refused(served):
    folder, root = served
    cube(dtype="int16").to_netcdf(folder / "a.nc", engine="scipy", format="NETCDF3_64BIT")
    with pytest.raises(ArchiveError, match="read from a folder only; copy it"):
        listed(root, "a.nc")


def test_addresses_outside_the_roots_and_redirections(served):
    folder, root = served
    save(cube(), folder / "a.zarr")
    save(cube(), folder / "a.nc")
    asset = listed(root, "a.zarr").scenes[0].assets[0]
    with (
        pytest.raises(SceneError, match="outside"),
        open_array_asset(asset, Access((f"{root}/b",))),
    ):
        pass
    for name in ("moved/a.zarr", "moved/a.nc"):
        with pytest.raises(ArchiveError):
            listed(root, name)


def test_signing_is_refused_for_stores_of_many_objects(served):
    folder, root = served
    save(cube(), folder / "a.zarr")
    with pytest.raises(ArchiveError, match="run.sign cannot sign"):
        listed(root, "a.zarr", sign="urllib.parse:urlsplit")


def test_a_lost_chunk_behind_a_url_is_not_readable(served):
    folder, root = served
    path = save(cube(), folder / "a.zarr", chunks=(1, 10, 10))
    asset = listed(root, "a.zarr").scenes[0].assets[0]
    shutil.rmtree(path / "B03/c/0/1")
    with open_array_asset(asset, Access((root,))) as reader:
        found = reader.readable(Window(0, 0, 20, 30))
    np.testing.assert_array_equal(found.all(axis=1), np.arange(20) < 10)
