"""Other readers of a store's tiles: by hand, zarr-python, a memmap, and three streaming loaders.

Each is written as its users would write it for speed, and gives packed batches: pixels [B, band, y, x], the
scales of all tiles one after another, and where each tile's begin. The loaders' copies hold the same pixels
and scales. A reader is a function that gives batches without end, in a new order every epoch.
"""

import mmap
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from numcodecs import blosc
from numcodecs.zstd import Zstd
from torch.utils.data import DataLoader, default_collate

from pipeline.storage.layout import ArraySpec
from pipeline.store import Store, open_store

THREADS = len(os.sched_getaffinity(0))
# Batches that are under way at once, as the stream of aptile has it.
AHEAD = 3
# Of the loaders' files; what they all recommend.
FILE_BYTES = 64 * 2**20
ZSTD_LEVEL = 1
blosc.use_threads = False

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Batches = Iterator[Batch]
Reader = Callable[[], Batches]


@dataclass(frozen=True)
class Raw:
    """All tiles in plain files: what memmaps read and the loaders' copies are made of."""

    folder: Path

    def __reduce__(self) -> tuple[Any, ...]:
        # Not what is mapped: another process maps it itself.
        return Raw, (self.folder,)

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint16 [tile, band, y, x]."""
        return np.load(self.folder / "pixels.npy", mmap_mode="r")

    @cached_property
    def scales(self) -> np.ndarray:
        """uint8 [row]: leaves, tile after tile."""
        return np.load(self.folder / "scales.npy")

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [tile + 1]: where the leaves of each tile begin."""
        return np.load(self.folder / "starts.npy")

    def scales_of(self, tiles: np.ndarray) -> list[np.ndarray]:
        return [self.scales[self.starts[i] : self.starts[i + 1]] for i in tiles.tolist()]


def write_raw(store: Store, folder: Path) -> Raw:
    """The tiles of a store of one frame per tile, in the order of the manifest."""
    folder.mkdir()
    modality = store.modalities[0]
    slots = store.frame_table(modality).slots
    layout = store.layouts[modality]
    one = layout.arrays()[f"{modality}/pixels"]
    shape = (len(slots), *one.shape[1:])
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", one.dtype, shape)
    scales = []
    for begin in range(0, len(slots), 64):
        read = store.read_frames(modality, slots[begin : begin + 64])
        pixels[begin : begin + 64] = read.pixels
        scales += list(read.scales)
    pixels.flush()
    np.save(folder / "scales.npy", np.concatenate(scales))
    np.save(folder / "starts.npy", np.cumsum([0, *map(len, scales)]))
    return Raw(folder)


def packed(pixels: torch.Tensor, scales: list[np.ndarray]) -> Batch:
    starts = torch.tensor([0, *map(len, scales)]).cumsum(0).to(torch.int32)
    return pixels, torch.from_numpy(np.concatenate(scales)), starts


def batches_of(num_tiles: int, tiles: int, shuffle: bool) -> Iterator[np.ndarray]:
    """Tiles of one batch after another, without end."""
    for epoch in count():
        order = np.arange(num_tiles)
        if shuffle:
            np.random.default_rng(epoch).shuffle(order)
        yield from np.split(order, range(tiles, num_tiles, tiles))


