"""Stores that nobody should trust: code in codecs, links out of the archive, chunks that explode."""

import json
import os
import pickle
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import zarr

from cubes import cube, listed, numbers, pixels, plain_asset, readable, save, save_array
from pipeline.errors import ArchiveError, SceneError
from pipeline.readers.arrays import open_array_asset, open_array_file
from pipeline.scenes import Access, Window
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube import list_cube


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def rewrite(document: Path, **facts: object) -> None:
    document.write_text(json.dumps({**json.loads(document.read_text()), **facts}))


def refused(path: Path, match: str, archive: Path | None = None) -> None:
    """Planning refuses the store, and so does reading it as if it had been planned."""
    with pytest.raises(ArchiveError, match=match) as error:
        listed(path, archive, bands=("image",))
    assert "\n" not in str(error.value)
    access = Access((str(archive or path.parent),))
    asset = plain_asset(path, "image", (8, 8), "uint16")
    with pytest.raises(SceneError, match=match), open_array_asset(asset, access) as reader:
        reader.read(Window(0, 0, 8, 8))


@pytest.fixture
def store_2(tmp_path: Path) -> Path:
    values = numbers((8, 8))
    return save_array(tmp_path / "archive/a.zarr", values, ("y", "x"), 2, chunks=(4, 4))


@pytest.fixture
def store_3(tmp_path: Path) -> Path:
    return save_array(tmp_path / "archive/a.zarr", numbers((8, 8)), ("y", "x"), chunks=(4, 4))


@pytest.mark.parametrize("place", ["filters", "compressor"])
@pytest.mark.parametrize(
    "name", ["pickle", "json2", "msgpack2", "vlen-bytes", "categorize", "base64", "zfpy", "no_such"]
)
def test_codecs_that_are_not_known_to_be_safe(store_2, place, name):
    codec = {"id": name}
    rewrite(store_2 / "image/.zarray", **{place: [codec] if place == "filters" else codec})
    refused(store_2, f"array image is stored with codec '{name}'")


@pytest.mark.parametrize("dtype", ["|O", [["a", "<i4"]], "|V8", "<c8", "<M8[ns]", "<U4", "<f2"])
def test_types_that_are_no_numbers(store_2, dtype):
    rewrite(store_2 / "image/.zarray", dtype=dtype)
    with pytest.raises(ArchiveError, match="array image"):
        listed(store_2, bands=("image",))


def test_pickled_chunks_are_not_opened(tmp_path, store_2):
    mark = tmp_path / "executed"
    rewrite(store_2 / "image/.zarray", dtype="|O", filters=[{"id": "pickle"}], compressor=None)
    for chunk in (store_2 / "image").glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(np.array([Bomb(mark)] * 16, object)))
    refused(store_2, "holds objects")
    assert not mark.exists()


@pytest.mark.parametrize("setting", ["dtype", "astype"])
def test_filters_of_objects(store_2, setting):
    codec = {"id": "delta", "dtype": "<u2", "astype": "<u2", setting: "|O"}
    rewrite(store_2 / "image/.zarray", filters=[codec])
    refused(store_2, f"codec delta of {setting}")


@pytest.mark.parametrize(
    ("codecs", "match"),
    [
        ([{"name": "numcodecs.pickle"}], "codec 'numcodecs.pickle'"),
        ([{"name": "bytes"}, {"name": "numcodecs.pickle"}], "codec 'pickle'"),
        ([{"name": "bytes"}, {"name": "numcodecs.delta", "configuration": {}}], "delta behind"),
        ([{"name": "vlen-bytes"}], "codec 'vlen-bytes'"),
        ([], "codec 'none'"),
        ("bytes", "codec 'b'"),
        ([7], "not understood"),
        ([{"name": "transpose", "configuration": {"order": [0, 0]}}], "not understood"),
    ],
)
def test_codecs_of_zarr_3(store_3, codecs, match):
    rewrite(store_3 / "image/zarr.json", codecs=codecs)
    refused(store_3, match)


