"""Reading the arrays of a store. Shapes come from the committed header, never from an array's own
`zarr.json`: that one may belong to a commit that is not there yet.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from pipeline.errors import IntegrityError, StoreError
from pipeline.storage.chunks import Shard
from pipeline.storage.commit import MEND
from pipeline.storage.layout import ArraySpec, StoreLayout
from pipeline.storage.objects import Objects
from pipeline.storage.opening import Shards
from pipeline.storage.vouched import Vouched

# Shards that one read has open at once, up to twice: those it has just read stay until the next are there.
_AT_ONCE = 16


class Arrays:
    """The arrays of some modalities, read by inner chunks. Safe from several threads."""

    def __init__(self, objects: Objects, layouts: dict[str, StoreLayout], vouched: Vouched) -> None:
        self._location, self._layouts = objects.location, layouts
        self._shards = Shards(objects, vouched)

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return {name: spec for of in self._layouts.values() for name, spec in of.arrays().items()}

    def spec(self, name: str) -> ArraySpec:
        """What an array is like. Raises StoreError if there is none of that name."""
        if name not in self._specs:
            modality, _, inside = name.partition("/")
            parts = inside.split("/")
            layout = self._layouts.get(modality)
            if layout is not None and layout.tokenized and parts[0] == "partitions":
                self._specs.update(layout.partition_arrays(parts[1]))
        if name not in self._specs:
            known = ", ".join(sorted(self._specs))
            raise StoreError(f"{self._location}: no array {name!r:.80}; there are {known}")
        return self._specs[name]

    def frames_into(self, name: str, frames: np.ndarray, out: np.ndarray) -> None:
        """Frames (int64 [n], any order) of an array with one chunk each into `out` [n, ...].

        Raises ValueError unless `out` has the array's type and shape and lies in one piece.
        """
        spec = self.spec(name)
        if spec.chunk[0] != 1:
            raise ValueError(f"{name} does not have one chunk per frame")
        shape = (len(frames), *spec.shape[1:])
        if out.shape != shape or out.dtype != np.dtype(spec.dtype):
            raise ValueError(
                f"{name}: out is {out.dtype} {out.shape}; expected {spec.dtype} {shape}"
            )
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"{name}: out must be contiguous and writeable")
        self.chunks_into(name, frames, out)

    def chunks_into(
        self, name: str, chunks: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None
    ) -> None:
        """Chunks, counted over all shards, into the rows of `out` [n, *chunk]: all, or `rows` of them."""
        for some in self._by_shard(name, chunks):
            if self._shards.far:
                for shard, inside, _ in some:
                    shard.ask(inside)
            for shard, inside, at in some:
                shard.decode(inside, out, at if rows is None else rows[at])
        if out.dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
            self._raise_neither(name, chunks, out)

    def ask(self, name: str, chunks: np.ndarray) -> None:
        """These chunks, counted over all shards, are going to be read. Tells nothing of damage."""
        try:
            for some in self._by_shard(name, chunks):
                for shard, inside, _ in some:
                    shard.ask(inside)
        except StoreError:
            return  # the read itself will tell

    def whole(self, name: str) -> np.ndarray:
        """All values of an array with one chunk per shard."""
        spec = self.spec(name)
        assert spec.chunk == spec.shard
        num_shards = spec.shape[0] // spec.shard[0]
        out = np.empty((num_shards, *spec.shard), spec.dtype)
        self.chunks_into(name, np.arange(num_shards), out)
        return out.reshape(spec.shape)

    def _by_shard(
        self, name: str, chunks: np.ndarray
    ) -> Iterator[list[tuple[Shard, np.ndarray, np.ndarray]]]:
        """Each shard with the chunks wanted of it, ascending, and the rows they go to: some at a time."""
        spec = self.spec(name)
        per_shard = spec.shard[0] // spec.chunk[0]
        num_chunks = spec.shape[0] // spec.chunk[0]
        if not len(chunks):
            return
        if chunks.min() < 0 or chunks.max() >= num_chunks:
            raise IndexError(f"{name} has chunks 0 ... {num_chunks - 1}; asked for {chunks!s:.80}")
        rows = np.argsort(chunks, kind="stable")
        numbers, inside = np.divmod(chunks[rows], per_shard)
        begins = np.append(0, np.flatnonzero(np.diff(numbers)) + 1)
        of_group = numbers[begins].tolist()
        bounds = [*begins.tolist(), len(rows)]
        for first in range(0, len(of_group), _AT_ONCE):
            some = of_group[first : first + _AT_ONCE]
            yield [
                (shard, inside[slice(*bounds[i : i + 2])], rows[slice(*bounds[i : i + 2])])
                for i, shard in enumerate(self._shards.of(name, spec, some), start=first)
            ]

    def _raise_neither(self, name: str, chunks: np.ndarray, out: np.ndarray) -> None:
        spec, flat = self.spec(name), out.view(np.uint8).reshape(len(out), -1)
        chunk = int(chunks[int((flat.max(1) > 1).argmax())])
        shard, inside = divmod(chunk, spec.shard[0] // spec.chunk[0])
        raise IntegrityError(
            f"{self._location}/{name}/{spec.shard_key(shard)}: chunk {inside} holds bytes that are neither "
            f"true nor false; {MEND}"
        )
