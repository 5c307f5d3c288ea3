"""Reading committed stores: the reading half of docs/format.md.

Nothing is read before it is asked for, and nothing is trusted that COMMIT.json does not vouch for.
"""

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import segments
from pipeline.errors import IntegrityError, StoreError
from pipeline.rules import DEFAULT_QUANTILE, WAYS
from pipeline.storage.arrays import Arrays, values
from pipeline.storage.commit import MEND, Commit, read_commit, read_named, require_commit
from pipeline.storage.header import check_version, layouts_of, read_header
from pipeline.storage.history import History, read_history
from pipeline.storage.layout import StoreLayout
from pipeline.storage.objects import Location, Objects, objects_at
from pipeline.storage.partitions import (
    DEFAULT_PARTITION,
    StoredPartition,
    is_partition_name,
    partition_path,
    partition_shards,
)
from pipeline.storage.tiles import Frames, FrameTable, Tile, expand


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
        self._checked_shards: set[tuple[str, str, int]] = set()
        self._checked_arrays: set[str] = set()
        self._frame_tables: dict[str, FrameTable] = {}
        self._row_tables: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._partition_shards: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}

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
        return Arrays(self.objects, self.layouts)

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
            self._check_partition_shards(modality, name, every)
        tokens = self.per_frame(modality, f"partitions/{name}/tokens")
        fixed = None if thresholds is None else tuple(float(t) for t in thresholds)
        return StoredPartition(modality, name, rule, fixed, tokens)

    def check_partition(self, modality: str, name: str) -> None:
        """Raise StoreError, which lists the names there are, unless the partition is committed."""
        if name not in self.partitions(modality):
            raise StoreError(
                f"{self.location}: no partition {name!r}; there are "
                f"{', '.join(self.partitions(modality))}. `aptile repartition` makes others"
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
            self.check_shards(slots // layout.shard_capacity)
            read = Frames(
                self._read(f"{modality}/pixels", slots), self._read(f"{modality}/valid", slots), []
            )
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
                band_set.name: (
                    self._read(f"{modality}/pixels{band_set.suffix}", slots),
                    self._read(f"{modality}/valid{band_set.suffix}", slots),
                )
                for band_set in layout.band_sets[1:]
            },
        )

    def read_score_maps(self, modality: str, frames: np.ndarray) -> list[np.ndarray]:
        """float32 [frame, cell_y, cell_x] of `frames` (int64 [n], any order), fine to coarse."""
        sizes = self.layouts[modality].grid.patch_sizes
        pending = [self._arrays.pending(f"{modality}/score_{size}", frames) for size in sizes]
        return [values(maps) for maps in pending]

    def read_frames(
        self, modality: str, frames: np.ndarray, partition: str = DEFAULT_PARTITION
    ) -> Frames:
        """Pixels, validity and scales of `frames` (int64 [n], any order), read concurrently.

        Raises StoreError if there is no such partition.
        """
        layout = self.layouts[modality]
        self.check_partition(modality, partition)
        self.check_shards(frames // layout.shard_capacity)
        if partition != DEFAULT_PARTITION:
            self._check_partition_shards(modality, partition, frames // layout.shard_capacity)
        pixels = self._arrays.pending(f"{modality}/pixels", frames)
        valid = self._arrays.pending(f"{modality}/valid", frames)
        scales_name = f"{partition_path(modality, partition)}/scales"
        counts, row_starts = self._rows_of(modality, partition)
        begins = row_starts[frames]
        ends = begins + counts[frames]
        rows = [
            self._arrays.pending(scales_name, slice(b, e))
            for b, e in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        scales = [values(row) for row in rows]
        for frame, leaf_scales in zip(frames.tolist(), scales, strict=True):
            segments.check(leaf_scales, layout.grid, f"{self.location}/{modality} frame {frame}")
        return Frames(values(pixels), values(valid), scales)

    def per_frame(self, modality: str, name: str) -> np.ndarray:
        """The whole of a small array that has a few numbers per frame slot, such as `num_valid`.

        Raises IntegrityError if an object of it is lost or has another size.
        """
        self._check_whole(modality, name)
        return self._whole(f"{modality}/{name}")

    @cached_property
    def history(self) -> History:
        """What became of every input and shard."""
        return read_history(self.objects, self.commit)

    def quarantined(self) -> dict[str, str]:
        """Reason by scene id of every input that is not in the store."""
        return self.history.quarantined()

    def check_shards(self, shards: np.ndarray) -> None:
        """Raise IntegrityError if an object of these shards is lost or has another size.

        A lost object would read as fill value; so every shard is looked at once before use.
        """
        self._check_objects("", "", shards, self.history.shards)

    def _check_partition_shards(self, modality: str, name: str, shards: np.ndarray) -> None:
        key = (modality, name)
        if key not in self._partition_shards:
            self._partition_shards[key] = partition_shards(self.objects, *key, self.commit)
        missing = set(shards.tolist()) - self._partition_shards[key].keys()
        if missing:
            raise StoreError(
                f"{self.location}: partition {name!r} of {modality} was made before {len(missing)} shards "
                "were appended; run its `aptile repartition` command again to complete it"
            )
        self._check_objects(*key, shards, self._partition_shards[key])

    def _check_whole(self, modality: str, name: str) -> None:
        """Of the default partition, and of arrays beside partitions, the objects of one array."""
        layout, array = self.layouts[modality], f"{modality}/{name}"
        spec = layout.arrays().get(array)
        if self._commit is None or spec is None or array in self._checked_arrays:
            return
        of_shards = {
            f"{array}/{spec.shard_key(shard)}": row["objects"]
            for shard, row in self.history.shards.items()
        }
        self._check_sizes({key: named.get(key) for key, named in of_shards.items()})
        self._checked_arrays.add(array)

    def _check_objects(
        self, modality: str, name: str, shards: np.ndarray, rows: dict[int, dict[str, Any]]
    ) -> None:
        keys = {(modality, name, shard) for shard in shards.tolist()} - self._checked_shards
        self._check_sizes(
            {path: what for key in sorted(keys) for path, what in rows[key[2]]["objects"].items()}
        )
        self._checked_shards |= keys

    def _check_sizes(self, named: dict[str, dict[str, Any] | None]) -> None:
        """What the ledger says of some objects, None where it names none, against what is there."""
        sizes = self.objects.sizes(named)
        for path, what in named.items():
            size, said = sizes.get(path), None if what is None else what["bytes"]
            if size != said:
                raise IntegrityError(
                    f"{self.location}/{path} is {'missing' if size is None else f'{size} bytes long'}; the "
                    f"ledger says {'none' if said is None else f'{said} bytes'}: {MEND}"
                )

    def _read(self, name: str, frames: np.ndarray) -> np.ndarray:
        return values(self._arrays.pending(name, frames))

    def _whole(self, name: str) -> np.ndarray:
        return values(self._arrays.pending(name, slice(None)))

    def _rows_of(self, modality: str, partition: str) -> tuple[np.ndarray, np.ndarray]:
        """Leaf count and first row, int64 [frame], of every frame slot."""
        key = (modality, partition)
        if key not in self._row_tables:
            layout = self.layouts[modality]
            whole = self._whole(f"{partition_path(*key)}/counts").astype(np.int64)
            per_shard = whole.reshape(layout.num_shards, layout.shard_capacity)
            within = np.cumsum(per_shard, axis=1) - per_shard
            first = np.arange(layout.num_shards)[:, None] * layout.rows_per_shard
            self._row_tables[key] = whole, (first + within).ravel()
        return self._row_tables[key]
