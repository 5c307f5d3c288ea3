"""Reading partitions: the leaves of any frames out of slotted rows (docs/format.md), in bulk."""

import numpy as np

from pipeline import segments
from pipeline.errors import IntegrityError
from pipeline.storage.arrays import Arrays
from pipeline.storage.chunks import Recent
from pipeline.storage.commit import MEND
from pipeline.storage.layout import StoreLayout
from pipeline.storage.partitions import partition_path
from pipeline.storage.tiles import expand

# Decoded chunks of leaves that are kept.
_CACHE_BYTES = 32 * 2**20


class PartitionRows:
    """The leaves of one modality's frames under one partition. Safe from several threads.

    Keeps leaf counts and first rows of the shards it has seen, 12 bytes per slot, and some decoded chunks.
    """

    def __init__(self, arrays: Arrays, location: str, layout: StoreLayout, partition: str) -> None:
        group = partition_path(layout.modality, partition)
        self._arrays, self._layout, self._location = arrays, layout, location
        self._counts_name, self._scales_name = f"{group}/counts", f"{group}/scales"
        self._seen = np.zeros(layout.num_shards, np.bool_)
        # Pages of shards nobody asks for are never touched.
        self._counts = np.zeros((layout.num_shards, layout.shard_capacity), np.int32)
        self._first = np.zeros((layout.num_shards, layout.shard_capacity), np.int64)
        self._chunk_rows = arrays.spec(self._scales_name).chunk[0]
        self._chunks: Recent[int, np.ndarray] = Recent(max(1, _CACHE_BYTES // self._chunk_rows))

    def read(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leaves uint8 [rows] of `frames` (int64 [n], any order), frame after frame, and counts int64 [n].

        Raises IntegrityError where they are damaged or do not tile the frames.
        """
        counts, begins = self._where(frames)
        scales = self._gather(begins, counts)
        where = f"{self._location}/{self._layout.modality}"
        segments.check_frames(
            scales, counts, self._layout.grid, lambda i: f"{where} frame {frames[i]}"
        )
        return scales, counts

    def ask(self, frames: np.ndarray) -> None:
        """These frames are going to be read."""
        shards = np.unique(frames // self._layout.shard_capacity)
        self._arrays.ask(self._counts_name, shards)
        shards = shards[self._seen[shards]]
        known = frames[np.isin(frames // self._layout.shard_capacity, shards)]
        counts, begins = self._where(known)
        self._arrays.ask(self._scales_name, self._touched(begins, counts))

    def _where(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leaf count and first row, int64 [n], of some frames."""
        shards = frames // self._layout.shard_capacity
        if len(frames) and not (frames.min() >= 0 and frames.max() < self._layout.num_frames):
            last = self._layout.num_frames - 1
            raise IndexError(
                f"{self._counts_name} has frames 0 ... {last}; asked for {frames!s:.80}"
            )
        if not self._seen[shards].all():
            self._look_at(np.unique(shards[~self._seen[shards]]))
        return self._counts.ravel()[frames].astype(np.int64), self._first.ravel()[frames]

    def _look_at(self, shards: np.ndarray) -> None:
        counts = np.empty((len(shards), self._layout.shard_capacity), np.int32)
        self._arrays.chunks_into(self._counts_name, shards, counts)
        wrong = (counts < 0) | (counts > self._layout.grid.num_cells)
        if wrong.any():
            shard, slot = (int(position[0]) for position in np.nonzero(wrong))
            spec = self._arrays.spec(self._counts_name)
            raise IntegrityError(
                f"{self._location}/{self._counts_name}/{spec.shard_key(int(shards[shard]))}: "
                f"{counts[shard, slot]} leaves in a frame of {self._layout.grid.num_cells} cells; {MEND}"
            )
        ends = np.cumsum(counts, axis=1, dtype=np.int64)
        self._counts[shards] = counts
        self._first[shards] = ends - counts + shards[:, None] * self._layout.rows_per_shard
        # Last, so that no other thread looks before.
        self._seen[shards] = True

    def _gather(self, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The rows `begins[i] ... begins[i] + counts[i] - 1`, run after run."""
        chunks = self._touched(begins, counts)
        held = self._decoded(chunks)
        # A frame's chunks follow one another in the array, and so they do among those touched.
        at = np.searchsorted(chunks, begins // self._chunk_rows) * self._chunk_rows
        at += begins % self._chunk_rows
        if not len(at):
            return held
        if np.array_equal(at[1:], at[:-1] + counts[:-1]):
            return held[at[0] : at[-1] + counts[-1]].copy()
        runs = np.flatnonzero(at[1:] != at[:-1] + counts[:-1]) + 1
        if len(runs) * 4 > len(at):
            return held[expand(at, counts)]
        heads, tails = np.append(0, runs), np.append(runs, len(at)) - 1
        ends = at[tails] + counts[tails]
        return np.concatenate(
            [held[:0], *(held[a:b] for a, b in zip(at[heads].tolist(), ends.tolist(), strict=True))]
        )

    def _touched(self, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Numbers of the chunks that hold some rows, ascending; a frame has no more rows than a chunk."""
        some = counts > 0
        first = begins[some] // self._chunk_rows
        last = (begins[some] + counts[some] - 1) // self._chunk_rows
        return np.unique(np.concatenate([first, last]))

    def _decoded(self, chunks: np.ndarray) -> np.ndarray:
        """uint8: the rows of some chunks, chunk after chunk."""
        rows = np.empty((len(chunks), self._chunk_rows), np.uint8)
        wanted = []
        for position, chunk in enumerate(chunks.tolist()):
            found = self._chunks.get(chunk)
            if found is None:
                wanted.append(position)
            else:
                rows[position] = found
        if wanted:
            read = np.empty((len(wanted), self._chunk_rows), np.uint8)
            self._arrays.chunks_into(self._scales_name, chunks[wanted], read)
            rows[wanted] = read
            for chunk, values in zip(chunks[wanted].tolist(), read, strict=True):
                self._chunks.put(chunk, values.copy())
        return rows.reshape(-1)
