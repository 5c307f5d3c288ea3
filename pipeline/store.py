"""Reading committed stores: the reading half of docs/format.md.

Nothing is read before it is asked for, and nothing is trusted that COMMIT.json does not vouch for.
"""

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import IntegrityError, StoreError
from pipeline.rules import DEFAULT_QUANTILE, WAYS
from pipeline.storage.arrays import Arrays
from pipeline.storage.commit import MEND, Commit, read_commit, read_named, require_commit
from pipeline.storage.header import check_version, layouts_of, read_header
from pipeline.storage.history import History
from pipeline.storage.layout import StoreLayout
from pipeline.storage.objects import Location, Objects, objects_at
from pipeline.storage.partitions import (
    DEFAULT_PARTITION,
    StoredPartition,
    is_partition_name,
)
from pipeline.storage.rows import PartitionRows
from pipeline.storage.tiles import Frames, FrameTable, Tile, expand
from pipeline.storage.vouched import Vouched


def open_store(location: Location, commit: int | None = None) -> "Store":
    """Open a committed store for reading: a path, or a URL (s3://, gs://, az://).

    What is read is one commit, the newest unless a number is given: what others add later is not seen.
    Raises StoreError if there is none at `location` or its job is unfinished, IntegrityError if its
    manifest or ledger is not the committed one.
    """
    objects = objects_at(location)
    header = read_header(objects)
    found = read_commit(objects) if commit is None else require_commit(objects, commit)
    if found is None:
        if header is None:
            raise StoreError(f"{location}: no aptile store here; make one with `aptile preprocess`")
        raise StoreError(
            f"{location}: the job that writes this store has not finished; run its `aptile preprocess` "
            "command again to complete it"
        )
    check_version(objects.location, found.header)
    return Store(objects, found.header, found)


