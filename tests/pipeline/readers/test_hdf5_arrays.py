"""Corners of netCDF-4 that its usual writers do not show, and damage that its checksums do."""

import os
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec

from cubes import numbers, pixels, plain_asset, readable, save_array
from pipeline.errors import SceneError


def with_dimensions(file: h5py.File, image: h5py.Dataset, shape: tuple[int, int]) -> None:
    for axis, dim in enumerate("yx"):
        file[dim] = np.arange(shape[axis])
        file[dim].make_scale(dim)
        image.dims[axis].attach_scale(file[dim])


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    with h5py.File(path, "w") as file:
        image = file.create_dataset("image", data=values, **options)
        with_dimensions(file, image, values.shape)
    return path


def test_chunks_whose_filters_were_left_out(tmp_path):
    values = numbers((8, 8))
    path = tmp_path / "a.nc"
    with h5py.File(path, "w") as file:
        options = {"chunks": (4, 8), "compression": "gzip", "shuffle": True}
        image = file.create_dataset("image", (8, 8), "u2", **options)
        with_dimensions(file, image, (8, 8))
        image.id.write_direct_chunk((0, 0), values[:4].tobytes(), filter_mask=0b11)
        image.id.write_direct_chunk((4, 0), zlib.compress(values[4:].tobytes()), filter_mask=0b01)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["image"][...], values)
    np.testing.assert_array_equal(pixels(plain_asset(path, "image", (8, 8), "uint16"))[0], values)


def test_numbers_of_fewer_bits_than_their_bytes(tmp_path):
    values = numbers((8, 8)) % 2**12
    with h5py.File(tmp_path / "a.nc", "w") as file:
        kind = h5py.h5t.STD_U16LE.copy()
        kind.set_precision(12)
        kind.set_offset(2)
        image = file.create_dataset("image", (8, 8), h5py.Datatype(kind), chunks=(4, 4))
        with_dimensions(file, image, (8, 8))
        image[...] = values
    asset = plain_asset(tmp_path / "a.nc", "image", (8, 8), "uint16")
    np.testing.assert_array_equal(pixels(asset)[0], values)


def test_an_array_shorter_than_its_dimensions_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.nc", "w") as file:
        image = file.create_dataset("image", (6, 8), "u2", chunks=(4, 4), maxshape=(None, 8))
        with_dimensions(file, image, (8, 8))
    with pytest.raises(SceneError, match=r"holds \(6, 8\) of the \(8, 8\) numbers"):
        pixels(plain_asset(tmp_path / "a.nc", "image", (8, 8), "uint16"))


def test_stored_chunks_of_impossible_size_are_not_read(tmp_path):
    path = save(tmp_path / "a.nc", numbers((8, 8)), chunks=(8, 8), compression="gzip")
    with h5py.File(path, "a") as file:
        file["image"].id.write_direct_chunk((0, 0), numbers((2**16,), "uint8").tobytes())
    with pytest.raises(SceneError, match="has 65536 bytes; expected at most"):
        pixels(plain_asset(path, "image", (8, 8), "uint16"))


def test_groups_of_netcdf_and_coordinates_around_them(tmp_path):
    values = numbers((8, 8))
    path = save(tmp_path / "a.nc", numbers((8, 8), seed=1))
    with h5py.File(path, "a") as file:
        inner = file.create_dataset("measurements/r10m/image", data=values, chunks=(4, 4))
        for axis, dim in enumerate("yx"):
            inner.dims[axis].attach_scale(file[dim])
    asset = plain_asset(path, "measurements/r10m/image", (8, 8), "uint16")
    np.testing.assert_array_equal(pixels(asset)[0], values)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=40)
@pytest.mark.parametrize("form", ["fletcher32", "crc32c", "shard"])
def test_every_flipped_bit_of_a_chunk_with_a_checksum_is_found(tmp_path, form, place, bit):
    values = numbers((8, 8))
    if form == "fletcher32":
        path = save(tmp_path / "a.nc", values, chunks=(8, 8), fletcher32=True)
        with h5py.File(path) as file:
            info = file["image"].id.get_chunk_info(0)
        file, start, size = path, info.byte_offset, info.size
    else:
        shards = {"shards": (8, 8), "chunks": (4, 4)} if form == "shard" else {"chunks": (8, 8)}
        path = save_array(
            tmp_path / "a.zarr",
            values,
            ("y", "x"),
            serializer=BytesCodec(),
            compressors=(Crc32cCodec(),),
            **shards,
        )
        file = path / "image/c/0/0"
        start, size = 0, file.stat().st_size
    content = bytearray(file.read_bytes())
    content[start + place % size] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(SceneError):
        pixels(plain_asset(path, "image", (8, 8), "uint16"))


def test_a_pipe_in_place_of_a_chunk_is_not_waited_for(tmp_path):

    path = save_array(tmp_path / "a.zarr", numbers((8, 8)), ("y", "x"), chunks=(4, 4))
    (path / "image/c/0/0").unlink()
    os.mkfifo(path / "image/c/0/0")
    with pytest.raises(SceneError, match="image/c/0/0 is no regular file"):
        pixels(plain_asset(path, "image", (8, 8), "uint16"))
    os.mkfifo(tmp_path / "b.nc")
    with pytest.raises(SceneError, match="is no regular file"):
        pixels(plain_asset(tmp_path / "b.nc", "image", (8, 8), "uint16"))
    shutil.rmtree(path / "image/c")
    assert not readable(plain_asset(path, "image", (8, 8), "uint16")).any()
