"""The objects of a store by name: whole, durable, atomic. One protocol for folders and object stores.

What a store promises rests on few operations: an object is written whole or not at all, one object can be
replaced on the condition that nobody else did, and rows are added to a log one after another.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import LockedError, NoSpaceError, StoreError
from pipeline.locations import is_url

PARTIAL_SUFFIX = ".partial"
Location = str | Path


class Objects(Protocol):
    """Objects below one location. Names are relative, with slashes, and never lead upwards."""

    location: str

    def read(self, name: str) -> bytes:
        """An object's content; FileNotFoundError if there is none."""

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is none."""

    def names(self, below: str = "") -> Iterator[str]:
        """Names of all objects below a folder, in no order; leftovers of killed writers left out."""

    def modified(self, name: str) -> float:
        """Seconds since 1970 when an object was written; FileNotFoundError if there is none."""

    def write(self, name: str, content: bytes | memoryview) -> dict[str, Any]:
        """Write a whole object durably and atomically; its `bytes` and `sha256`.

        Raises StoreError, which names the bytes needed, where that fails; what was there stays.
        """

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
    text = str(location)
    if isinstance(location, str) and is_url(text):
        from pipeline.storage.buckets import BucketObjects  # obstore is an extra

        return BucketObjects(text)
    return LocalObjects(Path(location))


def absolute(objects: Objects) -> str:
    """Where objects are, for workers that run in another folder."""
    return str(objects.folder) if isinstance(objects, LocalObjects) else objects.location


def entry(content: bytes | memoryview) -> dict[str, Any]:
    """How a ledger or commit names an object's content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class LocalObjects:
    """Objects as files of a folder: temporary name, fsync, rename."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.location = str(folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def size(self, name: str) -> int | None:
        try:
            return os.stat(f"{self.folder}/{name}").st_size  # noqa: PTH116 (called for every object)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, below: str = "") -> Iterator[str]:
        for folder, _, files in os.walk(self.folder / below):
            inside = Path(folder).relative_to(self.folder).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            yield from (f"{prefix}{file}" for file in files if not file.endswith(PARTIAL_SUFFIX))

    def modified(self, name: str) -> float:
        return (self.folder / name).stat().st_mtime

    def write(self, name: str, content: bytes | memoryview) -> dict[str, Any]:
        path = self.folder / name
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        try:
            make_folders(path.parent)
            _write_synced(partial, content)
            _rename(partial, path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise _unwritten(f"{path}: cannot write {len(content)} bytes", error) from None
        return entry(content)

    def swap(self, name: str, content: bytes, seen: bytes | None) -> None:
        # Between looking and writing nobody else writes: the holder of the lock alone swaps.
        found = self.read(name) if self.size(name) is not None else None
        if found != seen:
            raise LockedError(
                f"{self.folder / name} was written by another process meanwhile; run the same command again"
            )
        self.write(name, content)

    def append(self, log: str, rows: bytes) -> None:
        path = self.folder / log
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
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        for folder, _, files in os.walk(self.folder):
            for file in files:
                if file.endswith(PARTIAL_SUFFIX):
                    Path(folder, file).unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _unwritten(what: str, error: OSError) -> StoreError:
    """What could not be written, and why, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"{what}: {error.strerror}; free some space, then run the same command again"
        )
    return StoreError(
        f"{what}: {error.strerror}; check the permissions, then run the same command again"
    )


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    if not folder.exists():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _write_synced(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        # Else less than a buffer full is handed to the system after the sync.
        file.flush()
        _sync(file.fileno())


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
