"""Reading shards by ranges out of an object store: as from a folder, each block fetched once."""

import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucket_server import BUCKET, CREDENTIALS, bucket_server
from faulty_proxy import FAULTS, at_random, faulty_proxy
from made_stores import make_store
from pipeline.errors import IntegrityError, StoreError
from pipeline.grid import BaseGrid
from pipeline.storage import blocks, opening
from pipeline.storage.blocks import Blocks
from pipeline.storage.layout import BandSet, StoreLayout
from pipeline.store import Store

CAPACITY, SHARDS = 40, 3
LAYOUT = StoreLayout(
    "image", (BandSet("", ("a", "b"), "int16", 16),), BaseGrid(4, 4, 4, 2), SHARDS, CAPACITY, "lz4"
)
PIXELS, FIRST = "image/pixels", "image/pixels/c/0/0/0/0"
NUM_BLOCKS = -(-CAPACITY // blocks.NEIGHBOURS)
GROUP = "image/partitions/default"


@pytest.fixture(scope="module")
def server():
    with bucket_server() as address:
        yield address


@pytest.fixture(autouse=True)
def by_ranges(server, monkeypatch):
    """Clients find the server by the environment; no shard is small."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server))
    monkeypatch.setattr(opening, "_SMALL_BYTES", 0)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    counts = np.full((SHARDS, CAPACITY), 4, np.int32)
    return {
        PIXELS: rng.integers(-999, 999, (SHARDS, CAPACITY, 2, 16, 16)).astype(np.int16),
        f"{GROUP}/counts": counts,
        f"{GROUP}/scales": np.ones((SHARDS, CAPACITY * 4), np.uint8),
    }


@pytest.fixture
def made(arrays, request, by_ranges):
    return make_store(f"s3://{BUCKET}/{request.node.name}", LAYOUT, arrays)


def afresh(store: Store) -> Store:
    return pickle.loads(pickle.dumps(store))  # noqa: S301 (our own)


def into(store: Store, frames) -> np.ndarray:
    frames = np.asarray(frames, np.int64)
    out = np.empty((len(frames), 2, 16, 16), np.int16)
    store.read_into(PIXELS, frames, out)
    return out


def expected(arrays, frames) -> np.ndarray:
    return arrays[PIXELS].reshape(-1, 2, 16, 16)[np.asarray(frames, np.int64)]


def counting(store: Store) -> Counter:
    """How often each range of the store is asked for from now on."""
    asked, ask = Counter(), store.objects.range

    def counted(name: str, start: int, end: int):
        asked[name, start, end] += 1
        return ask(name, start, end)

    store.objects.range = counted
    return asked


def test_any_frames_come_as_from_a_folder(made, arrays, tmp_path):
    folder = make_store(tmp_path / "folder", LAYOUT, arrays)

    @settings(max_examples=20)
    @given(st.lists(st.integers(0, SHARDS * CAPACITY - 1), max_size=30))
    def check(frames):
        np.testing.assert_array_equal(into(made, frames), expected(arrays, frames))
        slots = np.array(frames, np.int64)
        for here, there in zip(
            folder.read_scales("image", slots), made.read_scales("image", slots), strict=True
        ):
            np.testing.assert_array_equal(here, there)

    check()


@pytest.mark.parametrize("told", [True, False])
def test_a_window_is_fetched_once_whoever_asks(made, arrays, told):
    store = afresh(made)
    asked = counting(store)
    every = np.arange(SHARDS * CAPACITY)
    if told:
        store.will_read(PIXELS, every)
    order = np.random.default_rng(0).permutation(every).reshape(-1, 10)
    with ThreadPoolExecutor(4) as pool:
        for frames, found in zip(order, pool.map(lambda f: into(store, f), order), strict=True):
            np.testing.assert_array_equal(found, expected(arrays, frames))
    of_chunks = {key: times for key, times in asked.items() if key[2] - key[1] > 16 * CAPACITY + 4}
    assert set(of_chunks.values()) == {1}
    assert len(of_chunks) == SHARDS * NUM_BLOCKS


def test_blocks_are_held_up_to_a_limit(made, arrays):
    store = afresh(made)
    held = Blocks(store.objects, limit=40_000)
    size = store.objects.size(FIRST)
    for start in range(0, size - 9000, 3000):
        assert held.get(FIRST, start, start + 9000).result().nbytes == 9000
        assert held._bytes == sum(end - begin for _, begin, end in held._held) <= 40_000
    held.forget(FIRST, start, start + 9000)
    assert held._bytes == sum(end - begin for _, begin, end in held._held)


@pytest.mark.parametrize("times", [1, 10**6])
def test_what_suffers_on_the_way_is_asked_for_again(made, arrays, times):
    store, left = afresh(made), [times]
    ask, spoilt = store.objects.range, Counter()

    def sometimes_spoilt(name: str, start: int, end: int):
        content = bytearray(ask(name, start, end))
        if name == FIRST and start < 1000 and left[0]:
            left[0] -= 1
            spoilt[name] += 1
            content[len(content) // 2] ^= 4
        return bytes(content)

    store.objects.range = sometimes_spoilt
    if times == 1:
        np.testing.assert_array_equal(into(store, range(16)), expected(arrays, range(16)))
        return
    with pytest.raises(IntegrityError, match=f"{FIRST}: .* do not match their checksum"):
        into(store, range(16))
    assert 2 <= spoilt[FIRST] < 10


def test_faults_on_the_way_are_told_or_change_nothing(made, arrays, server, monkeypatch):
    with faulty_proxy(server, at_random(0.2, seed=3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*proxy.server_address))
        fates: Counter[str] = Counter()
        for seed in range(15):
            frames = np.random.default_rng(seed).integers(0, SHARDS * CAPACITY, 20)
            try:
                found = into(afresh(made), frames)
            except StoreError as error:
                fates[_told(error, made.location)] += 1
                continue
            np.testing.assert_array_equal(found, expected(arrays, frames))
            fates["equal"] += 1
        counts = {name: proxy.counts[name] for name in ("none", *FAULTS)}
    assert fates["equal"] > 0
    print(f"requests {counts}; reads of 20 frames {dict(fates)}")


def _told(error: StoreError, url: str) -> str:
    assert "\n" not in str(error)
    assert url in str(error)
    return type(error).__name__


@pytest.mark.parametrize("fault", ["missing", "truncated", "swapped", "removed while open"])
def test_a_damaged_shard_is_named(made, arrays, fault):
    store = afresh(made)
    whole, other = (store.objects.read(f"{PIXELS}/c/{n}/0/0/0") for n in (0, 1))
    if fault == "removed while open":
        into(store, [39])
    if fault == "truncated":
        store.objects.write(FIRST, whole[:-5])
    elif fault == "swapped":
        assert len(other) == len(whole)
        store.objects.write(FIRST, other)
    else:
        store.objects.remove([FIRST])
    with pytest.raises(IntegrityError, match=rf"s3://.*/{FIRST}.*the store is damaged"):
        into(store, [0])


def test_a_forked_process_is_told_to_open_the_store_itself(made):
    into(made, [0])
    made.objects._process = os.getpid() + 1  # as a forked process finds it
    with pytest.raises(StoreError, match="was opened before this process was forked"):
        into(made, [39])
    with pytest.raises(StoreError, match="spawn or forkserver"):
        made.objects.read(FIRST)
    np.testing.assert_array_equal(into(afresh(made), [0]), into(afresh(made), [0]))
