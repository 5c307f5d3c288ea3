"""What the benchmark scripts share: arguments, timing, output."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import spyndex

from pipeline.jobs.observer import Observer
from pipeline.locations import as_root
from pipeline.readers.rasters import open_raster
from pipeline.scenes import Access


class Silent(Observer):
    """Nobody watches."""


def arguments(
    description: str,
    scenes: bool = False,
    pictures: bool = False,
    out: bool = False,
    further: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> argparse.Namespace:
    """`further` holds a script's own options, each with what `add_argument` takes."""
    parser = argparse.ArgumentParser(description=description)
    if scenes:
        parser.add_argument("--scenes", type=Path, nargs="+", metavar="TIF", help="GeoTIFF scenes")
    if pictures:
        parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw into this folder")
    if out:
        parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the files compared")
    for name, options in further.items():
        parser.add_argument(name, **options)
    parser.add_argument("--quick", action="store_true", help="tiny input: does the script work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


def chip() -> np.ndarray:
    """uint16 [band, y, x]: B02, B03, B04, B08 of a real Sentinel-2 scene, 300 x 300 px."""
    axes = ("band", "y", "x")
    return spyndex.datasets.open("sentinel").transpose(*axes).values.astype(np.uint16)


def landscape(side: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [y, x], mean 0, deviation 1: amplitudes fall with frequency, edges fit together."""
    spectrum = np.fft.rfft2(rng.standard_normal((side, side)))
    distance = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    distance[0, 0] = np.inf
    field = np.fft.irfft2(spectrum / distance**1.2, (side, side))
    return (field / field.std()).astype(np.float32)


def read(path: Path) -> np.ndarray:
    """A whole raster, [band, y, x]."""
    with open_raster(str(path), Access((as_root(str(path.parent)),))) as raster:
        return raster.read()


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Shortest of several runs, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def preprocess(archive: Path, store: Path, *settings: str) -> None:
    """The command, in a process of its own: its workers import nothing of the script."""
    given = [f"--set={setting}" for setting in settings]
    start = [sys.executable, "-c", "from workflows.cli import main; main()"]
    command = [*start, "preprocess", str(archive), str(store), *given]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(done.stderr)


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print rows as a Markdown table, and write them with a word on the machine."""
    show(rows)
    if file is not None:
        save(rows, file)


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |")


def save(rows: list[dict[str, Any]], file: Path, **machine: Any) -> None:
    """Write rows with a word on the machine."""
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), **machine}
    file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
