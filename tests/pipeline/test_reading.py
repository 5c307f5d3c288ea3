"""Reading shards: whatever is asked for comes back as it was written, or an error names the object."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from made_stores import forged, make_store
from pipeline import segments
from pipeline.errors import IntegrityError, StoreError
from pipeline.grid import BaseGrid
from pipeline.storage import opening
from pipeline.storage.layout import BandSet, StoreLayout, array_metadata
from pipeline.storage.objects import LocalObjects
from pipeline.store import Store

CAPACITY, SHARDS, USED = 20, 4, 17
SETS = (BandSet("", ("red", "nir"), "int16", 16), BandSet("coarse", ("swir",), "float32", 8))
GRID = BaseGrid(4, 4, 4, 2)
LAYOUT = StoreLayout("image", SETS, GRID, SHARDS, CAPACITY, "lz4")
FRAME_ARRAYS = sorted(name for name, spec in LAYOUT.arrays().items() if spec.chunk[0] == 1)
PIXELS, FIRST = "image/pixels", "image/pixels/c/0/0/0/0"
MEND = "the store is damaged; `aptile verify` says what is, and how to mend it"


def leaves_of(rng: np.random.Generator) -> list[int]:
    """Leaves of a frame of four roots, some of them missing."""
    roots = [[1] if rng.random() < 0.5 else [0] * 4 for _ in range(4)]
    return [leaf | (0x80 if rng.random() < 0.2 else 0) for root in roots for leaf in root]


def values(seed: int = 0) -> dict[str, np.ndarray]:
    """Leading values [shard, ...] of every array; some frames are fill value alone."""
    rng, blocks = np.random.default_rng(seed), {}
    for name in FRAME_ARRAYS:
        spec = LAYOUT.arrays()[name]
        shape = (SHARDS, USED, *spec.shape[1:])
        blocks[name] = rng.integers(0, 2 if spec.dtype == "bool" else 999, shape).astype(spec.dtype)
        blocks[name][:, 3] = spec.fill_value
    frames = [[leaves_of(rng) for _ in range(USED)] for _ in range(SHARDS)]
    group = "image/partitions/default"
    blocks[f"{group}/counts"] = np.array([[len(f) for f in shard] for shard in frames], np.int32)
    scales = np.full((SHARDS, CAPACITY * GRID.num_cells), 0xFF, np.uint8)
    for row, shard in zip(scales, frames, strict=True):
        flat = np.concatenate(shard)
        row[: len(flat)] = flat
    blocks[f"{group}/scales"] = scales
    return blocks


@pytest.fixture(scope="module")
def blocks():
    return values()


@pytest.fixture(scope="module")
def kept(blocks, tmp_path_factory):
    """A store that no test spoils."""
    return make_store(tmp_path_factory.mktemp("kept") / "store", LAYOUT, blocks)


@pytest.fixture
def store(kept, tmp_path):
    """A copy of it that a test may spoil."""
    objects = LocalObjects(shutil.copytree(kept.objects.folder, tmp_path / "store"))
    return Store(objects, kept.header, kept.commit)


def afresh(store) -> Store:
    """The store as another process opens it."""
    return pickle.loads(pickle.dumps(store))  # noqa: S301 (our own)


@pytest.fixture(params=["held", "by ranges"])
def way(request, monkeypatch):
    """Small objects are held whole, larger ones read by ranges."""
    if request.param == "by ranges":
        monkeypatch.setattr(opening, "_SMALL_BYTES", 0)
    return request.param


def into(store, name: str, frames) -> np.ndarray:
    frames, spec = np.asarray(frames, np.int64), LAYOUT.arrays()[name]
    out = np.empty((len(frames), *spec.shape[1:]), spec.dtype)
    store.read_into(name, frames, out)
    return out


def expected(blocks, name: str, frames) -> np.ndarray:
    spec = LAYOUT.arrays()[name]
    every = np.full((SHARDS, CAPACITY, *spec.shape[1:]), spec.fill_value, spec.dtype)
    every[:, :USED] = blocks[name]
    return every.reshape(spec.shape)[np.asarray(frames, np.int64)]


def shard_of(store, path: str = FIRST):
    return store.objects.folder / path


def told(call):
    """What a call gives, and what it says of a damaged store."""
    try:
        return call(), None
    except IntegrityError as error:
        return None, str(error)


some_frames = st.lists(st.integers(0, SHARDS * CAPACITY - 1), max_size=40)


# --- what is read ---


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_any_frames_come_as_they_were_written(blocks, tmp_path, codec, way):
    layout = StoreLayout("image", SETS, GRID, SHARDS, CAPACITY, codec)
    made = make_store(tmp_path / codec, layout, blocks)

    @settings(max_examples=40)
    @given(st.sampled_from(FRAME_ARRAYS), some_frames)
    def check(name, frames):
        made.will_read(name, np.array(frames, np.int64))
        np.testing.assert_array_equal(into(made, name, frames), expected(blocks, name, frames))

    check()


def test_tensorstore_reads_the_same(kept):
    for name in FRAME_ARRAYS:
        spec = LAYOUT.arrays()[name]
        here = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{kept.objects.folder}/{name}/"},
            "metadata": array_metadata(spec, LAYOUT.codec),
        }
        array = ts.open(here, open=True, read=True, assume_metadata=True).result()
        ours = into(kept, name, range(spec.shape[0]))
        np.testing.assert_array_equal(array.read().result(), ours)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, SHARDS * USED - 1), max_size=30), st.booleans(), st.booleans()
        ),
        max_size=4,
    )
)
def test_leaves_of_any_frames_follow_one_another(blocks, kept, reads):
    made = afresh(kept)
    counted = blocks["image/partitions/default/counts"]
    for slots, ordered, told in reads:
        frames = np.array([s // USED * CAPACITY + s % USED for s in slots], np.int64)
        if ordered:
            frames.sort()
        if told:
            made.will_read("image/partitions/default/scales", frames)
        scales, counts = made.read_scales("image", frames)
        assert (scales.dtype, counts.dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(
            counts, [counted[f // CAPACITY, f % CAPACITY] for f in frames]
        )
        wanted = []
        for frame in frames:
            shard, slot = divmod(int(frame), CAPACITY)
            begin = counted[shard, :slot].sum()
            row = blocks["image/partitions/default/scales"][shard]
            wanted.append(row[begin : begin + counted[shard, slot]])
        np.testing.assert_array_equal(scales, np.concatenate([[], *wanted]))


def test_what_does_not_fit_is_refused(kept):
    frames = np.arange(3)
    for out, message in (
        (np.empty((3, 2, 16, 16), np.uint16), "out is uint16"),
        (np.empty((2, 2, 16, 16), np.int16), r"expected int16 \(3, 2, 16, 16\)"),
        (np.empty((3, 2, 16, 32), np.int16)[..., ::2], "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            kept.read_into(PIXELS, frames, out)
    with pytest.raises(IndexError, match="has chunks 0 ... 79"):
        into(kept, PIXELS, [0, 80])
    with pytest.raises(IndexError):
        kept.read_scales("image", np.array([-1]))
    with pytest.raises(StoreError, match="no array 'image/pixel'; there are image/num_cells"):
        kept.read_into("image/pixel", frames, np.empty(0))


# --- threads and processes ---


def test_threads_read_beside_each_other(store, blocks, monkeypatch, way):
    monkeypatch.setattr(opening, "_OPEN_FILES", 2)
    monkeypatch.setattr(opening, "_HELD_BYTES", 4000)
    again = afresh(store)

    def read(seed: int) -> int:
        rng = np.random.default_rng(seed)
        for name in FRAME_ARRAYS * 3:
            frames = rng.integers(0, SHARDS * CAPACITY, 30)
            np.testing.assert_array_equal(into(again, name, frames), expected(blocks, name, frames))
            again.read_scales("image", frames // CAPACITY * CAPACITY)
        return seed

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(read, range(24))) == list(range(24))
    assert len(list(Path("/proc/self/fd").iterdir())) < 400


def test_a_store_is_read_after_a_fork_and_in_another_process(store, tmp_path):
    (tmp_path / "store.pickle").write_bytes(pickle.dumps(store))
    script = """
