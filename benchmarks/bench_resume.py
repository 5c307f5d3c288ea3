"""Going on where a run was stopped, and what a training loop notices of the loader.

- Ids of the tiles of every step: of a run that was stopped at random steps, each time with other threads
  and ranks, and of one that was not, compared byte for byte; `--out` keeps both files.
- The first batch after a resume with a plan of ten million tiles: their counts are made up, reading is
  real.
- How long a loop waits that takes batches at 80 % of the rate at which they can be read.
- Memory over five epochs; starts and stops of a stream, in the middle of reading.
"""

import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rasterio
from affine import Affine

from common import arguments, report
from model.data import BatchStream, TileDataset

BANDS, TILE_PX, BATCH_TILES, FIRST_TILES = 12, 128, 128, 32
CONSUMED = 0.8
STEPS = 400
TARGETS = {"resume": "<= 50 ms", "waiting": "<= 1 %", "memory": "flat", "hangs": "0 of 200"}


def write_store(folder: Path, size: int) -> Path:
    """A store of smooth noise, `size` px a side."""
    rng = np.random.default_rng(0)
    (folder / "archive").mkdir()
    profile = {"count": BANDS, "height": size, "width": size, "dtype": "uint16"}
    place = {"crs": "EPSG:32632", "transform": Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(
        folder / "archive" / "scene.tif", "w", driver="GTiff", **profile, **place
    ) as raster:
        for band in range(1, BANDS + 1):
            steps = rng.normal(0, 30, (2, size)).cumsum(1)
            pixels = 3000 + steps[0][:, None] + steps[1] + rng.normal(0, 20, (size, size))
            raster.write(np.clip(pixels, 1, 10_000).astype(np.uint16), band)
    given = [f"store.tile_size_px={TILE_PX}", "scoring.bands=[band_2, band_3, band_4]"]
    settings = [f"--set={setting}" for setting in ("modality.value_range=[0, 10000]", *given)]
    start = [sys.executable, "-c", "from workflows.cli import main; main()"]
    command = [*start, "preprocess", str(folder / "archive"), str(folder / "store"), *settings]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (this Python)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return folder / "store"


class Repeated:
    """A dataset whose tiles come again and again, until there are `number`."""

    def __init__(self, dataset: TileDataset, number: int) -> None:
        self.dataset, self.store = dataset, dataset.store
        self.fingerprint = f"{dataset.fingerprint} {number}"
        self.token_counts = np.resize(dataset.token_counts, number)
        self.store_order = np.arange(number)

    def batch(self, indices: np.ndarray, **how: Any) -> Any:
        return self.dataset.batch(indices % len(self.dataset), **how)

    def will_read(self, indices: np.ndarray) -> None:
        self.dataset.will_read(np.unique(indices % len(self.dataset)))


def ids_of(dataset: TileDataset, stops: list[int], chance: np.random.Generator) -> str:
    """A line of tile ids per step of a run that stops at these steps and goes on with other threads."""
    lines, state = [], None
    for begin, end in zip([0, *stops], [*stops, STEPS], strict=True):
        ranks, threads = int(chance.integers(1, 3)), int(chance.integers(1, 4))
        tiles: list[list[int]] = [[] for _ in range(end - begin)]
        for rank in range(ranks):
            stream = BatchStream(
                dataset, batch_tiles=4, seed=1, rank=rank, world_size=ranks, threads=threads
            )
            if state is not None:
                stream.load_state_dict(json.loads(state))
            steps = (batch for _ in iter(int, 1) for batch in stream)
            for step, batch in enumerate(islice(steps, end - begin)):
                tiles[step] += batch.tile_indices.tolist()
            after = json.dumps(stream.state_dict())
            stream.close()
        state = after
        lines += [" ".join(sorted(dataset.tile_ids[step])) for step in tiles]
    return "\n".join(lines) + "\n"


def resume_proof(dataset: TileDataset, stops: int, out: Path | None) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    whole = ids_of(dataset, [], np.random.default_rng(1))
    where = sorted(chance.choice(np.arange(1, STEPS), stops, replace=False).tolist())
    stopped = ids_of(dataset, where, chance)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "ids_of_a_run_that_was_not_stopped.txt").write_text(whole)
        (out / f"ids_of_a_run_stopped_{stops}_times.txt").write_text(stopped)
    what = f"{stops} stops in {STEPS} steps: files of ids"
    return {"what": what, "found": "equal" if whole == stopped else "DIFFERENT"}


