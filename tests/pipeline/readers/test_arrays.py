"""Windows of Zarr and netCDF arrays: every number as it is stored, what nobody wrote never as a number."""

import json
import math
import shutil
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import scipy.io
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from cubes import cube, listed, numbers, pixels, plain_asset, readable, save, save_array
from pipeline.errors import SceneError
from pipeline.readers.arrays import open_array_asset
from pipeline.scenes import Access, Plane, Window

DTYPES = [
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float32",
    "float64",
]
V2_COMPRESSORS = [
    None,
    numcodecs.Blosc("lz4"),
    numcodecs.Blosc("zstd", shuffle=numcodecs.Blosc.BITSHUFFLE),
    numcodecs.Zlib(),
    numcodecs.GZip(),
    numcodecs.Zstd(),
    numcodecs.LZ4(),
    numcodecs.BZ2(),
    numcodecs.LZMA(),
]
V3_COMPRESSORS = [
    (),
    (BloscCodec(cname="lz4"),),
    (GzipCodec(),),
    (ZstdCodec(),),
    (ZstdCodec(checksum=True), Crc32cCodec()),
    (Crc32cCodec(),),
]
ORDERS = [("t", "y", "x"), ("x", "t", "y"), ("y", "x", "t")]


@st.composite
def windows(draw, height, width):
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Window(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


@st.composite
def arrays(draw):
    """Numbers with dimensions t, y, x in some order, their chunks, and a step and window of them."""
    dims = draw(st.sampled_from(ORDERS))
    lengths = {
        "t": draw(st.integers(1, 4)),
        "y": draw(st.integers(1, 9)),
        "x": draw(st.integers(1, 9)),
    }
    shape = tuple(lengths[dim] for dim in dims)
    values = numbers(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    chunks = tuple(draw(st.integers(1, length + 2)) for length in shape)
    step = draw(st.integers(0, lengths["t"] - 1))
    return dims, values, chunks, step, draw(windows(lengths["y"], lengths["x"]))


def expected(dims, values, step, window):
    image = values.transpose([dims.index(dim) for dim in "tyx"])[step]
    return image[window.top : window.top + window.height, window.left : window.left + window.width]


def assert_reads(store, dims, values, step, window):
    size = tuple(values.shape[dims.index(dim)] for dim in "yx")
    asset = plain_asset(store, "image", size, values.dtype.name, select=(("t", step),))
    with open_array_asset(asset, Access(("/",))) as reader:
        found = reader.read(window)
        assert reader.readable(window) is None
    assert found.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, expected(dims, values, step, window)[None])


@given(array=arrays(), compressor=st.sampled_from(V2_COMPRESSORS), order=st.sampled_from("CF"),
       separator=st.sampled_from("./"), big=st.booleans(), shuffle=st.booleans())  # fmt: skip
def test_zarr_2_reads_as_written(tmp_path, array, compressor, order, separator, big, shuffle):
    dims, values, chunks, step, window = array
    values = values.astype(values.dtype.newbyteorder(">" if big else "<"))
    store = save_array(
        tmp_path / "a.zarr", values, dims, 2, chunks=chunks, order=order, fill_value=None,
        filters=[numcodecs.Shuffle(values.itemsize)] if shuffle else None, compressors=compressor,
        chunk_key_encoding={"name": "v2", "separator": separator},
    )  # fmt: skip
    assert_reads(store, dims, values, step, window)


@given(array=arrays(), compressors=st.sampled_from(V3_COMPRESSORS), transposed=st.booleans(),
       per_shard=st.one_of(st.none(), st.tuples(*[st.integers(1, 3)] * 3)),
       at_end=st.booleans(), data=st.data())  # fmt: skip
def test_zarr_3_reads_as_written(tmp_path, array, compressors, transposed, per_shard, at_end, data):
    dims, values, chunks, step, window = array
    options = {}
    if per_shard is not None:
        location = "end" if at_end else "start"
        shape = tuple(n * c for n, c in zip(per_shard, chunks, strict=True))
        options["shards"] = {"shape": shape, "index_location": location}
    if transposed:
        order = data.draw(st.permutations(range(3)))
        options["filters"] = [TransposeCodec(order=tuple(order))]
    store = save_array(
        tmp_path / "a.zarr", values, dims, 3, chunks=chunks, compressors=compressors,
        config={"write_empty_chunks": True}, **options,
    )  # fmt: skip
    assert_reads(store, dims, values, step, window)


@given(array=arrays(), compression=st.sampled_from([None, "gzip", "lzf"]), shuffle=st.booleans(),
       fletcher32=st.booleans(), scaleoffset=st.booleans(), big=st.booleans())  # fmt: skip
def test_netcdf_4_reads_as_written(
    tmp_path, array, compression, shuffle, fletcher32, scaleoffset, big
):
    dims, values, chunks, step, window = array
    values = values.astype(values.dtype.newbyteorder(">" if big else "<"))
    chunks = tuple(min(pair) for pair in zip(chunks, values.shape, strict=True))
    options = {"compression": compression, "shuffle": shuffle, "fletcher32": fletcher32}
    if scaleoffset and values.dtype.kind != "f" and not (big or fletcher32):
        options["scaleoffset"] = 0
    if not any(options.values()):
        options, chunks = {}, None
    with h5py.File(tmp_path / "a.nc", "w") as file:
        image = file.create_dataset("image", data=values, chunks=chunks, **options)
        for axis, dim in enumerate(dims):
            file[dim] = np.arange(values.shape[axis])
            file[dim].make_scale(dim)
            image.dims[axis].attach_scale(file[dim])
    assert_reads(tmp_path / "a.nc", dims, values, step, window)


@given(array=arrays(), unlimited=st.booleans())
def test_netcdf_3_reads_as_written(tmp_path, array, unlimited):
    dims, values, _, step, window = array
    if values.dtype.name not in ("int8", "int16", "int32", "float32", "float64"):
        values = values.astype("int16")
    with scipy.io.netcdf_file(tmp_path / "a.nc", "w", version=2) as file:
        for number, (dim, length) in enumerate(zip(dims, values.shape, strict=True)):
            file.createDimension(dim, None if unlimited and number == 0 else length)
        file.createVariable("image", values.dtype, dims)[:] = values
    assert_reads(tmp_path / "a.nc", dims, values, step, window)


@pytest.mark.parametrize(
    "filters",
    [
        [numcodecs.Delta("<i4")],
        [numcodecs.Delta("<i4"), numcodecs.Shuffle(4)],
        [numcodecs.FixedScaleOffset(offset=10, scale=1, dtype="<i4", astype="<i2")],
        [numcodecs.CRC32()],
        [numcodecs.Fletcher32()],
    ],
)
def test_filters_of_zarr_2(tmp_path, filters):
    values = np.arange(600, dtype="<i4").reshape(20, 30)
    store = save_array(
        tmp_path / "a.zarr", values, ("y", "x"), 2, chunks=(7, 8), filters=filters, fill_value=None
    )
    asset = plain_asset(store, "image", (20, 30), "int32")
    np.testing.assert_array_equal(pixels(asset)[0], zarr.open_array(store / "image")[:])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_booleans_are_zero_and_one(tmp_path, zarr_format):
    values = numbers((9, 9), "uint8") > 100
    options = {"filters": [numcodecs.PackBits()]} if zarr_format == 2 else {}
    store = save_array(
        tmp_path / "a.zarr", values, ("y", "x"), zarr_format, chunks=(4, 5), **options
    )
    found = pixels(plain_asset(store, "image", (9, 9), "uint8"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], values)


@given(positions=st.lists(st.integers(0, 6), min_size=1, max_size=9), chunk=st.integers(1, 8))
@settings(max_examples=30)
def test_bands_along_a_dimension_come_in_the_order_of_the_planes(tmp_path, positions, chunk):
    values = numbers((7, 11, 13))
    store = save_array(tmp_path / "a.zarr", values, ("band", "y", "x"), chunks=(chunk, 4, 5))
    planes = tuple(Plane(f"b{n}", f"image[{place}]") for n, place in enumerate(positions))
    asset = plain_asset(store, "", (11, 13), "uint16", planes=planes, band_dim="band")
    window = Window(2, 3, 8, 9)
    np.testing.assert_array_equal(pixels(asset, window), values[positions, 2:10, 3:12])


def test_windows_share_decoded_blocks(tmp_path, monkeypatch):
    values = numbers((64, 64))
    store = save_array(tmp_path / "a.zarr", values, ("y", "x"), chunks=(64, 64))
    asset = plain_asset(store, "image", (64, 64), "uint16")
    with open_array_asset(asset, Access(("/",))) as reader:
        decoded = []
        block = reader._layers[0]._file.block
        monkeypatch.setattr(
            reader._layers[0]._file, "block", lambda *key: decoded.append(key) or block(*key)
        )
        for top in range(0, 64, 16):
            reader.read(Window(top, 0, 16, 64))
            reader.readable(Window(top, 0, 16, 64))
    assert len(decoded) == 1


@pytest.mark.parametrize(("zarr_format", "shards"), [(2, None), (3, None), (3, (8, 8))])
def test_blocks_that_nobody_wrote_are_not_readable(tmp_path, zarr_format, shards):
    values = numbers((12, 16)) | 1
    values[4:8, 4:8] = 0
    options = {"shards": shards} if shards else {}
    store = save_array(
        tmp_path / "a.zarr", values, ("y", "x"), zarr_format, chunks=(4, 4), fill_value=0, **options
    )
    asset = plain_asset(store, "image", (12, 16), "uint16")
    np.testing.assert_array_equal(pixels(asset)[0], values)
    unknown = np.zeros((12, 16), bool)
    unknown[4:8, 4:8] = True
    np.testing.assert_array_equal(readable(asset), ~unknown)
    assert readable(asset, Window(0, 0, 4, 16)) is None
    np.testing.assert_array_equal(readable(asset, Window(5, 2, 4, 4)), ~unknown[5:9, 2:6])


def test_a_lost_chunk_is_not_readable_even_if_zero_is_a_number(tmp_path):
    values = numbers((8, 8))
    store = save_array(tmp_path / "a.zarr", values, ("y", "x"), chunks=(4, 4))
    (store / "image/c/1/0").unlink()
    found = readable(plain_asset(store, "image", (8, 8), "uint16"))
    assert not found[4:, :4].any()
    assert found.sum() == 48


def test_netcdf_blocks_that_nobody_wrote_are_not_readable(tmp_path):
    with h5py.File(tmp_path / "a.nc", "w") as file:
        image = file.create_dataset("image", (8, 8), "i2", chunks=(4, 4), fillvalue=-5)
        late = file.create_dataset("late", (8, 8), "i2", fillvalue=-7)
        for axis, dim in enumerate("yx"):
            file[dim] = np.arange(8)
            file[dim].make_scale(dim)
            image.dims[axis].attach_scale(file[dim])
            late.dims[axis].attach_scale(file[dim])
        image[:4] = 3
    asset = plain_asset(tmp_path / "a.nc", "image", (8, 8), "int16")
    np.testing.assert_array_equal(np.unique(pixels(asset)[0, 4:]), [-5])
    np.testing.assert_array_equal(readable(asset).all(axis=1), np.arange(8) < 4)
    assert not readable(plain_asset(tmp_path / "a.nc", "late", (8, 8), "int16")).any()


def test_unsigned_numbers_stored_as_signed(tmp_path):
    values = numbers((6, 7), "uint16")
    dataset = xr.Dataset({"a": (("y", "x"), values.view("i2"), {"_Unsigned": "true"})})
    for path in (tmp_path / "a.nc", tmp_path / "a.zarr"):
        save(dataset, path)
        (scene,) = listed(path).scenes
        assert scene.assets[0].dtype == "uint16"
        np.testing.assert_array_equal(pixels(scene.assets[0])[0], values)


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_what_changed_since_planning_is_refused_with_both_values(tmp_path, name):
    def rewrite(**facts):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return save(cube(**facts), path)

    asset = listed(rewrite()).scenes[2].assets[0]
    asset = plain_asset(
        tmp_path / name, "", (20, 30), "uint16", planes=asset.planes, select=asset.select
    )
    for facts, message in (
        ({"size": (20, 31)}, "20 x 31 px; planned were 20 x 30"),
        ({"dtype": "int16"}, "int16; planned was uint16"),
        ({"num_steps": 2}, "2 positions along time; planned was position 2"),
        ({"bands": ("B02",)}, "no array B03"),
        ({"num_steps": None}, "planned were y and x"),
    ):
        rewrite(**facts)
        with pytest.raises(SceneError, match=message):
            pixels(asset)


def test_a_netcdf_file_rewritten_since_planning_is_refused(tmp_path):
    asset = listed(save(cube(), tmp_path / "a.nc")).scenes[0].assets[0]
    (tmp_path / "a.nc").unlink()
    save(cube(dtype="uint16", size=(20, 30), bands=("B02", "B03", "B04")), tmp_path / "a.nc")
    with pytest.raises(SceneError, match="changed since it was planned"):
        pixels(asset)


@pytest.mark.parametrize("cut", [0, 1, 20])
@pytest.mark.parametrize("index_at", ["start", "end"])
def test_damaged_shards_are_errors(tmp_path, cut, index_at):
    values = numbers((16, 16))
    store = save_array(
        tmp_path / "a.zarr", values, ("y", "x"), chunks=(4, 4),
        shards={"shape": (8, 8), "index_location": index_at},
    )  # fmt: skip
    shard = store / "image/c/0/0"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(SceneError, match=r"damaged|checksum"):
        pixels(plain_asset(store, "image", (16, 16), "uint16"))


def test_shards_whose_chunks_are_cut_off(tmp_path):
    shards = {"shape": (8, 8), "index_location": "start"}
    store = save_array(
        tmp_path / "a.zarr", numbers((8, 8)), ("y", "x"), chunks=(4, 4), shards=shards
    )
    shard = store / "image/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(SceneError, match="is damaged: a chunk should lie at byte"):
        pixels(plain_asset(store, "image", (8, 8), "uint16"))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (31, "holds a chunk of 31 bytes; expected 32"),
        (33, "holds a chunk of 33 bytes"),
        (9999, "has 9999 bytes; expected at most"),
    ],
)
def test_chunks_of_another_size(tmp_path, length, message):
    values = numbers((4, 4))
    store = save_array(tmp_path / "a.zarr", values, ("y", "x"), chunks=(4, 4), compressors=None)
    (store / "image/c/0/0").write_bytes(bytes(length))
    with pytest.raises(SceneError, match=message):
        pixels(plain_asset(store, "image", (4, 4), "uint16"))


