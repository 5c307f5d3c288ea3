"""Streaming a store into training, against other loaders of the same tiles.

Tiles of 12 x 128 x 128 px, uint16, 1/f pixels with noise, packed 64 to a batch with their scales; a real
store, written by a job. Peers are a reader by hand (mmap and numcodecs, every core decoding whole batches:
the practical limit), zarr-python, a memmap of uncompressed pixels, and litdata, mosaicml-streaming and
webdataset, compressed by their own options and as blosc bytes that their collate function decodes. The
loaders' copies hold a quarter of the tiles, so that all fit into the page cache, and leave out validity.

Readers take turns, SECONDS each after half as long, and some batches, that do not count; all files are
read before each round. A rate is the median of the rounds, a ratio the median of the rounds' ratios. In
every round each kind of reader lives in a process of its own, one after another. `first batch` is the time
from the files to a batch, imports not included; `CPU us/tile` is that of the reader's process, worker
processes not included.

The loaders come with `pip install '.[bench]'`; those that are not there are rows that say so.
"""

import importlib
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.windows import Window

sys.path.insert(0, str(Path(__file__).parent))
import peers
from common import arguments, landscape, preprocess, report
from pipeline.store import open_store

BANDS, TILE_PX, BATCH_TILES = 12, 128, 64
SETTINGS = ("modality.value_range=[0, 10000]", "scoring.bands=[band_2, band_3, band_4]")
WARM_UP, SECONDS = 8, 1.0
LOADERS = {"litdata": "litdata", "mosaicml-streaming": "streaming", "webdataset": "webdataset"}
LIMIT = "by hand"
COMPRESSED = {
    "of the best loader, its own zstd": ("zstd",),
    "of the best loader, compressed": ("zstd", "blosc"),
}
TARGETS = {
    "random order: aptile, lz4": ">= 9000 tiles/s, 0.8 of by hand, 2 times the best loader",
}


def pattern(side: int, bands: int) -> np.ndarray:
    """uint16 [band, y, x]: landscapes that share most of what they show, with noise.

    In digital numbers, such that lz4 packs tiles to about 1/1.7 of their size, as it does real ones.
    """
    rng = np.random.default_rng(0)
    shared, out = 100 * landscape(side, rng), np.empty((bands, side, side), np.uint16)
    for number, band in enumerate(out):
        own = 25 * landscape(side, rng) + rng.normal(0, 3, (side, side))
        band[:] = np.clip(1000 + 150 * number + shared + own, 1, 10_000)
    return out


def write_scene(path: Path, piece: np.ndarray, size: int) -> None:
    """A scene of `size` px, in which the piece is shifted from one place to the next."""
    path.parent.mkdir()
    bands, side = piece.shape[:2]
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=size, width=size, dtype="uint16", tiled=True,
        blockxsize=256, blockysize=256, interleave="pixel", bigtiff="if_safer", crs="EPSG:32632",
        transform=Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        corners = [(top, left) for top in range(0, size, side) for left in range(0, size, side)]
        for number, (top, left) in enumerate(corners):
            shifted = np.roll(piece, (37 * number, 101 * number), (1, 2))
            raster.write(shifted, window=Window(left, top, side, side))


def write_stores(folder: Path, quick: bool) -> None:
    """The stores of both codecs, and the plain copy."""
    side, size = (512, 1024) if quick else (2048, 8192)
    write_scene(folder / "archive" / "scene.tif", pattern(side, BANDS), size)
    shared = [f"store.tile_size_px={TILE_PX}", *(["store.shard_tiles=16"] if quick else [])]
    for codec in ("lz4",) if quick else ("lz4", "zstd"):
        preprocess(folder / "archive", folder / codec, f"store.codec={codec}", *SETTINGS, *shared)
    peers.write_raw(open_store(folder / "lz4"), folder / "raw")
    shutil.rmtree(folder / "archive")


def by_aptile(location: str, tiles: int, shuffle: bool, **options: Any) -> peers.Batches:
    """aptile's own threads."""
    from model import BatchStream, TileDataset

    dataset = TileDataset(location, **options)
    stream = BatchStream(dataset, batch_tiles=tiles, shuffle=shuffle)
    for _ in count():
        for batch in stream:
            yield batch.modalities[0].band_sets[0].pixels, batch.scales, batch.cu_seqlens


def by_workers(location: str, tiles: int, shuffle: bool, workers: int) -> peers.Batches:
    """aptile in worker processes of a DataLoader, or none."""
    from torch.utils.data import DataLoader

    from model import TileDataset, TokenBatches

    batches = TokenBatches(TileDataset(location), batch_tiles=tiles, shuffle=shuffle)
    how = {"multiprocessing_context": "forkserver"} if workers else {}
    loader = DataLoader(batches, batch_size=None, **peers.workers_of(workers), **how)
    for _ in count():
        for batch in loader:
            yield batch.modalities[0].band_sets[0].pixels, batch.scales, batch.cu_seqlens


