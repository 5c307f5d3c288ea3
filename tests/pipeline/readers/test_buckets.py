"""Scenes and cubes in buckets: the same numbers as from a folder, whatever the service does meanwhile."""

from pathlib import Path

import numpy as np
import pytest

from bucket_server import faulty_bucket
from cubes import cube, save
from faulty_proxy import READ_FAULTS
from faulty_server import QUICK
from pipeline.errors import SceneError
from pipeline.fetch.buckets import matching, objects_below
from pipeline.fetch.files import RemoteFile, exists, fingerprint, read_bytes
from pipeline.readers.arrays import open_array_asset
from pipeline.readers.rasters import open_raster
from pipeline.scenes import Access, Retries, Window
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube import list_cube
from support import save_scene, textured

PIXELS = textured((3, 256, 320), seed=7)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    scene = save_scene(tmp_path / "a.tif", PIXELS, tiled=True, blockxsize=64, blockysize=64)
    with faulty_bucket(monkeypatch) as bucket:
        bucket.put("data/a.tif", scene.read_bytes())
        yield bucket


def access_to(bucket, retries: Retries = QUICK) -> Access:
    return Access((bucket.url,), retries=retries)


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_whatever_passes_changes_no_pixel(bucket, fault):
    bucket.fault = fault
    with open_raster(f"{bucket.url}/data/a.tif", access_to(bucket)) as raster:
        np.testing.assert_array_equal(raster.read(), PIXELS)
    print(f"{bucket.injected[fault]} x {fault!r} injected, pixels as in the file")
    assert bucket.injected[fault] >= 4


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_whatever_stays_is_an_error(bucket, fault):
    bucket.fault, bucket.always = fault, True
    with pytest.raises(SceneError, match="s3://scenes/data/a.tif cannot be read: tried 3 times"):
        RemoteFile(f"{bucket.url}/data/a.tif", access_to(bucket, Retries(3, 0.001)))
    assert bucket.injected[fault] == 3


def test_what_is_not_there_and_what_changes(bucket):
    access = access_to(bucket)
    url = f"{bucket.url}/data/a.tif"
    with pytest.raises(FileNotFoundError):
        RemoteFile(f"{bucket.url}/none.tif", access)
    assert not exists(f"{bucket.url}/none.tif", access)
    assert exists(url, access)
    file, before = RemoteFile(url, access), fingerprint(url, access)
    bucket.put("data/a.tif", bytes(file.size))
    assert fingerprint(url, access) != before
    with pytest.raises(SceneError, match="changed while it was read"):
        file.read(100_000, 50_000)


def test_listing_and_patterns(bucket):
    access = access_to(bucket)
    for key in ("data/b/c.tif", "data/b/d.nc", "data/e.zarr/zarr.json"):
        bucket.put(key, b"x")
    root = bucket.url
    listed = dict(objects_below(f"{root}/data", access))
    names = ["a.tif", "b/c.tif", "b/d.nc", "e.zarr/zarr.json"]
    assert list(listed) == [f"{root}/data/{name}" for name in names]
    assert all(fingerprint(url, access) == mark for url, mark in listed.items())
    for pattern, found in (
        ("data/*", ["a.tif", "b", "e.zarr"]), ("data/*/*.nc", ["b/d.nc"]),
        ("data/**/*.tif", ["a.tif", "b/c.tif"]),
        ("data/[ab]*", ["a.tif", "b"]), ("data/none*", []), ("data/b/c.tif", ["b/c.tif"]),
    ):  # fmt: skip
        assert matching(f"{root}/{pattern}", access) == [f"{root}/data/{name}" for name in found]
    assert read_bytes(f"{root}/data/b/c.tif", access) == b"x"
    with pytest.raises(SceneError, match="expected at most 10"):
        read_bytes(f"{root}/data/a.tif", access, most=10)


@pytest.mark.parametrize("name", ["a.zarr", "a.nc"])
def test_a_cube_in_a_bucket(bucket, tmp_path: Path, name):
    dataset = cube()
    chunks = {"shards": (1, 16, 16), "chunks": (1, 8, 8), "zarr_format": 3}
    path = save(dataset, tmp_path / name, **(chunks if name == "a.zarr" else {}))
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            bucket.put(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    bucket.fault = "slow_down"
    access = access_to(bucket)
    modality = ModalityConfig(bands=("B02", "B03"))
    listing = list_cube(f"{bucket.url}/{name}", bucket.url, modality, access)
    for step, scene in enumerate(listing.scenes):
        (asset,) = scene.assets
        with open_array_asset(asset, access) as reader:
            found = reader.read(Window(3, 4, 15, 20))
        stored = np.stack([dataset[band].values[step] for band in ("B02", "B03")])
        np.testing.assert_array_equal(found, stored[:, 3:18, 4:24])
    print(f"{name}: {bucket.injected['slow_down']} x 503 injected, numbers as in the cube")
    assert len(listing.scenes) == 3
