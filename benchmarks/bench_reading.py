"""How fast a store is read, next to other readers of the same shards in the same run.

Pixels: 12 x 128 x 128 uint16 frames in lz4, the page cache warm, batches of 64 frames, in random order over
all shards and in runs of neighbours, with one thread and with two. `bare loop` is what a hand-written loop
over a mapped file and numcodecs does that checks nothing and knows all positions: the practical limit.
`with checksums` is that loop with the chunks' crc32c. tensorstore brings its own threads, as many as cores.

Leaves: partitions of about 120 leaves per frame, in windows of neighbouring frames and 256 random frames a
call. `read_scales` counts and checks the leaves of every frame; tensorstore reads their bytes alone.

Every figure is the best of several rounds; in a round the readers take turns.
"""

import mmap
import sys
import tempfile
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
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{store.location}/{name}/"},
            "metadata": array_metadata(layout.arrays()[name], layout.codec),
            "recheck_cached_data": False,
        },
        open=True, read=True, assume_metadata=True, context=ts.Context({"cache_pool": {"total_bytes_limit": 2**25}}),
    ).result()  # fmt: skip


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


def pixel_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    side, bands, capacity, num_shards = (32, 2, 16, 2) if quick else (128, 12, 512, 4)
    sets = (BandSet("", tuple(f"b{i}" for i in range(bands)), "uint16", side),)
    layout = StoreLayout(
        "image", sets, BaseGrid(side // 4, side // 4, 4, 4), num_shards, capacity, "lz4"
    )
    rng, name = np.random.default_rng(0), "image/pixels"
    frames = [smooth(rng, bands, side) for _ in range(8 if quick else 64)]

    def fill(encoded: dict[str, Any], shard: int) -> None:
        for slot in range(capacity):
            encoded[name].put(slot, frames[(slot + 7 * shard) % len(frames)][None])

    store = make_store(folder / "pixels", layout, fill)
    bare, array = Bare(store, layout, name), opened(store, layout, name)
    python = zarr.open_array(store=_with_metadata(store, layout, name), mode="r")
    outs: dict[int, np.ndarray] = {}

    def into(read: Callable[[np.ndarray, np.ndarray], None]) -> Read:
        """As a loader reads: into a buffer that each thread has already."""
        import threading

        def call(wanted: np.ndarray) -> None:
            out = outs.setdefault(
                threading.get_ident(), np.empty((BATCH, bands, side, side), "uint16")
            )
            read(wanted, out[: len(wanted)])

        return call

    readers: dict[str, tuple[Read, int]] = {
        "read_into": (into(lambda f, out: store.read_into(name, f, out)), 10**6),
        "bare loop": (into(bare.read), 10**6),
        "with checksums": (into(bare.read_checked), 10**6),
        "tensorstore": (lambda f: array[f].read().result(), 10**6),
        "zarr-python": (lambda f: python.oindex[f], 4),
    }
    slots, count = layout.num_frames, 4 if quick else 24
    orders = {
        "random": [rng.choice(slots, min(BATCH, slots), replace=False) for _ in range(count)],
        "neighbours": [
            np.arange(BATCH) % slots + begin
            for begin in rng.integers(0, max(1, slots - BATCH), count).tolist()
        ],
    }
    rows = []
    for order, batches in orders.items():
        for threads in (1, 2):
            found = best_rates(
                readers,
                [np.minimum(b, slots - 1) for b in batches],
                threads,
                1 if quick else 4,
            )
            rows += [
                {
                    "reads": f"pixels, {order}", "reader": reader, "threads": threads, "frames/s": figure,
                    "of the bare loop": figure / found["bare loop"], "of tensorstore": figure / found["tensorstore"],
                }
                for reader, figure in found.items()
            ]  # fmt: skip
    return rows


def _with_metadata(store: Store, layout: StoreLayout, name: str) -> Path:
    import json

    folder = store.objects.folder / name
    metadata = array_metadata(layout.arrays()[name], layout.codec)
    (folder / "zarr.json").write_text(json.dumps(metadata))
    return folder


def leaves(rng: np.random.Generator, scale: int) -> list[int]:
    """A node of a random quadtree."""
    if scale == 0 or rng.random() > SPLIT:
        return [scale]
    return [leaf for _ in range(4) for leaf in leaves(rng, scale - 1)]


def leaf_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    num_shards, capacity = (4, 64) if quick else (1024, 512)
    sets = (BandSet("", ("b",), "uint16", 128),)
    layout = StoreLayout("image", sets, BaseGrid(32, 32, 4, 4), num_shards, capacity, "lz4")
    rng, name = np.random.default_rng(0), "image/partitions/default/scales"
    made = [
        np.array([leaf for _ in range(16) for leaf in leaves(rng, 3)], np.uint8) for _ in range(256)
    ]

    def fill(encoded: dict[str, Any], shard: int) -> None:
        of = [made[(slot + 7 * shard) % len(made)] for slot in range(capacity)]
        encoded["image/partitions/default/counts"].put_leading(
            np.array([len(f) for f in of], "int32")
        )
        encoded[name].put_leading(np.concatenate(of))

    store = make_store(folder / "leaves", layout, fill)
    array = opened(store, layout, name)
    counts = store.per_frame("image", "partitions/default/counts").astype(np.int64)
    of_shards = counts.reshape(num_shards, capacity)
    first = np.cumsum(of_shards, axis=1) - of_shards
    first = (first + np.arange(num_shards)[:, None] * layout.rows_per_shard).ravel()

    def by_tensorstore(frames: np.ndarray) -> np.ndarray:
        ends = first[frames] + counts[frames]
        cuts = np.flatnonzero(first[frames][1:] != ends[:-1]) + 1
        runs = zip(first[frames][np.append(0, cuts)].tolist(), ends[np.append(cuts, len(ends)) - 1].tolist(), strict=True)  # fmt: skip
        under_way = [array[a:b].read() for a, b in runs]
        return np.concatenate([read.result() for read in under_way])

    readers: dict[str, tuple[Read, int]] = {
        "read_scales": (lambda f: store.read_scales("image", f), 10**6),
        "tensorstore": (by_tensorstore, 10**6),
    }
    slots, window, count = layout.num_frames, 64 if quick else 2048, 4 if quick else 64
    orders = {
        f"windows of {window}": [
            np.arange(begin, begin + window) for begin in rng.integers(0, slots - window, count)
        ],
        "256 random": [rng.integers(0, slots, 256) for _ in range(count)],
    }
    np.testing.assert_array_equal(
        store.read_scales("image", orders["256 random"][0])[0],
        by_tensorstore(orders["256 random"][0]),
    )
    rows = []
    for order, batches in orders.items():
        for threads in (1, 2):
            found = best_rates(readers, batches, threads, 1 if quick else 4)
            rows += [
                {
                    "reads": f"leaves, {order}", "reader": reader, "threads": threads, "frames/s": figure,
                    "of tensorstore": figure / found["tensorstore"],
                }
                for reader, figure in found.items()
            ]  # fmt: skip
    return rows


def main() -> None:
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = pixel_rows(Path(folder), args.quick) + leaf_rows(Path(folder), args.quick)
    report(rows, args.json)


if __name__ == "__main__":
    main()