class Shards:
    """One array of a folder's store whose chunks hold one frame each, read by hand."""

    def __init__(self, store: Store, name: str, check: bool) -> None:
        modality = name.split("/")[0]
        self.spec: ArraySpec = store.layouts[modality].arrays()[name]
        self.check = check
        self.capacity = self.spec.shard[0]
        self._files = []
        for shard in range(self.spec.shape[0] // self.capacity):
            with Path(f"{store.location}/{name}/{self.spec.shard_key(shard)}").open("rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = np.frombuffer(whole, np.uint8)
            index = mapped[-16 * self.capacity - 4 : -4].view("<u8").reshape(-1, 2)
            self._files.append((mapped, index.tolist()))

    def read_into(self, slots: np.ndarray, out: np.ndarray) -> None:
        for slot, frame in zip(slots.tolist(), out, strict=True):
            mapped, index = self._files[slot // self.capacity]
            begin, length = index[slot % self.capacity]
            packed_bytes = mapped[begin : begin + length - 4]
            if self.check:
                said = mapped[begin + length - 4 : begin + length].tobytes()
                assert google_crc32c.value(packed_bytes) == int.from_bytes(said, "little")
            blosc.decompress(packed_bytes, frame)


def by_hand(location: str, raw: Raw, tiles: int, shuffle: bool, all_of_it: bool) -> Batches:
    """mmap and numcodecs: every thread decodes whole batches straight into a ring of buffers.

    `all_of_it` reads validity and checks the checksums too.
    """
    store = open_store(location)
    modality = store.modalities[0]
    slots = store.frame_table(modality).slots
    pixels = Shards(store, f"{modality}/pixels", all_of_it)
    valid = Shards(store, f"{modality}/valid", all_of_it) if all_of_it else None
    ring = deque(
        (
            np.empty((tiles, *pixels.spec.shape[1:]), pixels.spec.dtype),
            np.empty((tiles, *pixels.spec.shape[2:]), bool),
        )
        for _ in range(AHEAD + 2)
    )

    def read(chosen: np.ndarray, into: tuple[np.ndarray, np.ndarray]) -> Batch:
        out = into[0][: len(chosen)]
        pixels.read_into(slots[chosen], out)
        if valid is not None:
            valid.read_into(slots[chosen], into[1][: len(chosen)])
        return packed(torch.from_numpy(out), raw.scales_of(chosen))

    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for chosen in batches_of(len(slots), tiles, shuffle):
            pending.append(pool.submit(read, chosen, ring[0]))
            ring.rotate(-1)
            if len(pending) > AHEAD:
                yield pending.popleft().result()


def by_zarr(location: str, raw: Raw, tiles: int, shuffle: bool) -> Batches:
    """zarr-python: one selection per batch."""
    store = open_store(location)
    modality = store.modalities[0]
    slots = store.frame_table(modality).slots
    array = zarr.open_array(f"{store.location}/{modality}/pixels", mode="r")
    for chosen in batches_of(len(slots), tiles, shuffle):
        own = slots[chosen]
        run = len(own) == own[-1] - own[0] + 1 and (np.diff(own) == 1).all()
        pixels = array[own[0] : own[-1] + 1] if run else array.oindex[own]
        yield packed(torch.from_numpy(pixels), raw.scales_of(chosen))


def by_memmap(raw: Raw, tiles: int, shuffle: bool) -> Batches:
    """Uncompressed pixels, copied out of a memmap."""
    buffer = np.empty((tiles, *raw.pixels.shape[1:]), raw.pixels.dtype)
    for chosen in batches_of(len(raw.pixels), tiles, shuffle):
        out = np.take(raw.pixels, chosen, axis=0, out=buffer[: len(chosen)], mode="clip")
        yield packed(torch.from_numpy(out), raw.scales_of(chosen))


@dataclass(frozen=True)
class Encoding:
    """How a loader's sample holds its pixels: as they are, or as bytes that the batch is decoded from.

    They are called int16: few of torch's operations take uint16.
    """

    name: str

    def of(self, raw: Raw, tile: int) -> dict[str, Any]:
        pixels, scales = np.asarray(raw.pixels[tile]), raw.scales_of(np.array([tile]))[0]
        if self.name == "blosc":
            content: Any = blosc.compress(pixels, b"lz4", 5, blosc.SHUFFLE)
        elif self.name == "zstd":
            content = bytes(Zstd(ZSTD_LEVEL).encode(pixels))
        else:
            content = pixels.view(np.int16)
        return {"pixels": content, "scales": scales.tobytes()}

    def collate(self, samples: list[dict[str, Any]], shape: tuple[int, ...]) -> Batch:
        scales = [np.frombuffer(sample["scales"], np.uint8) for sample in samples]
        content = [sample["pixels"] for sample in samples]
        if self.name == "raw":
            return packed(default_collate([torch.as_tensor(c) for c in content]), scales)
        out = np.empty((len(content), *shape), np.int16)
        for packed_bytes, tile in zip(content, out, strict=True):
            if self.name == "blosc":
                blosc.decompress(packed_bytes, tile)
            else:
                Zstd().decode(packed_bytes, tile)
        return packed(torch.from_numpy(out), scales)


@dataclass(frozen=True)
class Copy:
    """The first `num_tiles` tiles in a loader's own files."""

    raw: Raw
    folder: Path
    num_tiles: int
    encoding: Encoding
    options: tuple[tuple[str, Any], ...] = ()

    def sample(self, tile: int) -> dict[str, Any]:
        return self.encoding.of(self.raw, tile)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], Batch]:
        return partial(self.encoding.collate, shape=self.raw.pixels.shape[1:])


def epochs(make: Callable[[int], Any]) -> Batches:
    """A loader's epochs one after another."""
    for epoch in count():
        yield from make(epoch)


def workers_of(number: int) -> dict[str, Any]:
    """What a DataLoader is told of its workers, which stay from one epoch to the next."""
    return {"num_workers": number, "persistent_workers": number > 0}


def write_litdata(copy: Copy) -> None:
    import litdata

    litdata.optimize(
        fn=copy.sample,
        inputs=list(range(copy.num_tiles)),
        output_dir=str(copy.folder),
        chunk_bytes=FILE_BYTES,
        num_workers=1,
        verbose=False,
        **dict(copy.options),
    )


def by_litdata(copy: Copy, tiles: int, shuffle: bool, workers: int) -> Batches:
    import litdata

    dataset = litdata.StreamingDataset(str(copy.folder), shuffle=shuffle)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=tiles, collate_fn=copy.collate, **workers_of(workers)
    )
    return epochs(lambda _: loader)


