"""How fast a store is read, next to other readers of the same shards in the same run.

Pixels: 12 x 128 x 128 uint16 frames in lz4, the page cache warm, batches of 64 frames, in random order over
all shards and in runs of neighbours, with one thread and with two. `bare loop` is what a hand-written loop
over a mapped file and numcodecs does that checks nothing and knows all positions: the practical limit.
`with checksums` is that loop with the chunks' crc32c. tensorstore brings its own threads, as many as cores.

Leaves: partitions of about 120 leaves per frame, in windows of neighbouring frames and 256 random frames a
call. `read_scales` counts and checks the leaves of every frame; tensorstore reads their bytes alone.

Every figure is the best of several rounds; in a round the readers take turns.
"""

import json
import mmap
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorstore as ts
import zarr
from numcodecs import blosc

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, report
from pipeline.grid import BaseGrid
from pipeline.storage.commit import PREPROCESS, Batch, Commit, named
from pipeline.storage.header import modality_header
from pipeline.storage.layout import FORMAT_VERSION, BandSet, StoreLayout, array_metadata
from pipeline.storage.ledger import Ledger
from pipeline.storage.objects import LocalObjects
from pipeline.storage.sharding import encoders, write_shard
from pipeline.store import Store

BATCH = 64
ROUNDS = 4
ALL = 10**6  # batches a round at most
PIXELS, GROUP = "image/pixels", "image/partitions/default"
COUNTS, SCALES = f"{GROUP}/counts", f"{GROUP}/scales"
SPLIT = 0.41  # of nodes: about 120 leaves in 16 roots of 4 scales
FACTS = {
    "value_range": [], "statistics": None, "ground_sample_distance_m": None, "scale": None, "offset": None,
    "wavelengths_nm": None, "kind": "image", "static": False, "ignore_index": None,
}  # fmt: skip
Fill = Callable[[dict[str, Any], int], None]
Read = Callable[[np.ndarray], Any]


def make_store(folder: Path, layout: StoreLayout, fill: Fill) -> Store:
    """A store whose shards hold what `fill` puts into their encoders."""
    objects, rows = LocalObjects(folder), {}
    for shard in range(layout.num_shards):
        encoded = encoders(layout.arrays(), layout.codec)
        fill(encoded, shard)
        rows[shard] = {"shard": shard, "objects": write_shard(objects, shard, encoded)}
    head = {"batch": 1, "first_shard": 0, "num_shards": layout.num_shards}
    ledger = Ledger(head, shards=rows)
    ledger.create(objects)
    modalities = {layout.modality: modality_header(layout, FACTS)}
    header = {"format_version": FORMAT_VERSION, "config": {}, "modalities": modalities}
    batch = Batch(1, 0, layout.num_shards, named("ledger/000001.jsonl", ledger.canonical()))
    return Store(objects, header, Commit(1, PREPROCESS, None, header, {}, (batch,), {}, {}))


def smooth(rng: np.random.Generator, bands: int, side: int) -> np.ndarray:
    """uint16 [band, y, x] around 2000 whose amplitudes fall with 1/f, plus noise."""
    y, x = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    fall = 1 / np.maximum(np.hypot(y, x), 1 / side)
    planes = np.fft.irfft2(
        np.fft.rfft2(rng.normal(size=(bands, side, side))) * fall, s=(side, side)
    )
    return (2000 + 500 * planes / planes.std() + rng.normal(0, 8, planes.shape)).astype(np.uint16)