@given(data=st.data())
@settings(max_examples=60)
def test_flipped_bits_raise_scene_errors_or_nothing(tmp_path, data):
    path = tmp_path / "a"
    if not path.exists():
        save_array(path / "z2.zarr", numbers((16, 16)), ("y", "x"), 2, chunks=(8, 8))
        save_array(path / "z3.zarr", numbers((16, 16)), ("y", "x"), chunks=(4, 4), shards=(8, 8))
        save(cube(num_steps=None, bands=("image",), size=(16, 16)), path / "h5.nc", zlib=True)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    root = path / file.relative_to(path).parts[0]
    file.write_bytes(flipped)
    try:
        found = pixels(plain_asset(root, "image", (16, 16), "uint16"))
    except SceneError as error:
        found = error
    finally:
        file.write_bytes(content)
    assert "\n" not in str(found) if isinstance(found, SceneError) else found.shape == (1, 16, 16)


def test_memory_stays_with_the_window(tmp_path):
    store = save_array(tmp_path / "a.zarr", numbers((64, 64)), ("y", "x"), chunks=(16, 16))
    document = store / "image/zarr.json"
    facts = json.loads(document.read_text())
    facts["shape"] = [2**30, 2**30]
    document.write_text(json.dumps(facts))
    side = 2**30
    asset = plain_asset(store, "image", (side, side), "uint16")
    assert pixels(asset, Window(0, 0, 64, 64)).shape == (1, 64, 64)
    assert not readable(asset, Window(side - 5, side - 5, 5, 5)).any()
    assert math.prod(pixels(asset, Window(side - 5, side - 5, 5, 5)).shape) == 25


def test_real_months_equal_what_xarray_reads(real_data: Path):
    path = real_data / "worldcereal" / "worldcereal_preprocessed_inputs.nc"
    with xr.open_dataset(path, mask_and_scale=False, engine="h5netcdf") as raw:
        names = [name for name in raw.data_vars if raw[name].ndim == 3]
        scenes = listed(path, assets={name.replace("-", "_"): name for name in names}).scenes
        assert len(scenes) == 12
        for step, scene in enumerate(scenes):
            (asset,) = scene.assets
            stored = np.stack([raw[name].values[step] for name in names]).view(np.uint16)
            np.testing.assert_array_equal(pixels(asset), stored)
            window = Window(31, 7, 50, 93)
            np.testing.assert_array_equal(pixels(asset, window), stored[:, 31:81, 7:])