def write_mds(copy: Copy) -> None:
    from streaming import MDSWriter

    raw_pixels = copy.encoding.name == "raw"
    shape = ",".join(map(str, copy.raw.pixels.shape[1:]))
    columns = {"pixels": f"ndarray:int16:{shape}" if raw_pixels else "bytes", "scales": "bytes"}
    with MDSWriter(
        columns=columns, out=str(copy.folder), size_limit=FILE_BYTES, **dict(copy.options)
    ) as writer:
        for tile in range(copy.num_tiles):
            writer.write(copy.sample(tile))


def by_mds(copy: Copy, tiles: int, shuffle: bool, workers: int) -> Batches:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(copy.folder), shuffle=shuffle, batch_size=tiles)
    loader = DataLoader(dataset, tiles, collate_fn=copy.collate, **workers_of(workers))
    return epochs(lambda _: loader)


def by_first_mds(copy: Copy, tiles: int, shuffle: bool, workers: int) -> Batches:
    """Shards that are compressed as a whole are unpacked into files at first use: here in every epoch."""
    from streaming import StreamingDataset

    for _ in count():
        with tempfile.TemporaryDirectory(dir=copy.folder.parent) as fresh:
            shutil.copytree(copy.folder, fresh, copy_function=os.link, dirs_exist_ok=True)
            dataset = StreamingDataset(local=fresh, shuffle=shuffle, batch_size=tiles)
            yield from DataLoader(dataset, tiles, collate_fn=copy.collate, num_workers=workers)


def write_webdataset(copy: Copy) -> None:
    import webdataset

    copy.folder.mkdir()
    pattern = str(copy.folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=FILE_BYTES, verbose=0) as writer:
        for tile in range(copy.num_tiles):
            sample = copy.sample(tile)
            if copy.encoding.name == "raw":
                sample["pixels"] = sample["pixels"].tobytes()
            writer.write({"__key__": f"{tile:06d}", **sample})


def _from_bytes(sample: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    pixels = np.frombuffer(bytearray(sample["pixels"]), np.int16).reshape(shape)
    return {"pixels": pixels, "scales": sample["scales"]}


def by_webdataset(copy: Copy, tiles: int, shuffle: bool, workers: int) -> Batches:
    import webdataset

    files = sorted(map(str, copy.folder.glob("*.tar")))
    # Each worker has files of its own.
    workers = min(workers, len(files))
    dataset = webdataset.WebDataset(files, shardshuffle=len(files) if shuffle else False, seed=0)
    if shuffle:
        dataset = dataset.shuffle(1000)
    if copy.encoding.name == "raw":
        dataset = dataset.map(partial(_from_bytes, shape=copy.raw.pixels.shape[1:]))
    dataset = dataset.batched(tiles, collation_fn=copy.collate)
    loader = webdataset.WebLoader(dataset, batch_size=None, **workers_of(workers))
    return epochs(lambda _: loader)