def opened(store: Store, layout: StoreLayout, name: str) -> Any:
    """An array as tensorstore opens it, its positions cached."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{store.location}/{name}/"},
        "metadata": array_metadata(layout.arrays()[name], layout.codec),
        "recheck_cached_data": False,
    }
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**25}})
    how = {"open": True, "read": True, "assume_metadata": True}
    return ts.open(spec, context=context, **how).result()


class Bare:
    """Mapped shards and their positions."""

    def __init__(self, store: Store, layout: StoreLayout, name: str) -> None:
        self.capacity, spec = layout.shard_capacity, layout.arrays()[name]
        self.files, self.offsets, self.lengths = [], [], []
        for shard in range(layout.num_shards):
            with (store.objects.folder / name / spec.shard_key(shard)).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            index = np.frombuffer(mapped[-16 * self.capacity - 4 : -4], "<u8").reshape(-1, 2)
            self.files.append(np.frombuffer(mapped, np.uint8))
            self.offsets += index[:, 0].tolist()
            self.lengths += index[:, 1].tolist()

    def read(self, frames: np.ndarray, out: np.ndarray) -> None:
        for frame, row in zip(frames.tolist(), out, strict=True):
            begin = self.offsets[frame]
            packed = self.files[frame // self.capacity][begin : begin + self.lengths[frame] - 4]
            blosc.decompress(packed, row)

    def read_checked(self, frames: np.ndarray, out: np.ndarray) -> None:
        for frame, row in zip(frames.tolist(), out, strict=True):
            begin, file = self.offsets[frame], self.files[frame // self.capacity]
            end = begin + self.lengths[frame] - 4
            packed = file[begin:end]
            assert google_crc32c.value(packed) == int.from_bytes(
                file[end : end + 4].tobytes(), "little"
            )
            blosc.decompress(packed, row)


def rate(read: Read, batches: list[np.ndarray], threads: int) -> float:
    """Frames per second of so many threads that share the batches."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, batches[:threads]))
        begin = time.perf_counter()
        list(pool.map(read, batches))
        return sum(map(len, batches)) / (time.perf_counter() - begin)


def best_rates(
    readers: dict[str, tuple[Read, int]], batches: list[np.ndarray], threads: int, rounds: int
) -> dict[str, float]:
    """Best rate of each reader, which reads at most so many batches a round."""
    found = dict.fromkeys(readers, 0.0)
    for _ in range(rounds):
        for name, (read, most) in readers.items():
            found[name] = max(found[name], rate(read, batches[:most], threads))
    return found


def measured(
    reads: str,
    readers: dict[str, tuple[Read, int]],
    batches: list[np.ndarray],
    quick: bool,
    limit: str = "tensorstore",
) -> list[dict[str, Any]]:
    """Rows of all readers, with one thread and with two."""
    rows = []
    for threads in (1, 2):
        found = best_rates(readers, batches, threads, 1 if quick else ROUNDS)
        rows += [
            {
                "reads": reads,
                "reader": reader,
                "threads": threads,
                "frames/s": figure,
                f"of {limit}": figure / found[limit],
                "of tensorstore": figure / found["tensorstore"],
            }
            for reader, figure in found.items()
        ]
    return rows


def into_own(read: Callable[[np.ndarray, np.ndarray], None], shape: tuple[int, ...]) -> Read:
    """As a loader reads: into a buffer that each thread has already."""
    of_thread = threading.local()

    def call(frames: np.ndarray) -> None:
        if not hasattr(of_thread, "out"):
            of_thread.out = np.empty((BATCH, *shape), "uint16")
        read(frames, of_thread.out[: len(frames)])

    return call


