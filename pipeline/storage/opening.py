"""Shards opened and compared with the ledger at first use, and kept open for what is read next."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

from pipeline.errors import IntegrityError
from pipeline.storage.chunks import TOO_MANY_OPEN, Content, Recent, Shard, Whole, unreadable
from pipeline.storage.commit import MEND
from pipeline.storage.files import LocalFile
from pipeline.storage.layout import ArraySpec
from pipeline.storage.objects import LocalObjects, Objects
from pipeline.storage.vouched import Said, Vouched, unlike

# Files kept open: a process may have 1024 as a rule.
_OPEN_FILES = 256
# Objects up to this size are held whole: their sha256 costs no further read, and they need no open file.
_SMALL_BYTES = 2**16
# All of those that are held.
_HELD_BYTES = 2**26
# Number and path of a shard, and what the ledger says of it.
_Which = tuple[int, str, Said | None]


class Shards:
    """The shards of a store. Safe from several threads, and in forked processes."""

    def __init__(self, objects: Objects, vouched: Vouched) -> None:
        self._location, self._objects, self._vouched = objects.location, objects, vouched
        self._files: Recent[tuple[str, int], Shard] = Recent(_OPEN_FILES)
        self._small: Recent[tuple[str, int], Shard] = Recent(_HELD_BYTES)
        self._compared: dict[str, bytearray] = {}
        self._places = _places(objects)

    @property
    def far(self) -> bool:
        """Whether reads wait for answers, so that what is wanted is better asked for ahead."""
        return self._places.far

    def of(self, name: str, spec: ArraySpec, numbers: list[int]) -> list[Shard]:
        """Some shards of an array.

        Raises IntegrityError where one is not what the ledger says, StoreError where it cannot be read.
        """
        found = [self._held(name, number) for number in numbers]
        if None in found:
            wanted = []
            for number in {n for n, shard in zip(numbers, found, strict=True) if shard is None}:
                path = f"{name}/{spec.shard_key(number)}"
                wanted.append((number, path, self._vouched.said(name, path, number)))
            opened = self._places.map(lambda which: self._open(name, spec, which), wanted)
            new = dict(zip((which[0] for which in wanted), opened, strict=True))
            found = [shard or new[number] for number, shard in zip(numbers, found, strict=True)]
        return found  # type: ignore[return-value]

    def _held(self, name: str, number: int) -> Shard | None:
        return self._small.get((name, number)) or self._files.get((name, number))

    def _open(self, name: str, spec: ArraySpec, which: _Which) -> Shard:
        number, path, said = which
        where, key = f"{self._location}/{path}", (name, number)
        num_shards = spec.shape[0] // spec.shard[0]
        compared = self._compared.setdefault(name, bytearray(num_shards))
        if said is None:
            shard = Shard(where, None, spec)
            self._small.put(key, shard, shard.held_bytes)
            return shard
        content = self._of_size(path, said)
        if said.size > _SMALL_BYTES:
            if said.doubtful and not compared[number]:
                self._compare(path, said)
            shard = Shard(where, content, spec)
            self._files.put(key, shard)
        else:
            held = self._whole(path, said, content, bool(compared[number]))
            shard = Shard(where, held, spec)
            self._small.put(key, shard, held.size + shard.held_bytes)
        compared[number] = True
        return shard

    def _of_size(self, path: str, said: Said) -> Content:
        content = self._content(path)
        if content is None or content.size != said.size:
            size = None if content is None else content.size
            raise IntegrityError(f"{self._location}/{path} {unlike(size, said.size)}")
        return content

    def _content(self, path: str) -> Content | None:
        try:
            return self._places.open(path)
        except OSError as error:
            if error.errno in TOO_MANY_OPEN and len(self._files):
                self._files.clear()
                return self._content(path)
            raise unreadable(f"{self._location}/{path}", error) from None

    def _whole(self, path: str, said: Said, content: Content, compared: bool) -> Whole:
        """All of a small object, of the ledger's sha256 if it was not compared before."""
        for _ in range(content.tries):
            try:
                held: bytes = content.read(0, said.size).tobytes()
            except OSError as error:
                raise unreadable(f"{self._location}/{path}", error) from None
            if compared or said.sha256 in (None, hashlib.sha256(held).hexdigest()):
                return Whole(held)
        raise self._another(path)

    def _compare(self, path: str, said: Said) -> None:
        digest = self._objects.digest(path)
        if digest is None or digest["sha256"] != said.sha256:
            raise self._another(path)

    def _another(self, path: str) -> IntegrityError:
        return IntegrityError(
            f"{self._location}/{path} has the size the ledger says, but other content: {MEND}"
        )


class _Places(Protocol):
    """Where objects are opened."""

    far: bool

    def open(self, path: str) -> Content | None:
        """The object at a path; None if there is none."""

    def map(self, call: Callable[[_Which], Shard], which: list[_Which]) -> Iterable[Shard]:
        """What the call gives of each, at once where that means to wait for answers."""


class _Folder:
    far = False

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def open(self, path: str) -> Content | None:
        try:
            return LocalFile(f"{self._folder}/{path}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def map(self, call: Callable[[_Which], Shard], which: list[_Which]) -> Iterable[Shard]:
        return map(call, which)


def _places(objects: Objects) -> _Places:
    if isinstance(objects, LocalObjects):
        return _Folder(str(objects.folder))
    from pipeline.storage.blocks import Bucket  # obstore is an extra

    return Bucket(objects)
