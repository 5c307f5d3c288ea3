"""What a store holds already, as far as the plan of further scenes depends on it. Pure."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.scenes import Grid
from pipeline.storage.header import layouts_of
from pipeline.storage.history import History
from pipeline.storage.layout import StoreLayout

Meaning = tuple[float | None, float | None]


@dataclass(frozen=True)
class KnownPlace:
    """A place of the store: its leading grid, and whose the leading scene of each date is."""

    name: str
    grid: Grid
    scenes: dict[str | None, str]


@dataclass(frozen=True)
class Existing:
    """The state a batch comes on top of.

    `inputs` are the ids of scenes that are not taken again. `meanings` hold scale and offset by modality,
    `first_shard` is the batch's.
    """

    layouts: dict[str, StoreLayout] = field(default_factory=dict)
    meanings: dict[str, Meaning] = field(default_factory=dict)
    first_shard: int = 0
    inputs: frozenset[str] = frozenset()
    places: dict[str, KnownPlace] = field(default_factory=dict)


def existing_of(header: dict[str, Any], history: History, again: frozenset[str]) -> Existing:
    """What a store's header and batches come to; scenes in `again` are to be taken once more."""
    planned, lost = history.planned(), history.quarantined()
    places: dict[str, KnownPlace] = {}
    for row in (row for ledger in history.ledgers for row in ledger.places):
        scenes = {planned[scene]["datetime"]: scene for scene in row["scenes"] if scene not in lost}
        known = places.get(row["place"])
        if known is not None:
            scenes = {**known.scenes, **scenes}
        transform = None if row["transform"] is None else tuple(row["transform"])
        grid = Grid(row["height"], row["width"], row["crs"], transform)
        places[row["place"]] = KnownPlace(row["place"], grid, scenes)
    return Existing(
        layouts=layouts_of(header),
        meanings={
            name: (facts["scale"], facts["offset"]) for name, facts in header["modalities"].items()
        },
        first_shard=history.num_shards,
        inputs=frozenset(history.inputs() - again),
        places=places,
    )