def pixel_store(folder: Path, quick: bool) -> tuple[Store, StoreLayout]:
    side, bands, capacity, num_shards = (32, 2, 64, 2) if quick else (128, 12, 512, 4)
    sets = (BandSet("", tuple(f"b{i}" for i in range(bands)), "uint16", side),)
    grid = BaseGrid(side // 4, side // 4, 4, 4)
    layout = StoreLayout("image", sets, grid, num_shards, capacity, "lz4")
    rng = np.random.default_rng(0)
    frames = [smooth(rng, bands, side) for _ in range(8 if quick else 64)]

    def fill(encoded: dict[str, Any], shard: int) -> None:
        for slot in range(capacity):
            encoded[PIXELS].put(slot, frames[(slot + 7 * shard) % len(frames)][None])

    return make_store(folder, layout, fill), layout


def pixel_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    store, layout = pixel_store(folder / "pixels", quick)
    bare, array = Bare(store, layout, PIXELS), opened(store, layout, PIXELS)
    metadata = array_metadata(layout.arrays()[PIXELS], layout.codec)
    (folder / "pixels" / PIXELS / "zarr.json").write_text(json.dumps(metadata))
    python = zarr.open_array(store=folder / "pixels" / PIXELS, mode="r")
    shape = layout.arrays()[PIXELS].shape[1:]
    readers: dict[str, tuple[Read, int]] = {
        "read_into": (into_own(lambda f, out: store.read_into(PIXELS, f, out), shape), ALL),
        "bare loop": (into_own(bare.read, shape), ALL),
        "with checksums": (into_own(bare.read_checked, shape), ALL),
        "tensorstore": (lambda f: array[f].read().result(), ALL),
        "zarr-python": (lambda f: python.oindex[f], 2),
    }
    rng, slots, count = np.random.default_rng(1), layout.num_frames, 4 if quick else 24
    orders = {
        "random": [rng.choice(slots, BATCH, replace=False) for _ in range(count)],
        "neighbours": [np.arange(b, b + BATCH) for b in rng.integers(0, slots - BATCH, count)],
    }
    return [
        row
        for order, batches in orders.items()
        for row in measured(f"pixels, {order}", readers, batches, quick, "bare loop")
    ]


def leaves(rng: np.random.Generator, scale: int) -> list[int]:
    """A node of a random quadtree."""
    if scale == 0 or rng.random() > SPLIT:
        return [scale]
    return [leaf for _ in range(4) for leaf in leaves(rng, scale - 1)]


def leaf_store(folder: Path, quick: bool) -> tuple[Store, StoreLayout]:
    num_shards, capacity = (4, 64) if quick else (1024, 512)
    sets = (BandSet("", ("b",), "uint16", 128),)
    layout = StoreLayout("image", sets, BaseGrid(32, 32, 4, 4), num_shards, capacity, "lz4")
    rng = np.random.default_rng(0)
    made = [np.array([x for _ in range(16) for x in leaves(rng, 3)], np.uint8) for _ in range(256)]

    def fill(encoded: dict[str, Any], shard: int) -> None:
        frames = [made[(slot + 7 * shard) % len(made)] for slot in range(capacity)]
        encoded[COUNTS].put_leading(np.array([len(frame) for frame in frames], "int32"))
        encoded[SCALES].put_leading(np.concatenate(frames))

    return make_store(folder, layout, fill), layout


def values_by_tensorstore(store: Store, layout: StoreLayout) -> Read:
    """Bytes of the leaves of some frames, positions known: one slice per run of neighbours."""
    array = opened(store, layout, SCALES)
    counts = store.per_frame("image", "partitions/default/counts").astype(np.int64)
    of_shards = counts.reshape(layout.num_shards, layout.shard_capacity)
    first = np.cumsum(of_shards, axis=1) - of_shards
    first = (first + np.arange(layout.num_shards)[:, None] * layout.rows_per_shard).ravel()

    def read(frames: np.ndarray) -> np.ndarray:
        begins, ends = first[frames], first[frames] + counts[frames]
        cuts = np.flatnonzero(begins[1:] != ends[:-1]) + 1
        runs = zip(begins[np.append(0, cuts)], ends[np.append(cuts, 0) - 1], strict=True)
        under_way = [array[int(begin) : int(end)].read() for begin, end in runs]
        return np.concatenate([read.result() for read in under_way])

    return read


def leaf_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    store, layout = leaf_store(folder / "leaves", quick)
    readers: dict[str, tuple[Read, int]] = {
        "read_scales": (lambda f: store.read_scales("image", f), ALL),
        "tensorstore": (values_by_tensorstore(store, layout), ALL),
    }
    rng, slots, count = np.random.default_rng(1), layout.num_frames, 4 if quick else 64
    window = 64 if quick else 2048
    orders = {
        f"windows of {window}": [
            np.arange(b, b + window) for b in rng.integers(0, slots - window, count)
        ],
        "256 random": [rng.integers(0, slots, 256) for _ in range(count)],
    }
    for batches in orders.values():
        scales, _ = store.read_scales("image", batches[0])
        np.testing.assert_array_equal(scales, readers["tensorstore"][0](batches[0]))
    return [
        row
        for order, batches in orders.items()
        for row in measured(f"leaves, {order}", readers, batches, quick)
    ]


def main() -> None:
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = pixel_rows(Path(folder), args.quick) + leaf_rows(Path(folder), args.quick)
    report(rows, args.json)


if __name__ == "__main__":
    main()
