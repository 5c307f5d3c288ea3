"""What a job tells whoever watches it."""

from typing import Literal, Protocol

from pipeline.jobs.measures import Measures

# Workers that died; shards done again alone; scenes given up because they kill their reader.
Happening = Literal["worker lost", "shard retried", "scene given up", "waiting", "stopping"]


class Observer(Protocol):
    """Hears how the job goes, always in the thread that started it.

    What a subclass does not care about, it need not define.
    """

    def planned(self, num_tiles: int, done_tiles: int) -> None:
        """So many tiles in all; what an earlier run did is included in `done_tiles`."""

    def started(self, dashboard: str | None) -> None:
        """Workers can be used; `dashboard` is the address of Dask's page, if there is one."""

    def shard_done(self, tiles: int) -> None:
        """A shard of so many tiles is in the ledger."""

    def measured(self, measures: Measures) -> None:
        """What one shard took."""

    def quarantined(self, scenes: int) -> None:
        """So many scenes are quarantined by now."""

    def happened(self, what: Happening, text: str) -> None:
        """Something out of the ordinary, in words."""