def first_batches(dataset: TileDataset, number: int) -> list[dict[str, Any]]:
    """Seconds to the first batch after a state is loaded, with and without planning in them."""
    many = Repeated(dataset, number)
    begin = time.perf_counter()
    stream = BatchStream(many, batch_tiles=FIRST_TILES)
    next(iter(stream))
    anew = time.perf_counter() - begin
    stream.close()
    seconds = []
    for step in np.linspace(1, len(stream) - 2, 9).astype(int).tolist():
        state = {**stream.state_dict(), "step": step}
        begin = time.perf_counter()
        stream.load_state_dict(state)
        batches = iter(stream)
        next(batches)
        seconds.append(time.perf_counter() - begin)
        stream.close()
    what = f"first batch of {FIRST_TILES}, plan of {number:,} tiles"
    return [
        {"what": f"{what}: after a resume", "ms": 1000 * max(seconds), "wanted": TARGETS["resume"]},
        {"what": f"{what}: the epoch's plan made first", "ms": 1000 * anew},
    ]


def waiting(dataset: TileDataset, steps: int, repeats: int) -> dict[str, Any]:
    """The share of its time that a loop waits which works as long as 80 % of the rate asks for."""
    many = Repeated(dataset, (steps + 50) * BATCH_TILES)
    stream = BatchStream(many, batch_tiles=BATCH_TILES)
    batches = iter(stream)
    for _ in islice(batches, 20):
        pass
    begin = time.perf_counter()
    for _ in islice(batches, steps // 4):
        pass
    read = (time.perf_counter() - begin) / (steps // 4)
    stream.close()
    shares = [
        _waited(BatchStream(many, batch_tiles=BATCH_TILES), steps, read / CONSUMED)
        for _ in range(repeats)
    ]
    return {
        "what": f"waiting of a loop at {CONSUMED:.0%} of {BATCH_TILES / read:.0f} tiles/s",
        "%": 100 * float(np.median(shares)),
        "wanted": TARGETS["waiting"],
    }


def _waited(stream: BatchStream, steps: int, period: float) -> float:
    """The loop's own work is a device's: the processor is free meanwhile."""
    batches = iter(stream)
    for _ in islice(batches, 8):
        time.sleep(period)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(period)
    stream.close()
    return waited / (time.perf_counter() - begin)


def memory(dataset: TileDataset, epoch_tiles: int) -> dict[str, Any]:
    process = psutil.Process()
    stream = BatchStream(Repeated(dataset, epoch_tiles), batch_tiles=BATCH_TILES)
    used = []
    for _ in range(5):
        for _batch in stream:
            pass
        gc.collect()
        used.append(process.memory_info().rss)
    stream.close()
    growth = 100 * (used[-1] / used[0] - 1)
    what = f"memory after epoch 5 of {epoch_tiles} tiles, over epoch 1"
    return {"what": what, "%": growth, "MiB": used[-1] / 2**20, "wanted": TARGETS["memory"]}


def starts_and_stops(dataset: TileDataset, number: int) -> dict[str, Any]:
    """Every stream is left after some batches: by break, by close, or forgotten."""
    begin = time.perf_counter()
    for count in range(number):
        stream = BatchStream(dataset, batch_tiles=2, threads=1 + count % 3)
        batches = iter(stream)
        for _ in islice(batches, count % 5):
            pass
        if count % 2:
            stream.close()
    took = time.perf_counter() - begin
    del stream, batches
    left = [thread for thread in threading.enumerate() if thread.name.startswith("aptile")]
    what = f"{number} starts and stops, {len(left)} threads left: each"
    return {"what": what, "ms": 1000 * took / number, "wanted": TARGETS["hangs"]}


def main() -> None:
    args = arguments(__doc__, out=True)
    size, many, steps = (512, 10_000, 40) if args.quick else (4096, 10_000_000, 400)
    with tempfile.TemporaryDirectory() as folder:
        dataset = TileDataset(write_store(Path(folder), size))
        rows = [
            resume_proof(dataset, 5 if args.quick else 50, args.out),
            *first_batches(dataset, many),
            waiting(dataset, steps, 1 if args.quick else 3),
            memory(dataset, 256 if args.quick else 8192),
            starts_and_stops(dataset, 10 if args.quick else 200),
        ]
    report(rows, args.json)
    if any(row.get("found") == "DIFFERENT" for row in rows):
        raise SystemExit("a run that was stopped saw other tiles")


if __name__ == "__main__":
    main()