def copies_of(kind: str, folder: Path, num_tiles: int) -> dict[str, peers.Copy]:
    """The files of a loader by what they are called in the table."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "raw": ("raw", {}),
        "blosc lz4 by sample": ("blosc", {}),
    }
    if kind == "litdata":
        ways["zstd"] = "raw", {"compression": "zstd"}
        ways["zstd by sample"] = "raw", {"compression": "zstd", "compression_level": "sample"}
    elif kind == "mosaicml-streaming":
        ways["zstd, first epoch"] = "raw", {"compression": f"zstd:{peers.ZSTD_LEVEL}"}
    else:
        ways["zstd by sample"] = "zstd", {}
    raw = peers.Raw(folder / "raw")
    return {
        name: peers.Copy(
            raw=raw,
            folder=folder / f"{kind} {name}",
            num_tiles=num_tiles,
            encoding=peers.Encoding(encoding),
            options=tuple(options.items()),
        )
        for name, (encoding, options) in ways.items()
    }


def loader_readers(kind: str, folder: Path, num_tiles: int, quick: bool) -> dict[str, peers.Reader]:
    """Every copy and number of workers, shuffled; copies that are not there are written first."""
    write, read = {
        "litdata": (peers.write_litdata, peers.by_litdata),
        "mosaicml-streaming": (peers.write_mds, peers.by_mds),
        "webdataset": (peers.write_webdataset, peers.by_webdataset),
    }[kind]
    readers: dict[str, peers.Reader] = {}
    for name, copy in copies_of(kind, folder, num_tiles).items():
        if not copy.folder.exists():
            write(copy)
        once = "first epoch" in name
        by = peers.by_first_mds if once else read
        # Worker processes would outlive the epoch whose files they unpack.
        for workers in (0,) if quick or once else (0, 2):
            readers[f"random order: {kind}, {name}, {workers} workers"] = partial(
                by, copy, BATCH_TILES, True, workers
            )
    return readers


def own_readers(folder: Path, num_tiles: int, quick: bool) -> dict[str, peers.Reader]:
    raw, lz4 = peers.Raw(folder / "raw"), str(folder / "lz4")
    readers: dict[str, peers.Reader] = {}
    for order, shuffle in (("random", True), ("sequential", False)):
        given = BATCH_TILES, shuffle
        readers |= {
            f"{order} order: {LIMIT}": partial(peers.by_hand, lz4, raw, *given, all_of_it=False),
            f"{order} order: {LIMIT}, with validity and checksums": partial(
                peers.by_hand, lz4, raw, *given, all_of_it=True
            ),
            f"{order} order: zarr-python": partial(peers.by_zarr, lz4, raw, *given),
            f"{order} order: memmap, uncompressed": partial(peers.by_memmap, raw, *given),
        }
    return readers


def aptile_readers(folder: Path, num_tiles: int, quick: bool) -> dict[str, peers.Reader]:
    lz4, zstd = (partial(by_aptile, str(folder / codec), BATCH_TILES) for codec in ("lz4", "zstd"))
    in_workers = partial(by_workers, str(folder / "lz4"), BATCH_TILES, True)
    readers: dict[str, peers.Reader] = {
        "random order: aptile, lz4": partial(lz4, True),
        "sequential order: aptile, lz4": partial(lz4, False),
        "random order: aptile, lz4, float32": partial(lz4, True, dtype="float32"),
        "random order: aptile, lz4, float16 normalised": partial(
            lz4, True, normalize="value_range", dtype="float16"
        ),
    }
    if not quick:
        readers |= {"random order: aptile, zstd": partial(zstd, True)}
        readers |= {
            f"random order: aptile, lz4, DataLoader, {workers} workers": partial(
                in_workers, workers
            )
            for workers in (0, 1, 2)
        }
    return readers


def serve(connection: Connection, kind: str, folder: Path, num_tiles: int, quick: bool) -> None:
    """Measure what is asked for, in a process of its own; what goes wrong is an answer too."""
    warnings.simplefilter("ignore")
    # litdata leaves files in the temporary folder.
    os.environ |= {"LITDATA_DISABLE_VERSION_CHECK": "1", "TMPDIR": str(folder)}
    tempfile.tempdir = None
    try:
        if kind in LOADERS:
            importlib.import_module(LOADERS[kind])
        make = {"by hand": own_readers, "aptile": aptile_readers}.get(kind)
        readers = (make or partial(loader_readers, kind))(folder, num_tiles, quick)
        connection.send(list(readers))
        for name, seconds in iter(connection.recv, None):
            connection.send(measured(readers[name], seconds))
    except Exception:
        connection.send(traceback.format_exc())
        raise


def measured(reader: peers.Reader, seconds: float) -> dict[str, Any]:
    """A turn of a reader; of one that fails only why."""
    try:
        batches, first = started(reader)
        return {**turn(batches, seconds), "first batch ms": 1e3 * first}
    except (RuntimeError, OSError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def started(reader: peers.Reader) -> tuple[peers.Batches, float]:
    """Batches, and the seconds to the first of them: at the second start, all is loaded then."""
    next(reader())
    begin = time.perf_counter()
    batches = reader()
    next(batches)
    return batches, time.perf_counter() - begin


def turn(batches: peers.Batches, seconds: float) -> dict[str, float]:
    """Tiles per second, once all threads run and their memory is there."""
    begin = time.perf_counter()
    for number, _ in enumerate(batches, start=1):
        took = time.perf_counter() - begin
        if took > 3 * seconds or (number >= WARM_UP and took > seconds / 2):
            break
    begin, spent, tiles = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        tiles += len(next(batches)[2]) - 1
    took, spent = time.perf_counter() - begin, time.process_time() - spent
    return {"tiles/s": tiles / took, "CPU us/tile": 1e6 * spent / tiles}


class Process:
    """A kind of reader in a process of its own, ended with the block."""

    def __init__(self, kind: str, folder: Path, num_tiles: int, quick: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, kind, folder, num_tiles, quick))
        self._process.start()
        other.close()

    def __enter__(self) -> "Process":
        self.names: list[str] = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._end.send(None)
        self._end.close()
        self._process.join(10)
        self._process.kill()

    def measure(self, name: str, seconds: float) -> dict[str, Any]:
        self._end.send((name, seconds))
        return self._answer()

    def _answer(self) -> Any:
        answer = self._end.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def pixel_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """All readers of pixels, in rounds."""
    rounds, seconds, num_tiles = (1, 0.05, 64) if quick else (3, SECONDS, 1024)
    there = [kind for kind, module in LOADERS.items() if importlib.util.find_spec(module)]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(rounds):
        warm(folder)
        for kind in (LIMIT, "aptile", *there):
            # One at a time: together, their worker processes would take tens of GB.
            with Process(kind, folder, num_tiles, quick) as process:
                for name in process.names:
                    found[name].append(process.measure(name, seconds))
    failed = {name: turn["failed"] for name in found for turn in found[name] if "failed" in turn}
    for name in failed:
        del found[name]
    rows = [row_of(name, found, there) for name in sorted(found)]
    rows += [{"what": name, "note": f"failed: {why:.80}"} for name, why in failed.items()]
    absent = [{"what": kind, "note": "not installed"} for kind in LOADERS if kind not in there]
    return [*rows, *absent]


def warm(folder: Path) -> None:
    """Bring all files into the page cache, whatever else ran meanwhile."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**22):
                    pass