class Store:
    """A committed store. Arrays are opened at first use; nothing is read before it is asked for."""

    def __init__(self, objects: Objects, header: dict[str, Any], commit: Commit | None) -> None:
        self.objects, self.location = objects, objects.location
        self.header = header
        self._commit = commit
        self._vouched = Vouched(objects, commit)
        self._frame_tables: dict[str, FrameTable] = {}
        self._rows: dict[tuple[str, str], PartitionRows] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens what it reads itself.
        return Store, (self.objects, self.header, self._commit)

    @property
    def commit(self) -> Commit:
        """The commit that is read; AssertionError in a store that is still being written."""
        assert self._commit is not None
        return self._commit

    @property
    def digest(self) -> str:
        """sha256 of the committed manifest: the identity of the data."""
        return str(self.commit.manifest["sha256"])

    @cached_property
    def layouts(self) -> dict[str, StoreLayout]:
        """The layout of every modality, the leading one first."""
        return layouts_of(self.header)

    @cached_property
    def _arrays(self) -> Arrays:
        return Arrays(self.objects, self.layouts, self._vouched)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities."""
        return list(self.layouts)

    def layout_of(self, modality: str | None = None) -> StoreLayout:
        """The layout of a modality, of the first unless one is named; StoreError if there is none."""
        name = modality if modality is not None else self.modalities[0]
        if name not in self.layouts:
            raise StoreError(
                f"{self.location}: no modality {name!r}; there are {', '.join(self.modalities)}"
            )
        return self.layouts[name]

    @cached_property
    def manifest(self) -> pa.Table:
        """One row per committed tile."""
        return pq.read_table(pa.BufferReader(read_named(self.objects, self.commit.manifest)))

    def tile_index(self, tile_id: str) -> int:
        """Row of a tile in the manifest; StoreError if there is no tile of that id."""
        ids = self.manifest["id"].to_pylist()
        if tile_id not in ids:
            raise StoreError(
                f"{self.location}: no tile {tile_id!r}; there are {len(ids)}, from {ids[0]!r} to "
                f"{ids[-1]!r}"
            )
        return ids.index(tile_id)

    def frame_table(self, modality: str) -> FrameTable:
        """Where the frames of every tile lie in a modality's arrays."""
        if modality not in self._frame_tables:
            column = self.manifest[modality].combine_chunks().field("frames")
            entries, lengths = column.flatten(), pc.list_value_length(column).to_numpy()
            there = entries.is_valid().to_numpy(zero_copy_only=False)
            timesteps = expand(np.zeros(len(lengths), np.int64), lengths)
            before = np.concatenate([[0], np.cumsum(there)])
            ends = np.concatenate([[0], np.cumsum(lengths)])
            self._frame_tables[modality] = FrameTable(
                before[ends], entries.drop_null().to_numpy().astype(np.int64), timesteps[there]
            )
        return self._frame_tables[modality]

    @property
    def tokenized(self) -> list[str]:
        """Names of the modalities that have tokens: all but label rasters."""
        return [name for name, layout in self.layouts.items() if layout.tokenized]

    def partitions(self, modality: str) -> list[str]:
        """Names of a modality's committed partitions; a label raster has none."""
        if not self.layouts[modality].tokenized:
            return []
        return [DEFAULT_PARTITION, *sorted(self._partition_entries(modality))]

    def partition(self, name: str, modality: str | None = None) -> StoredPartition:
        """A committed partition, of the first modality unless one is named.

        Raises StoreError if there is none of that name.
        """
        modality = self.layout_of(modality).modality
        self.check_partition(modality, name)
        if name == DEFAULT_PARTITION:
            rule = self._default_rule(modality)
            thresholds = rule.get("thresholds")
        else:
            entry = self._partition_entries(modality)[name]
            rule, thresholds = dict(entry["rule"]), entry["thresholds"]
            # A lost shard of counts would read as no tokens at all.
            every = np.arange(self.layouts[modality].num_shards)
            self._vouched.check_shards(every, modality, name)
        tokens = self.per_frame(modality, f"partitions/{name}/tokens")
        fixed = None if thresholds is None else tuple(float(t) for t in thresholds)
        return StoredPartition(modality, name, rule, fixed, tokens)

    def check_partition(self, modality: str, name: str) -> None:
        """Raise StoreError, which lists the names there are, unless the partition is committed."""
        if name not in self.partitions(modality):
            raise StoreError(
                f"{self.location}: no partition {name!r}; there are "
                f"{', '.join(self.partitions(modality))} for modality {modality}. `aptile repartition` "
                "makes others"
            )

    def _partition_entries(self, modality: str) -> dict[str, Any]:
        entries = dict(self.commit.partitions.get(modality, {}))
        for name in entries:
            # Names become paths.
            if not is_partition_name(name):
                raise IntegrityError(
                    f"{self.location}: COMMIT.json names a partition {name!r:.80}; {MEND}"
                )
        return entries

    def _default_rule(self, modality: str) -> dict[str, Any]:
        """What the configuration says of the rule, without what it leaves open."""
        layout, config = self.layouts[modality], self.header["config"]
        if not layout.scored:
            return {"uniform_px": layout.grid.base_patch_size}
        own = config["modalities"].get(modality) or config["modality"] or {}
        given = own.get("partition") or config["partition"]
        ways = {name: given.get(name) for name in WAYS}
        return {name: value for name, value in ways.items() if value is not None} or {
            "quantile": DEFAULT_QUANTILE
        }

    def tile(
        self, tile_id: str, modality: str | None = None, partition: str = DEFAULT_PARTITION
    ) -> Tile:
        """A tile with everything decoded, of the first modality unless one is named.

        Raises StoreError if there is no such tile or partition.
        """
        return self.tile_at(self.tile_index(tile_id), self.layout_of(modality).modality, partition)

    def tile_at(self, index: int, modality: str, partition: str = DEFAULT_PARTITION) -> Tile:
        """The tile in a row of the manifest, with everything decoded."""
        slots, timesteps = self.frame_table(modality).of(np.array([index]))
        layout = self.layouts[modality]
        if layout.tokenized:
            read = self.read_frames(modality, slots, partition)
        else:
            read = Frames(*self._band_set(modality, "", slots), [])
        return Tile(
            id=self.manifest["id"][index].as_py(),
            pixels=read.pixels,
            valid=read.valid,
            score_maps=self.read_score_maps(modality, slots) if layout.scored else [],
            scales=read.scales,
            grid=layout.grid,
            timesteps=timesteps,
            datetimes=self.manifest["datetimes"][index].as_py(),
            further={
                band_set.name: self._band_set(modality, band_set.suffix, slots)
                for band_set in layout.band_sets[1:]
            },
        )

    def read_score_maps(self, modality: str, frames: np.ndarray) -> list[np.ndarray]:
        """float32 [frame, cell_y, cell_x] of `frames` (int64 [n], any order), fine to coarse."""
        sizes = self.layouts[modality].grid.patch_sizes
        return [self._read(f"{modality}/score_{size}", frames) for size in sizes]

    def read_frames(
        self, modality: str, frames: np.ndarray, partition: str = DEFAULT_PARTITION
    ) -> Frames:
        """Pixels, validity and scales of `frames` (int64 [n], any order).

        Raises StoreError if there is no such partition.
        """
        scales, counts = self.read_scales(modality, frames, partition)
        pixels, valid = self._band_set(modality, "", frames)
        return Frames(
            pixels, valid, np.split(scales, np.cumsum(counts)[:-1]) if len(counts) else []
        )

    def read_into(self, name: str, frames: np.ndarray, out: np.ndarray) -> None:
        """Read frames of an array that has one chunk per frame, in place.

        `name` is the array's path, such as `s2_l2a/pixels`, `s2_l2a/valid_20m` or `s2_l2a/score_8`;
        `frames` int64 [n] are slots in any order; `out` [n, ...] has the array's type and lies in one
        piece. Several threads may read at once: decoding does not hold the interpreter's lock.

        Raises IntegrityError, which names the object, where one is lost, altered or another one,
        StoreError where it cannot be read, ValueError if `out` does not fit, IndexError for no slot.
        """
        self._arrays.frames_into(name, frames, out)

    def read_scales(
        self, modality: str, frames: np.ndarray, partition: str = DEFAULT_PARTITION
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leaves of `frames` (int64 [n], any order): uint8 [rows] frame after frame, counts int64 [n].

        Raises StoreError if there is no such partition, IntegrityError where leaves do not tile a frame.
        """
        return self._rows_of(modality, partition).read(frames)

    def will_read(self, name: str, frames: np.ndarray) -> None:
        """A hint that `frames` of an array (a partition's `.../scales` too) are read soon.

        Returns at once but for opening shards that are not open yet, and tells nothing of damage.
        """
        modality, _, inside = name.partition("/")
        if inside.startswith("partitions/"):
            self._rows_of(modality, inside.split("/")[1]).ask(frames)
        else:
            self._arrays.ask(name, frames)

    def per_frame(self, modality: str, name: str) -> np.ndarray:
        """The whole of a small array that has a few numbers per frame slot, such as `num_valid`.

        Raises IntegrityError if an object of it is lost or has another size.
        """
        array = f"{modality}/{name}"
        self._vouched.check_array(array, self._arrays.spec(array))
        return self._arrays.whole(array)

    @property
    def history(self) -> History:
        """What became of every input and shard."""
        return self._vouched.history

    def quarantined(self) -> dict[str, str]:
        """Reason by scene id of every input that is not in the store."""
        return self.history.quarantined()

    def check_shards(self, shards: np.ndarray) -> None:
        """Raise IntegrityError if an object of these shards is lost or has another size.

        Reads look at what they use; this looks at all of a shard, before a job begins.
        """
        self._vouched.check_shards(shards)

    def _band_set(
        self, modality: str, suffix: str, frames: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and validity of some frames."""
        return (
            self._read(f"{modality}/pixels{suffix}", frames),
            self._read(f"{modality}/valid{suffix}", frames),
        )

    def _read(self, name: str, frames: np.ndarray) -> np.ndarray:
        spec = self._arrays.spec(name)
        out = np.empty((len(frames), *spec.shape[1:]), spec.dtype)
        self._arrays.frames_into(name, frames, out)
        return out

    def _rows_of(self, modality: str, partition: str) -> PartitionRows:
        key = (modality, partition)
        if key not in self._rows:
            self.check_partition(modality, partition)
            layout = self.layouts[modality]
            self._rows[key] = PartitionRows(self._arrays, self.location, layout, partition)
        return self._rows[key]