@pytest.mark.parametrize(
    "facts",
    [
        {"shape": "8x8"},
        {"shape": [-8, 8]},
        {"shape": [8.5, 8]},
        {"shape": [8] * 40},
        {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shape": [4, 4]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 4]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}}},
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../"}}},
        {"chunk_key_encoding": {"name": "mine"}},
        {"storage_transformers": [{"name": "mine"}]},
        {"fill_value": "seven"},
        {"fill_value": 70000},
        {"data_type": {"name": "struct", "configuration": {}}},
    ],
)
def test_metadata_that_is_not_understood(store_3, facts):
    rewrite(store_3 / "image/zarr.json", **facts)
    refused(
        store_3,
        r"not understood|which is not read|which are not read|of an unknown type|dimensions",
    )


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\0"])
def test_metadata_that_is_no_json(store_3, content):
    (store_3 / "image/zarr.json").write_text(content)
    refused(store_3, "image/zarr.json (is no JSON|holds no JSON object)")


def test_paths_that_lead_out(store_3):
    for path in ("../a.zarr/image", "/etc/../image", "image/..", ".", ""):
        with pytest.raises((ArchiveError, SceneError), match="has no array"):
            listed(store_3, assets={"B02": path})
        asset = plain_asset(store_3, path, (8, 8), "uint16")
        with pytest.raises(SceneError, match="has no array"):
            pixels(asset)


@pytest.mark.parametrize("link", ["image", "image/zarr.json", "image/c", "image/c/0/0"])
def test_links_out_of_the_archive(tmp_path, store_3, link):
    (store_3 / link).rename(tmp_path / "secret")
    (store_3 / link).symlink_to(tmp_path / "secret")
    asset = plain_asset(store_3, "image", (8, 8), "uint16")
    np.testing.assert_array_equal(pixels(asset)[0], zarr.open_array(store_3 / "image")[:])
    access = Access((str(store_3.parent),))
    with (
        pytest.raises(SceneError, match=f"secret.*, outside {store_3.parent}"),
        open_array_asset(asset, access) as reader,
    ):
        reader.read(Window(0, 0, 8, 8))


def test_a_link_inside_the_archive_is_followed(store_3):
    chunk = store_3 / "image/c/0/0"
    chunk.rename(store_3.parent / "kept")
    chunk.symlink_to(store_3.parent / "kept")
    assert readable(plain_asset(store_3, "image", (8, 8), "uint16")) is None


def test_a_store_outside_the_roots(tmp_path, store_3):
    access = Access((str(tmp_path / "elsewhere"),))
    with pytest.raises(ArchiveError, match="outside"):
        list_cube(str(store_3), str(tmp_path / "elsewhere"), ModalityConfig(), access)
    with pytest.raises(SceneError, match="outside"), open_array_file(str(store_3), access):
        pass


@pytest.mark.parametrize(
    "codec",
    [numcodecs.Blosc("lz4"), numcodecs.Zlib(9), numcodecs.GZip(9), numcodecs.Zstd(), numcodecs.LZ4(),
     numcodecs.BZ2(), numcodecs.LZMA()],
    ids=lambda codec: codec.codec_id,
)  # fmt: skip
def test_chunks_that_hold_more_than_they_say(tmp_path, codec):
    store = save_array(
        tmp_path / "a.zarr", numbers((8, 8)), ("y", "x"), 2, chunks=(8, 8), compressors=codec
    )
    (store / "image/0.0").write_bytes(codec.encode(np.zeros(2**24, np.uint8)))
    with pytest.raises(SceneError, match=r"more than \d+ bytes|expected at most"):
        pixels(plain_asset(store, "image", (8, 8), "uint16"))


def test_blocks_and_shard_indices_beyond_the_limit(tmp_path, store_3):
    document = store_3 / "image/zarr.json"
    facts = json.loads(document.read_text())
    huge = {"name": "regular", "configuration": {"chunk_shape": [2**20, 2**20]}}
    rewrite(document, shape=[2**20, 2**20], chunk_grid=huge)
    refused(store_3, f"decodes to {2**41} bytes .* more than run.max_block_bytes")
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, 1],
            "codecs": facts["codecs"],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
    }
    rewrite(document, codecs=[sharding])
    refused(store_3, "have an index of 17592186044416 bytes")


