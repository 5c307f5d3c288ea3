"""How a job goes, for the person who waits for it: a live bar on a terminal, few lines elsewhere."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text

from pipeline.jobs.measures import Measures
from pipeline.jobs.observer import Happening, Observer
from workflows.terminal import bar_columns, note

# Without a terminal, and for shorter runs, progress and throughput are noise in a log.
_LINE_EVERY_S = 60.0
_LINES = 10
# Below so many tiles per second a digit behind the point says something.
_FAST = 10
_TOLD: dict[Happening, str] = {
    "shard retried": "yellow",
    "scene given up": "yellow",
    "waiting": "yellow",
    "stopping": "bold",
}
# What a log shows too; the quarantined are listed at the end.
_TOLD_IN_LOGS = ("shard retried", "waiting")


@dataclass
class Effort:
    """What a run did and took: tiles and seconds of this run alone, of `total_tiles` in all."""

    what: str
    total_tiles: int = 0
    tiles_before: int = 0
    tiles: int = 0
    seconds: float = 0.0
    measures: Measures = field(default_factory=Measures)
    workers_lost: int = 0
    shards_retried: int = 0
    scenes_quarantined: int = 0

    @property
    def complete(self) -> bool:
        return self.tiles_before + self.tiles >= self.total_tiles

    @property
    def tiles_per_s(self) -> float:
        return self._per_s(self.tiles)

    @property
    def remaining_s(self) -> float | None:
        """Seconds to go at the speed so far; None while that is unknown."""
        left = self.total_tiles - self.tiles_before - self.tiles
        return left / self.tiles_per_s if self.tiles_per_s else None

    def speed(self) -> str:
        """Throughput in words; MB are 10^6 bytes of decoded pixels and of stored objects."""
        parts = [f"{self.tiles_per_s:,.{0 if self.tiles_per_s >= _FAST else 1}f} tiles/s"]
        if self.measures.pixel_bytes:
            parts.append(f"{self._per_s(self.measures.pixel_bytes) / 1e6:,.0f} MB/s in")
            parts.append(f"{self._per_s(self.measures.object_bytes) / 1e6:,.0f} MB/s out")
        return ", ".join(parts)

    def troubles(self) -> str:
        """What went wrong so far, in words; empty if nothing did."""
        counts = (
            (self.workers_lost, "worker", "lost"),
            (self.shards_retried, "shard", "retried"),
            (self.scenes_quarantined, "scene", "quarantined"),
        )
        return ", ".join(
            f"{count:,} {noun}{'s' if count > 1 else ''} {fate}"
            for count, noun, fate in counts
            if count
        )

    def so_far(self) -> str:
        """One line: how far, how long, how fast."""
        done = self.tiles_before + self.tiles
        share = done / self.total_tiles if self.total_tiles else 1.0
        of = f"{done:,} of {self.total_tiles:,} tiles ({share:.0%})"
        line = f"{self.what}: {of} in {_clock(self.seconds)}"
        if self.tiles_before:
            line += f", {self.tiles_before:,} of them by earlier runs"
        return f"{line}; {self.speed()}"

    def as_json(self) -> dict[str, Any]:
        phases = asdict(self.measures)
        pixel_bytes, object_bytes = phases.pop("pixel_bytes"), phases.pop("object_bytes")
        return {
            "seconds": self.seconds,
            "tiles": self.tiles,
            "tiles_per_s": self.tiles_per_s,
            "mb_in_per_s": self._per_s(pixel_bytes) / 1e6,
            "mb_out_per_s": self._per_s(object_bytes) / 1e6,
            "worker_seconds": phases,
            "workers_lost": self.workers_lost,
            "shards_retried": self.shards_retried,
        }

    def _per_s(self, number: float) -> float:
        return number / self.seconds if self.seconds else 0.0


class JobProgress(Observer):
    """Shows a job on stderr while it is entered, and adds up what it took in `effort`."""

    def __init__(
        self,
        what: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.effort = Effort(what)
        self._clock, self._last_line, self._tenths = clock, 0.0, 0
        self._started: float | None = None
        self._dashboard: str | None = None
        self._bar = _Bar(console or Console(stderr=True, highlight=False), self._below, clock)
        self._task = self._bar.add_task(what, total=None, extra="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._started is not None and (self._live or self.effort.seconds >= _LINE_EVERY_S):
            self._tell(self.effort.so_far())

    def __rich__(self) -> RenderableType:
        """What a terminal shows at this moment."""
        return self._bar.get_renderable()

    @property
    def _live(self) -> bool:
        return not self._bar.disable

    def planned(self, num_tiles: int, done_tiles: int) -> None:
        self.effort.total_tiles, self.effort.tiles_before = num_tiles, done_tiles
        self._bar.update(self._task, total=num_tiles, completed=done_tiles)
        self._started = self._last_line = self._clock()

    def started(self, dashboard: str | None) -> None:
        self._started = self._last_line = self._clock()
        self._dashboard = dashboard
        if self._live and dashboard is not None:
            self._tell(f"dashboard: {dashboard}")

    def shard_done(self, tiles: int) -> None:
        self.effort.tiles += tiles
        self._count_time()
        self._bar.advance(self._task, tiles)
        if not self._live:
            self._line()

    def measured(self, measures: Measures) -> None:
        self.effort.measures.add(measures)

    def quarantined(self, scenes: int) -> None:
        self.effort.scenes_quarantined = scenes

    def happened(self, what: Happening, text: str) -> None:
        self.effort.workers_lost += what == "worker lost"
        self.effort.shards_retried += what == "shard retried"
        if what in (_TOLD if self._live else _TOLD_IN_LOGS):
            self._tell(text, _TOLD[what])

    def _count_time(self) -> None:
        if self._started is not None:
            self.effort.seconds = self._clock() - self._started

    def _line(self) -> None:
        """A line at every tenth of the work, but no two within a minute."""
        done = self.effort.tiles_before + self.effort.tiles
        tenths = _LINES * done // max(1, self.effort.total_tiles)
        now = self._clock()
        if tenths > self._tenths and now - self._last_line >= _LINE_EVERY_S:
            first, self._tenths, self._last_line = self._tenths == 0, tenths, now
            line = f"{self.effort.so_far()}, {_clock(self.effort.remaining_s or 0)} to go"
            self._tell(
                f"{line}; dashboard: {self._dashboard}" if first and self._dashboard else line
            )

    def _tell(self, text: str, style: str = "") -> None:
        if self._live:
            self._bar.console.print(Text(text, style=style))
        else:
            note(text)

    def _below(self) -> Iterable[RenderableType]:
        """What stands below the bar."""
        if self._started is None:
            return
        if not self.effort.complete:
            self._count_time()
        yield Text(f"  {self.effort.speed()}", style="dim")
        if self.effort.troubles():
            yield Text(f"  {self.effort.troubles()}", style="yellow")


class _Bar(Progress):
    """A progress bar with lines below it; nothing where there is no terminal."""

    def __init__(
        self,
        console: Console,
        below: Callable[[], Iterable[RenderableType]],
        clock: Callable[[], float],
    ) -> None:
        self._lines_below = below
        super().__init__(
            *bar_columns("tiles"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            get_time=clock,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from self._lines_below()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