def median_ratio(own: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    pairs = zip(own, other, strict=True)
    return statistics.median(a["tiles/s"] / b["tiles/s"] for a, b in pairs)


def row_of(
    name: str, found: Mapping[str, list[dict[str, float]]], loaders: list[str]
) -> dict[str, Any]:
    order, _, what = name.partition(": ")
    figures = {key: statistics.median(turn[key] for turn in found[name]) for key in found[name][0]}
    ratio = {"of by hand": median_ratio(found[name], found[f"{order}: {LIMIT}"])}
    if what.startswith("aptile") and loaders:
        for column, marks in COMPRESSED.items():
            rivals = [n for n in found if n.startswith(order) and is_loader(n, loaders, marks)]
            if not rivals:
                continue
            best = max(rivals, key=lambda n: statistics.median(t["tiles/s"] for t in found[n]))
            ratio[column] = median_ratio(found[name], found[best])
    return {"what": name, **figures, **ratio, "note": TARGETS.get(name, "")}


def is_loader(name: str, loaders: list[str], marks: tuple[str, ...]) -> bool:
    who, _, how = name.partition(": ")[2].partition(", ")
    return who in loaders and how.startswith(marks)


def facts(folder: Path) -> list[dict[str, Any]]:
    """What the stores are like."""
    rows = []
    for name in ("lz4", "zstd"):
        if not (folder / name).exists():
            continue
        store = open_store(folder / name)
        (modality,) = store.modalities
        layout, slots = store.layouts[modality], store.frame_table(modality).slots
        stored = sum(f.stat().st_size for f in (folder / name / modality / "pixels").rglob("*"))
        tokens = store.partition("default").tokens[slots].sum()
        rows.append(
            {
                "what": f"store: {name}",
                "tiles": len(slots),
                "tokens per tile": float(tokens / len(slots)),
                "pixels, compression ratio": len(slots) * layout.frame_bytes / stored,
            }
        )
    return rows


def main() -> None:
    args = arguments(__doc__)
    warnings.filterwarnings("ignore", category=UserWarning)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        write_stores(folder, args.quick)
        rows = facts(folder)
        rows += pixel_rows(folder, args.quick)
    report(rows, args.json)


if __name__ == "__main__":
    main()