def test_coordinates_that_are_too_long(tmp_path):
    path = save(cube(), tmp_path / "a.zarr")
    for array in ("x", "B02", "B03"):
        document = path / array / "zarr.json"
        shape = json.loads(document.read_text())["shape"]
        rewrite(document, shape=[*shape[:-1], 2**30])
    with pytest.raises(ArchiveError, match="coordinate x has 1073741824 values; at most"):
        listed(path)


def netcdf(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        image = file.create_dataset("image", (8, 8), "u2", **options)
        for axis, dim in enumerate("yx"):
            file[dim] = np.arange(8)
            file[dim].make_scale(dim)
            image.dims[axis].attach_scale(file[dim])
    return path


def test_hdf5_that_refers_to_other_files(tmp_path):
    other = netcdf(tmp_path / "other.nc")
    path = netcdf(tmp_path / "archive/link.nc")
    with h5py.File(path, "a") as file:
        file["group/more"] = h5py.ExternalLink(str(other), "/image")
    refused(path, "has a link 'group/more' to another file")
    raw = tmp_path / "raw.bin"
    raw.write_bytes(bytes(128))
    refused(
        netcdf(tmp_path / "archive/raw.nc", external=[(str(raw), 0, 128)]),
        "'image' whose numbers lie in another file",
    )
    path = netcdf(tmp_path / "archive/virtual.nc")
    layout = h5py.VirtualLayout((8, 8), "u2")
    layout[:] = h5py.VirtualSource(str(other), "image", (8, 8))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("more", layout)
    refused(path, "'more' whose numbers lie in another file")


def test_hdf5_filters_from_elsewhere(tmp_path):
    path = netcdf(tmp_path / "a.nc", chunks=(8, 8), compression="gzip")
    content = path.read_bytes()
    start = content.index(b"deflate") - 8
    assert content[start : start + 2] == b"\x01\x00"
    path.write_bytes(content[:start] + b"\x30\x75" + content[start + 2 :])
    refused(path, "HDF5 filter 30000")


def test_hdf5_chunks_that_hold_more_than_they_say(tmp_path):
    path = netcdf(tmp_path / "a.nc", chunks=(8, 8), compression="gzip")
    with h5py.File(path, "a") as file:
        file["image"].id.write_direct_chunk((0, 0), numcodecs.Zlib(9).encode(bytes(2**21)))
    with pytest.raises(SceneError, match=r"more than \d+ bytes|expected at most"):
        pixels(plain_asset(path, "image", (8, 8), "uint16"))


def test_hdf5_chunks_beyond_the_limit(tmp_path):
    path = netcdf(tmp_path / "a.nc", chunks=(8, 8), compression="gzip")
    access = Access((str(tmp_path),), max_block_bytes=100)
    with pytest.raises(ArchiveError, match="decodes to 128 bytes .* run.max_block_bytes 100"):
        list_cube(str(path), str(tmp_path), ModalityConfig(), access)


@pytest.mark.parametrize(
    "content",
    [b"", b"CDF\x01", b"CDF\x05" + bytes(99), b"\x89HDF\r\n\x1a\n" + bytes(99), b"x" * 99],
)
def test_files_that_are_no_netcdf(tmp_path, content):
    (tmp_path / "a.nc").write_bytes(content)
    refused(tmp_path / "a.nc", "cannot be read|no netCDF file")


def test_cut_netcdf_files(tmp_path):
    for form in ("NETCDF3_64BIT", "NETCDF4"):
        path = tmp_path / "a.nc"
        engine = "scipy" if form == "NETCDF3_64BIT" else "h5netcdf"
        cube(dtype="int16").to_netcdf(path, format=form, engine=engine)
        content = path.read_bytes()
        for length in range(8, len(content), 97):
            path.write_bytes(content[:length])
            with pytest.raises(ArchiveError):
                listed(path)


def test_zarr_groups_of_another_version_hold_nothing(tmp_path):
    zarr.create_group(tmp_path / "a.zarr", zarr_format=3)
    with pytest.raises(ArchiveError, match="it has no arrays"):
        listed(tmp_path / "a.zarr", bands=("B02",))
