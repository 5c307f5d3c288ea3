"""What it costs to plan a job and read some of its tiles, and what it touches: each in a process of its
own that is forked from this one, so that libraries and earlier cases count for nothing.

Reads {name: [source, settings]} as JSON from standard input, prints {name: [MiB, seconds, verdict,
touched]}: peak memory above the start, how it ended, and what Python was asked to open, connect to, run or
unpickle. A pixel of the number CANARY is touched, too.
"""

import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import AptileError
from pipeline.jobs.reading import SceneSource, sample_tiles
from pipeline.planning.inputs import plan_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config

CANARY = 54321
_RUNS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
    "ctypes.dlopen",
)


def handle(source: str, settings: list[str], touched: list[str]) -> str:
    """Plan, and read two tiles of every scene, as a job does; how it ended, in words."""
    if source.endswith(".yaml"):
        load_config(PreprocessConfig, Path(source))
        return "read"
    files = [
        Path(text.removeprefix("--config=")) for text in settings if text.startswith("--config=")
    ]
    overrides = [text for text in settings if not text.startswith("--config=")]
    config = load_config(
        PreprocessConfig, files[0] if files else None, ["store.tile_size_px=64", *overrides]
    )
    job, tiles = plan_job(source, config), 0
    for modality in job.plan.modalities.values():
        access = SceneSource(modality.settings, modality.layout, modality.scored_bands, job.access)
        for scene in modality.scenes:
            for tile in sample_tiles(scene, access, 2):
                tiles += 1
                touched += ["pixels"] * any((part.pixels == CANARY).any() for part in tile.sets)
    return f"read {tiles} tiles" + "".join(f"; refused: {why}" for why in job.refused.values())


def memory(what: str) -> float:
    """MiB of this process now (VmRSS) or at its highest (VmHWM)."""
    found = re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def watch(touched: list[str]) -> None:
    """Note from now on what this process opens, connects to and runs."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" or event in _RUNS:
            touched.append(f"{event} {given[0]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            touched.append(f"{event} {given[1] if event == 'socket.connect' else given[0]}")

    sys.addaudithook(hook)


def measured(source: str, settings: list[str]) -> tuple[float, float, str, list[str]]:
    """Peak above the start in MiB, seconds, verdict and what was touched, measured in a fork."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, start = memory("VmRSS"), time.perf_counter()
        touched: list[str] = []
        watch(touched)
        try:
            verdict = handle(source, settings, touched)
        except AptileError as error:
            verdict = f"refused: {error}"
        except BaseException as error:
            verdict = f"{type(error).__name__}: {error}"
        result = memory("VmHWM") - before, time.perf_counter() - start, verdict[:1000], touched
        with os.fdopen(writing, "w") as answer:
            json.dump(result, answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        content = answer.read()
    _, status = os.wait()
    return tuple(json.loads(content)) if content else (0.0, 0.0, f"died with status {status}", [])


if __name__ == "__main__":
    platform.processor()  # libraries ask for it, and Python calls uname once
    cases = json.load(sys.stdin)
    print(json.dumps({name: measured(*case) for name, case in cases.items()}))
