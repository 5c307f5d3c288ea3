"""Draws what a terminal shows during a job, after Ctrl-C and after a quarantine, by a clock set by hand.

`python docs/pictures/terminal.py` writes terminal_*.svg beside itself.
"""

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipeline.jobs.measures import Measures
from workflows.progress import JobProgress

HERE = Path(__file__).parent
COMMAND = "$ aptile preprocess archive store --preset s2_l2a --max-quarantine 1%"
TILES, SHARD = 20_480, 512
MEASURES = Measures(pixel_bytes=SHARD * 12 * 128 * 128 * 2, object_bytes=116_000_000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A terminal that is recorded; what a job prints on it stays, the bar is drawn at the end."""

    def __init__(self) -> None:
        self.console = Console(
            file=io.StringIO(), record=True, width=100, force_terminal=True, highlight=False
        )
        self.console.print(Text(COMMAND, style="bold"))
        self.clock = Clock()
        self.progress = JobProgress("preprocess", self.console, self.clock)
        self.progress.planned(TILES, 0)
        self.progress.started("http://127.0.0.1:8787/status")

    def work(self, shards: int) -> None:
        for _ in range(shards):
            self.clock.now += 2.6
            self.progress.measured(MEASURES)
            self.progress.shard_done(SHARD)

    def save(self, name: str) -> None:
        self.console.save_svg(str(HERE / f"terminal_{name}.svg"), title="aptile", unique_id=name)


def during() -> None:
    screen = Screen()
    screen.work(10)
    screen.progress.happened("worker lost", "worker tcp://127.0.0.1:40123 is gone")
    screen.work(14)
    screen.console.print(screen.progress)
    screen.save("run")


def after_ctrl_c() -> None:
    screen = Screen()
    screen.work(15)
    screen.console.print("^C", end="")
    screen.progress.happened("stopping", "stopping the workers; Ctrl-C again ends at once")
    screen.progress.__exit__(None, None, None)
    screen.console.print(
        "aptile: interrupted; nothing is lost, run the same command again to go on"
    )
    screen.save("interrupted")


def after_quarantine() -> None:
    screen = Screen()
    reason = "reading it alone killed its process by signal 11 (SIGSEGV), 2 times; it is left out"
    screen.work(12)
    screen.progress.happened("shard retried", "shard 12: its workers died; it is done again alone")
    screen.work(28)
    screen.progress.happened(
        "scene given up", f"shard 12, scene T32TNS_20240611: archive/T32TNS_20240611.tif: {reason}"
    )
    screen.progress.__exit__(None, None, None)
    screen.console.print(f"quarantined T32TNS_20240611: archive/T32TNS_20240611.tif: {reason}")
    screen.console.print(
        "store: 160 inputs = 159 done + 1 quarantined + 0 skipped; 20352 tiles in 40 shards"
    )
    screen.console.print("$ echo $?\n3")
    screen.save("quarantined")


if __name__ == "__main__":
    for draw in (during, after_ctrl_c, after_quarantine):
        draw()
