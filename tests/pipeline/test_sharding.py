import hashlib

import numpy as np
import tensorstore as ts
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.grid import BaseGrid
from pipeline.storage.layout import BandSet, StoreLayout, array_metadata, metadata_objects
from pipeline.storage.objects import LocalObjects
from pipeline.storage.sharding import ShardEncoder, encoders, write_shard

CAPACITY = 20
SETS = (BandSet("", ("red", "nir"), "int16", 16), BandSet("coarse", ("swir",), "float32", 8))
LAYOUT = StoreLayout("image", SETS, BaseGrid(4, 4, 4, 2), 2, CAPACITY, "lz4")
NAMES = sorted(LAYOUT.arrays())


def by_tensorstore(metadata: dict, block: np.ndarray) -> bytes:
    """The object that tensorstore makes of a whole shard; nothing where all is fill value."""
    one_shard = {**metadata, "shape": list(block.shape)}
    spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": one_shard}
    array = ts.open(spec, create=True).result()
    array[...].write(block).result()
    return bytes(array.kvstore.read("/".join(["c", *["0"] * block.ndim])).result().value)


@st.composite
def leading_values(draw):
    """Name of an array, its codec, and values of the leading part of a shard: frames of fill value, of
    one number and of noise, negative zeros and NaN included."""
    name, codec = draw(st.sampled_from(NAMES)), draw(st.sampled_from(["lz4", "zstd"]))
    spec = LAYOUT.arrays()[name]
    dtype = np.dtype(spec.dtype)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = np.full((draw(st.integers(0, spec.shard[0])), *spec.shard[1:]), spec.fill_value, dtype)
    special = [0, 1] if dtype.kind != "f" else [0, 1, -0.0, np.nan, -np.array(np.nan)]
    for start in range(0, len(values), spec.chunk[0]):
        part = values[start : start + spec.chunk[0]]
        kind = draw(st.sampled_from(["fill", "one number", "noise"]))
        if kind == "one number":
            part[...] = draw(st.sampled_from(special))
        elif kind == "noise":
            part[...] = rng.integers(0, 2 if spec.dtype == "bool" else 100, part.shape)
    return name, codec, values


@settings(max_examples=200)
@given(leading_values())
def test_leading_values_give_the_bytes_of_the_whole_shard(example):
    name, codec, values = example
    spec = LAYOUT.arrays()[name]
    whole = np.full(spec.shard, spec.fill_value, spec.dtype)
    whole[: len(values)] = values
    made = []
    for part in (values, whole):
        encoder = ShardEncoder(spec, codec)
        encoder.put_leading(part)
        made.append(b"".join(encoder.pieces()))
    assert made[0] == made[1] == by_tensorstore(array_metadata(spec, codec), whole)


@settings(max_examples=50)
@given(st.permutations(range(CAPACITY)), st.integers(0, CAPACITY))
def test_bytes_do_not_depend_on_the_order_of_chunks_nor_on_those_dropped(order, num_kept):
    spec = LAYOUT.arrays()["image/pixels"]
    values = np.random.default_rng(0).integers(0, 99, spec.shard).astype(spec.dtype)
    one, other = ShardEncoder(spec, "lz4"), ShardEncoder(spec, "lz4")
    for chunk in order:
        one.put(chunk, values[[chunk]])
    for chunk in order[num_kept:]:
        one.drop(chunk)
    for chunk in sorted(order[:num_kept]):
        other.put(chunk, values[[chunk]])
    assert one.pieces() == other.pieces()


def test_zarr_and_tensorstore_read_what_was_written(tmp_path):
    store = LocalObjects(tmp_path)
    for name, content in metadata_objects({}, [LAYOUT], {}).items():
        store.write(name, content)
    rng, blocks = np.random.default_rng(0), {}
    objects = encoders(LAYOUT.arrays(), LAYOUT.codec)
    for name, encoder in objects.items():
        spec = encoder.spec
        block = rng.integers(0, 2 if spec.dtype == "bool" else 100, spec.shard).astype(spec.dtype)
        blocks[name] = block[: len(block) * 3 // 4]
        encoder.put_leading(blocks[name])
    written = write_shard(store, 1, objects)
    for name, spec in LAYOUT.arrays().items():
        content = (tmp_path / name / spec.shard_key(1)).read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert written.pop(f"{name}/{spec.shard_key(1)}") == entry
        expected = np.full(spec.shape, spec.fill_value, spec.dtype)
        expected[spec.shard[0] :][: len(blocks[name])] = blocks[name]
        path = tmp_path / name
        array = zarr.open_array(path, mode="r")
        assert array.metadata.dimension_names == spec.dims
        np.testing.assert_array_equal(array[...], expected)
        here = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        np.testing.assert_array_equal(ts.open(here).result().read().result(), expected)
    assert not written


def test_a_shard_of_fill_values_has_no_object(tmp_path):
    objects = encoders(LAYOUT.arrays(), LAYOUT.codec)
    for encoder in objects.values():
        encoder.put_leading(
            np.full(encoder.spec.shard, encoder.spec.fill_value, encoder.spec.dtype)
        )
    assert write_shard(LocalObjects(tmp_path), 0, objects) == {}