import os, pickle, sys, threading
import numpy as np
store = pickle.load(open(sys.argv[1], "rb"))
out = np.empty((80, 2, 16, 16), np.int16)
def read():
    store.read_into("image/pixels", np.arange(80), out)
    store.read_scales("image", np.arange(15))
    return out.tobytes()
first, stop = read(), threading.Event()
def go_on():
    while not stop.is_set():
        store.read_scales("image", np.arange(15))
threads = [threading.Thread(target=go_on) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(read() != first)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads: thread.join()
"""
    command = [sys.executable, "-W", "ignore", "-c", script, tmp_path / "store.pickle"]
    subprocess.run(command, check=True, timeout=300)


def test_a_process_that_may_open_few_files_reads_many_shards(tmp_path):
    layout = StoreLayout("image", SETS, GRID, 200, 4, "lz4")
    block = np.ones((200, 1, 2, 16, 16), np.int16)
    made = make_store(tmp_path / "many", layout, {PIXELS: block})
    script = """
import pickle, resource, sys
import numpy as np
from pipeline.storage import opening
opening._SMALL_BYTES = 0
store = pickle.loads(bytes.fromhex(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
out = np.empty((200, 2, 16, 16), np.int16)
store.read_into("image/pixels", np.arange(200) * 4, out)
assert (out == 1).all()
"""
    command = [sys.executable, "-c", script, pickle.dumps(made).hex()]
    subprocess.run(command, check=True, timeout=300)


# --- faults ---


def test_any_flipped_byte_of_a_pixel_shard_is_noticed_or_does_not_matter(
    store, blocks, monkeypatch, way
):
    path = shard_of(store)
    content, fates = path.read_bytes(), Counter()

    @settings(max_examples=120)
    @given(st.integers(0, len(content) - 1), st.integers(0, 7), st.booleans())
    def check(position, bit, everything):
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << bit
        path.write_bytes(spoilt)
        opened = afresh(store)
        for frames in [range(CAPACITY)] if everything else [[f] for f in range(CAPACITY)]:
            found, said = told(lambda opened=opened, frames=frames: into(opened, PIXELS, frames))
            if said is None:
                np.testing.assert_array_equal(found, expected(blocks, PIXELS, frames))
            else:
                assert FIRST in said
                assert said.endswith(MEND)
            fates["right" if said is None else "raised"] += 1

    check()
    path.write_bytes(content)
    print(f"{way}: flipped bytes, reads of frames: {dict(fates)}")
    assert fates["raised"] > 0


@pytest.mark.parametrize("name", [*FRAME_ARRAYS, "image/partitions/default/scales"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "longer", "a folder"])
def test_a_lost_or_cut_shard_is_named(store, name, fault, way):
    path = shard_of(store, f"{name}/{LAYOUT.arrays()[name].shard_key(1)}")
    content = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(content[:-1])
    elif fault == "longer":
        path.write_bytes(content + b"\0")
    elif fault == "a folder":
        path.mkdir()
    found = "is missing" if fault == "missing" else "bytes long"
    message = rf"{name}/c/1.* {found}; the ledger says {len(content)} bytes: {MEND}"
    store.will_read(name, np.array([CAPACITY]))

    def read(frame: int) -> None:
        if name in FRAME_ARRAYS:
            into(store, name, [frame])
        else:
            store.read_scales("image", np.array([frame]))

    for _ in range(2):
        with pytest.raises(IntegrityError, match=message):
            read(CAPACITY)
    read(0)


def swap(store, one: str, other: str) -> None:
    a, b = shard_of(store, one), shard_of(store, other)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize("equal", [True, False])
def test_swapped_shards_are_noticed(tmp_path, way, equal):
    rng = np.random.default_rng(0)
    # Noise cannot be packed, so that all shards are of one size.
    noise = rng.integers(-(2**15), 2**15, (SHARDS, USED, 2, 16, 16)).astype(np.int16)
    if not equal:
        noise[1, 0] = 5
    made = make_store(tmp_path / "noise", LAYOUT, {PIXELS: noise})
    sizes = {shard_of(made, f"{PIXELS}/c/{n}/0/0/0").stat().st_size for n in (0, 1)}
    assert len(sizes) == (1 if equal else 2)
    swap(made, FIRST, f"{PIXELS}/c/1/0/0/0")
    message = "other content: " if equal else "bytes long; the ledger says"
    with pytest.raises(IntegrityError, match=f"{FIRST} .*{message}"):
        into(made, PIXELS, [0])
    np.testing.assert_array_equal(into(made, PIXELS, [2 * CAPACITY]), noise[2, :1])


def test_a_shard_cut_short_while_it_is_open_is_no_signal_and_no_data(store, blocks, way):
    np.testing.assert_array_equal(into(store, PIXELS, [0]), expected(blocks, PIXELS, [0]))
    path = shard_of(store)
    os.truncate(path, 100)
    if way == "held":
        np.testing.assert_array_equal(into(store, PIXELS, [9]), expected(blocks, PIXELS, [9]))
        return
    with pytest.raises(IntegrityError, match=rf"{FIRST}: the \d+ bytes from byte \d+ on end after"):
        into(store, PIXELS, [9])


def packed(index: list[tuple[int, int]], chunks: bytes) -> bytes:
    """A shard with that index, whose checksum is right."""
    table = b"".join(struct.pack("<QQ", *row) for row in index)
    return chunks + table + struct.pack("<I", google_crc32c.value(table))


def chunk_of(payload: bytes) -> bytes:
    return payload + struct.pack("<I", google_crc32c.value(payload))


NONE = (2**64 - 1, 2**64 - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((2**64 - 1, 100), "cannot be those of chunk 0"),
        ((0, 2**64 - 1), "cannot be those of chunk 0"),
        ((2**64 - 50, 100), "cannot be those of chunk 0"),
        ((10_000_000, 100), "cannot be those of chunk 0"),
        ((0, 0), "cannot be those of chunk 0"),
        ((0, 19), "cannot be those of chunk 0"),
        ((0, 2000), "cannot be those of chunk 0"),
        ((1, 200), "cannot be those of chunk 0"),
        ((0, 100), "do not match their checksum"),
    ],
)
def test_a_forged_index_is_refused(store, row, message, way):
    noise = bytes(np.random.default_rng(0).integers(0, 255, 200, np.uint8))
    made = forged(store, FIRST, packed([row, *[NONE] * (CAPACITY - 1)], noise))
    with pytest.raises(IntegrityError, match=rf"{FIRST}: the .* {message}"):
        into(made, PIXELS, [0])


@pytest.mark.parametrize("num_bytes", [1022, 1026, 4, 2**20])
@pytest.mark.parametrize("claim", [None, 1024])
def test_a_forged_chunk_of_another_size_is_refused(store, num_bytes, claim, way):
    payload = bytearray(blosc.compress(np.zeros(num_bytes // 2, np.int16), b"lz4", 5, 1))
    if claim is not None:
        payload[4:8] = struct.pack("<I", claim)
    chunk = chunk_of(bytes(payload))
    rows = [(0, len(chunk)), *[NONE] * (CAPACITY - 1)]
    made = forged(store, FIRST, packed(rows, chunk))
    _, said = told(lambda: into(made, PIXELS, [0]))
    print(f"{num_bytes} bytes, claimed {claim}: {said}")
    # blosc may decode as much as is claimed; what comes is then a chunk like any other.
    assert FIRST in said if claim is None else said is None or FIRST in said


def test_forged_payloads_never_write_beyond_their_chunk(store, way):
    rng, fates = np.random.default_rng(1), Counter()
    good = blosc.compress(rng.integers(0, 50, 512).astype(np.int16), b"lz4", 5, 1)
    for _ in range(60):
        payload = bytearray(good)
        for position in rng.integers(16, len(payload), 3):
            payload[position] ^= 1 << int(rng.integers(0, 8))
        chunk = chunk_of(bytes(payload))
        content = packed([(0, len(chunk)), *[NONE] * (CAPACITY - 1)], chunk)
        made = forged(store, FIRST, content)
        guarded = np.full((3, 2, 16, 16), 77, np.int16)
        try:
            made.read_into(PIXELS, np.array([0]), guarded[1:2])
            fates["decoded"] += 1
        except IntegrityError:
            fates["raised"] += 1
        assert (guarded[[0, 2]] == 77).all()
    print(f"{way}: forged payloads {dict(fates)}")


def test_validity_is_true_or_false(store, way):
    payload = blosc.compress(np.full((16, 16), 2, np.uint8), b"lz4", 5, 1)
    chunk = chunk_of(payload)
    path = "image/valid/c/0/0/0"
    made = forged(store, path, packed([NONE, (0, len(chunk)), *[NONE] * 18], chunk))
    with pytest.raises(IntegrityError, match=f"{path}: chunk 1 holds bytes that are neither"):
        into(made, "image/valid", [0, 1])


@pytest.mark.parametrize("counts", [[-1, 5], [17, 0], [2**31 - 1, 0]])
def test_impossible_leaf_counts_are_refused(blocks, tmp_path, counts):
    changed = blocks["image/partitions/default/counts"].copy()
    changed[2, :2] = counts
    made = make_store(
        tmp_path / "counts", LAYOUT, {**blocks, "image/partitions/default/counts": changed}
    )
    with pytest.raises(IntegrityError, match=r"counts/c/2: -?\d+ leaves in a frame of 16 cells"):
        made.read_scales("image", np.array([2 * CAPACITY + 5]))
    made.read_scales("image", np.array([0]))


def test_leaves_that_tile_no_frame_are_refused_by_frame(blocks, tmp_path):
    changed = blocks["image/partitions/default/scales"].copy()
    changed[1, 0] ^= 1
    made = make_store(
        tmp_path / "scales", LAYOUT, {**blocks, "image/partitions/default/scales": changed}
    )
    with pytest.raises(IntegrityError, match=f"image frame {CAPACITY}: "):
        made.read_scales("image", np.array([0, CAPACITY + 5, CAPACITY, 2]))
    made.read_scales("image", np.array([0, CAPACITY + 5, 2]))


@settings(max_examples=400)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 0x80, 0x81, 3, 0x7F, 0xFF]), max_size=20),
        max_size=6,
    )
)
def test_frames_are_checked_together_as_they_are_one_by_one(frames):
    grid = BaseGrid(4, 4, 2, 3)

    counts = np.array([len(f) for f in frames], np.int64)
    flat = np.array([leaf for f in frames for leaf in f], np.uint8)

    def one_by_one() -> None:
        for i, frame in enumerate(frames):
            segments.check(np.array(frame, np.uint8), grid, f"frame {i}")

    _, together = told(lambda: segments.check_frames(flat, counts, grid, lambda i: f"frame {i}"))
    assert together == told(one_by_one)[1]
