"""What it costs to plan a job and read some of its tiles: peak memory and seconds, each in a process of
its own that is forked from this one, so that libraries and earlier cases count for nothing.

Reads {name: [source, settings]} as JSON from standard input, prints {name: [MiB, seconds, verdict]}.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

from pipeline.errors import AptileError
from pipeline.jobs.reading import SceneSource, sample_tiles
from pipeline.planning.inputs import plan_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config


def handle(source: str, settings: list[str]) -> str:
    """Plan, and read two tiles of every scene, as a job does; how it ended, in words."""
    if source.endswith(".yaml"):
        load_config(PreprocessConfig, Path(source))
        return "read"
    config = load_config(PreprocessConfig, None, ["store.tile_size_px=64", *settings])
    job, tiles = plan_job(source, config), 0
    for modality in job.plan.modalities.values():
        access = SceneSource(modality.settings, modality.layout, modality.scored_bands, job.access)
        for scene in modality.scenes:
            tiles += sum(1 for _ in sample_tiles(scene, access, 2))
    return f"read {tiles} tiles" + "".join(f"; refused: {why}" for why in job.refused.values())


def memory(what: str) -> float:
    """MiB of this process now (VmRSS) or at its highest (VmHWM)."""
    found = re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def measured(source: str, settings: list[str]) -> tuple[float, float, str]:
    """Peak above the start in MiB, seconds and verdict, measured in a fork."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, start = memory("VmRSS"), time.perf_counter()
        try:
            verdict = handle(source, settings)
        except AptileError as error:
            verdict = f"refused: {error}"
        except BaseException as error:
            verdict = f"{type(error).__name__}: {error}"
        result = memory("VmHWM") - before, time.perf_counter() - start, verdict
        os.write(writing, json.dumps(result).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        content = answer.read()
    _, status = os.wait()
    return tuple(json.loads(content)) if content else (0.0, 0.0, f"died with status {status}")


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    print(json.dumps({name: measured(*case) for name, case in cases.items()}))
