"""The objects of a store by name: whole, durable, atomic. One protocol for folders and object stores.

What a store promises rests on few operations: an object is written whole or not at all, one object can be
replaced on the condition that nobody else did, and rows are added to a log one after another.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pipeline.errors import IntegrityError, LockedError, NoSpaceError, StoreError

PARTIAL_SUFFIX = ".partial"
Location = str | Path
Contents = Mapping[str, Sequence[bytes]]


class Writer(Protocol):
    """Where objects are written to."""

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        """Write a whole object durably and atomically; its `bytes` and `sha256`.

        Raises StoreError, which names the bytes needed, where that fails; what was there stays.
        """

    def write_all(self, contents: Contents) -> dict[str, dict[str, Any]]:
        """Write whole objects, given in pieces by name, as `write` does; what is known of each.

        In no order, and where one cannot be written others may have been.
        """


class Objects(Writer, Protocol):
    """Objects below one location. Names are relative, with slashes, and never lead upwards."""

    location: str

    def read(self, name: str) -> bytes:
        """An object's content; FileNotFoundError if there is none."""

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is none."""

    def digest(self, name: str) -> dict[str, Any] | None:
        """An object's `bytes` and `sha256`, read piece by piece; None if there is none."""

    def names(self, below: str = "") -> Iterator[str]:
        """Names of all objects below a folder, in no order; leftovers of killed writers left out."""

    def modified(self, name: str) -> float:
        """Seconds since 1970 when an object was written; FileNotFoundError if there is none."""

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of many objects by name, looked at beside each other; those that are not there left out."""

    def swap(self, name: str, content: bytes, seen: bytes | None) -> None:
        """Write an object if its content is still `seen` (None: if there is none), in one atomic step.

        Raises LockedError if somebody else wrote it meanwhile.
        """

    def append(self, log: str, rows: bytes) -> None:
        """Add whole lines to a log durably. One process at a time does this, the holder of the lock."""

    def lines(self, log: str) -> bytes:
        """All whole lines of a log: what `write` made of it and `append` added; empty if there is none."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there count as removed."""

    def sweep(self) -> None:
        """Remove what killed writers left; only the holder of the lock may call this."""

    def clear(self) -> None:
        """Remove everything."""


def objects_at(location: Location) -> Objects:
    """The objects of a store at a local path or URL."""
    if isinstance(location, str) and "://" in location:
        from pipeline.storage.buckets import BucketObjects  # obstore is an extra

        return BucketObjects(location)
    return LocalObjects(Path(location))


def absolute(objects: Objects) -> str:
    """Where objects are, for workers that run in another folder."""
    return str(objects.folder) if isinstance(objects, LocalObjects) else objects.location


def entry(content: bytes) -> dict[str, Any]:
    """How a ledger or commit names an object's content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_name(location: str, name: object) -> str:
    """A name that came out of a store; IntegrityError for one that leads out of it, or is none."""
    if (
        not isinstance(name, str)
        or not name
        or name[0] == "/"
        or "\0" in name
        or (".." in name and ".." in name.split("/"))
    ):
        raise IntegrityError(
            f"{location}: an object is named {name!r:.80}, which is no name below the store; the store is "
            "damaged or forged, preprocess the archive into a new one"
        )
    return name


class LocalObjects:
    """Objects as files of a folder: temporary name, fsync, rename."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.location = str(folder)
        self._prefix = f"{self.folder}/"

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def size(self, name: str) -> int | None:
        try:
            path = self._prefix + check_name(self.location, name)
            return os.stat(path).st_size  # noqa: PTH116 (called for every object)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def digest(self, name: str) -> dict[str, Any] | None:
        try:
            with self._path(name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256")
                return {"bytes": file.tell(), "sha256": found.hexdigest()}
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def names(self, below: str = "") -> Iterator[str]:
        for folder, _, files in os.walk(self.folder / below):
            inside = Path(folder).relative_to(self.folder).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            yield from (f"{prefix}{file}" for file in files if not file.endswith(PARTIAL_SUFFIX))

    def modified(self, name: str) -> float:
        return self._path(name).stat().st_mtime

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        return {name: size for name in names if (size := self.size(name)) is not None}

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        return self.write_all({name: [content]})[name]

    def write_all(self, contents: Contents) -> dict[str, dict[str, Any]]:
        # All are written before the first is synced, and all are synced before the first gets its name: the
        # disk is waited for once.
        sums, partials, folders, name = {}, dict[str, Path](), dict[Path, None](), ""
        try:
            with ExitStack() as stack:
                for name, pieces in contents.items():
                    path = self._path(name)
                    folders |= dict.fromkeys(_make_folders(path.parent))
                    partials[name] = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
                    file = stack.enter_context(partials[name].open("wb"))
                    sums[name] = _write_pieces(file, pieces)
                    stack.callback(_sync, file.fileno())
            for name, partial in partials.items():
                _rename(partial, self.folder / name)
            for folder in folders:
                _sync_folder(folder)
        except OSError as error:
            for partial in partials.values():
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            what = f"{self.folder / name}: cannot write {_size(contents[name])} bytes"
            raise _unwritten(what, error) from None
        return {name: {"bytes": _size(contents[name]), "sha256": sums[name]} for name in contents}

    def swap(self, name: str, content: bytes, seen: bytes | None) -> None:
        # Between looking and writing nobody else writes: the holder of the lock alone swaps.
        found = self.read(name) if self.size(name) is not None else None
        if found != seen:
            raise LockedError(
                f"{self.folder / name} was written by another process meanwhile; run the same command again"
            )
        self.write(name, content)

    def append(self, log: str, rows: bytes) -> None:
        path = self._path(log)
        try:
            with path.open("r+b") as file:
                # A torn line of an earlier crash would swallow the next one.
                file.seek(_whole_lines(path))
                file.truncate()
                file.write(rows)
                file.flush()
                _sync(file.fileno())
        except OSError as error:
            raise _unwritten(f"{path}: cannot add {len(rows)} bytes", error) from None

    def lines(self, log: str) -> bytes:
        if self.size(log) is None:
            return b""
        content = self.read(log)
        return content[: content.rfind(b"\n") + 1]

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        for folder, _, files in os.walk(self.folder):
            for file in files:
                if file.endswith(PARTIAL_SUFFIX):
                    Path(folder, file).unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / check_name(self.location, name)


def _unwritten(what: str, error: OSError) -> StoreError:
    """What could not be written, and why, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"{what}: {error.strerror}; free some space, then run the same command again"
        )
    return StoreError(
        f"{what}: {error.strerror}; check the permissions, then run the same command again"
    )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    for changed in _make_folders(folder):
        _sync_folder(changed)


def _write_pieces(file: BinaryIO, pieces: Sequence[bytes]) -> str:
    """Write pieces one after another, out of the user's hands; their sha256."""
    digest = hashlib.sha256()
    for piece in pieces:
        # Hashed while the processor's cache still holds it.
        digest.update(piece)
        file.write(piece)
    file.flush()
    return digest.hexdigest()


def _size(pieces: Sequence[bytes]) -> int:
    return sum(map(len, pieces))


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder; those whose content changes by it and by what is put into it."""
    changed = [folder]
    while not changed[-1].exists():
        changed.append(changed[-1].parent)
    folder.mkdir(parents=True, exist_ok=True)
    return changed


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of a file's last whole line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                return file.read().rfind(b"\n") + 1
        return size


def _rename(partial: Path, path: Path) -> None:
    partial.replace(path)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
