"""Reading the arrays of a store. Shapes come from the committed header, never from an array's own
`zarr.json`: that one may belong to a commit that is not there yet. Objects are compared with the ledgers.
"""

import errno
import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import numpy as np

from pipeline.errors import IntegrityError, StoreError
from pipeline.storage.chunks import Content, LocalFile, Recent, Shard, Whole, unreadable
from pipeline.storage.commit import MEND
from pipeline.storage.layout import ArraySpec, StoreLayout
from pipeline.storage.objects import LocalObjects, Objects
from pipeline.storage.vouched import Said, Vouched, unlike

# Shards kept open, each a file and an index of a few KiB; processes may have 1024 files as a rule.
_OPEN_SHARDS = 256
# Shards that one read has open at once.
_AT_ONCE = 32
# Objects up to this size are held whole, so that their sha256 costs no further read.
_SMALL_BYTES = 2**18


class Arrays:
    """The arrays of some modalities, shard by shard, opened at first use. Safe from several threads."""

    def __init__(self, objects: Objects, layouts: dict[str, StoreLayout], vouched: Vouched) -> None:
        self._objects, self._layouts, self._vouched = objects, layouts, vouched
        self._shards: Recent[tuple[str, int], Shard] = Recent(_OPEN_SHARDS)
        self._checked: set[str] = set()

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
            raise StoreError(f"{self._objects.location}: no array {name!r:.80}; there are {known}")
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

    def chunks_into(self, name: str, chunks: np.ndarray, out: np.ndarray) -> None:
        """Chunks, counted over all shards, into the rows of `out` [n, *chunk]."""
        groups = self._by_shard(name, chunks)
        while some := list(islice(groups, _AT_ONCE)):
            for shard, inside, _ in some:
                shard.ask(inside)
            for shard, inside, rows in some:
                shard.decode(inside, out, rows)
        if out.dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
            self._raise_neither(name, chunks, out)

    def ask(self, name: str, chunks: np.ndarray) -> None:
        """These chunks, counted over all shards, are going to be read. Tells nothing of damage."""
        try:
            for shard, inside, _ in self._by_shard(name, chunks):
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
    ) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each shard with the chunks wanted of it, ascending, and the rows they go to."""
        spec = self.spec(name)
        per_shard = spec.shard[0] // spec.chunk[0]
        num_chunks = spec.shape[0] // spec.chunk[0]
        if len(chunks) and not (chunks.min() >= 0 and chunks.max() < num_chunks):
            raise IndexError(f"{name} has chunks 0 ... {num_chunks - 1}; asked for {chunks!s:.80}")
        order = np.argsort(chunks, kind="stable")
        shards = chunks[order] // per_shard
        cuts = np.flatnonzero(np.diff(shards)) + 1
        for rows in np.split(order, cuts) if len(order) else ():
            number = int(chunks[rows[0]]) // per_shard
            yield self._shard(name, number, spec), chunks[rows] - number * per_shard, rows

    def _shard(self, name: str, number: int, spec: ArraySpec) -> Shard:
        found = self._shards.get((name, number))
        if found is None:
            path = f"{name}/{spec.shard_key(number)}"
            said = self._vouched.said(name, path, number)
            content = None if said is None else self._content(path, said)
            found = Shard(f"{self._objects.location}/{path}", content, spec)
            self._shards.put((name, number), found)
        return found

    def _content(self, path: str, said: Said) -> Content:
        """An object that is what the ledger says. Raises IntegrityError if it is another one."""
        content = self._opened(path)
        if content is None or content.size != said.size:
            size = None if content is None else content.size
            raise IntegrityError(f"{self._objects.location}/{path} {unlike(size, said.size)}")
        if said.size <= _SMALL_BYTES:
            held = content.read(0, said.size).tobytes()
            self._check_sha256(path, said, hashlib.sha256(held).hexdigest())
            return Whole(held)
        if said.doubtful and path not in self._checked:
            digest = self._objects.digest(path)
            self._check_sha256(path, said, "" if digest is None else digest["sha256"])
        return content

    def _opened(self, path: str) -> Content | None:
        """The object at a path; None if there is none."""
        assert isinstance(self._objects, LocalObjects)
        for left in (True, False):
            try:
                return LocalFile(f"{self._objects.folder}/{path}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if not left or error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise unreadable(f"{self._objects.location}/{path}", error) from None
                self._shards.clear()
        raise AssertionError("a file is opened or not")

    def _check_sha256(self, path: str, said: Said, found: str) -> None:
        if said.sha256 is not None and found != said.sha256:
            raise IntegrityError(
                f"{self._objects.location}/{path} has the size the ledger says, but other content: {MEND}"
            )
        self._checked.add(path)

    def _raise_neither(self, name: str, chunks: np.ndarray, out: np.ndarray) -> None:
        spec, flat = self.spec(name), out.view(np.uint8).reshape(len(out), -1)
        chunk = int(chunks[int((flat.max(1) > 1).argmax())])
        shard, inside = divmod(chunk, spec.shard[0] // spec.chunk[0])
        raise IntegrityError(
            f"{self._objects.location}/{name}/{spec.shard_key(shard)}: chunk {inside} holds bytes that are "
            f"neither true nor false; {MEND}"
        )
