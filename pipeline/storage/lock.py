"""One writer at a time: a lock that names its holder, beats while it lives, and is free once it is dead.

A local store is locked by the kernel; the beat is for holders on other machines, which a kernel may not
see. In an object store the lock is an object replaced on condition, and the beat is all there is.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import psutil

from pipeline.errors import LockedError, StoreError
from pipeline.storage.objects import LocalObjects, Objects, make_folders

LOCK = ".lock"
# A holder beats this often; who finds a lock watches it for a few beats, so that a live holder is named
# within 5 s; one that has not beaten for `STALE_S` is dead, whatever became of it.
BEAT_S = 1.0
WATCH_S = 3.5
STALE_S = 30.0


class Held:
    """A lock that is held. `check` before every step that others would see."""

    def __init__(self, lock: "_Lock") -> None:
        self._lock, self._lost = lock, threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LockedError if the lock was taken over, as from a process that stood still too long."""
        if self._lost.is_set():
            raise LockedError(
                f"{self._lock.location}: another process took the store over while this one stood still; "
                "it goes on with the work"
            )

    def release(self) -> None:
        """Give the lock back, unless it was lost."""
        self._stop.set()
        self._thread.join()
        if not self._lost.is_set():
            self._lock.free()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            if not self._lock.beat():
                self._lost.set()
                return


@contextmanager
def exclusive(objects: Objects) -> Iterator[Held]:
    """Hold a store for writing. LockedError names the holder; a dead holder's lock is taken over."""
    lock: _Lock = (
        _FileLock(objects.folder) if isinstance(objects, LocalObjects) else _ObjectLock(objects)
    )
    lock.take()
    held = Held(lock)
    try:
        yield held
    finally:
        held.release()


def tidy(objects: Objects) -> None:
    """Remove what a writer left that died after its commit; nothing where one is at work."""
    if objects.size(LOCK):
        with contextlib.suppress(StoreError), exclusive(objects):
            objects.sweep()


class _Lock(Protocol):
    location: str

    def take(self) -> None: ...

    def beat(self) -> bool:
        """Show that the holder lives; False if the lock is another's."""

    def free(self) -> None: ...


class _FileLock:
    """A file with its holder in it, locked by the kernel; its modification time is the beat."""

    def __init__(self, folder: Path) -> None:
        self.location, self.path = str(folder), folder / LOCK
        self._record = _record()
        self._file: FileIO | None = None

    def take(self) -> None:
        try:
            make_folders(self.path.parent)
            file = FileIO(self.path, "a+")
            try:
                self._take(file)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise StoreError(
                f"{self.location}: cannot be locked for writing: {error.strerror}; give a path you may "
                "write to, on a disk with some space"
            ) from None
        self._file = file

    def _take(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(self.location, _parsed(self._content())) from None
        except OSError:
            pass  # a file system without locks: the beat decides
        holder = _parsed(self._content())
        # A record that is torn, and so names nobody, is of a holder that died while it wrote it.
        elsewhere = holder is not None and holder["pid"] and holder["host"] != socket.gethostname()
        if elsewhere and _beats(self.path.stat().st_mtime, lambda: self.path.stat().st_mtime):
            raise _locked(self.location, holder)
        file.truncate(0)
        if file.write(self._record) != len(self._record):
            file.truncate(0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def beat(self) -> bool:
        if self._content() != self._record:
            return False
        os.utime(self.path)
        return True

    def free(self) -> None:
        # The file stays: removing it could hand two later holders two different files.
        if self._file is not None:
            if self._content() == self._record:
                self._file.truncate(0)
            self._file.close()

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:
            return b""


class _ObjectLock:
    """An object with its holder and a counter in it; empty while nobody holds it."""

    def __init__(self, objects: Objects) -> None:
        self.location, self._objects = objects.location, objects
        self._beats, self._content = 0, b""

    def take(self) -> None:
        found = self._read()
        holder = _parsed(found or b"")
        if holder is not None and not _is_dead_here(holder):
            modified = self._objects.modified(LOCK)
            if _beats(modified, lambda: self._objects.modified(LOCK)):
                raise _locked(self.location, holder)
        try:
            self._swap(found)
        except LockedError:
            raise _locked(self.location, _parsed(self._read() or b"")) from None

    def beat(self) -> bool:
        try:
            self._swap(self._content)
        except LockedError:
            return False
        except StoreError:
            pass  # out of reach for a moment; whoever watches waits for several beats
        return True

    def free(self) -> None:
        # Out of reach, or another's: it goes stale by itself.
        with contextlib.suppress(StoreError):
            self._objects.swap(LOCK, b"", self._content)

    def _read(self) -> bytes | None:
        try:
            return self._objects.read(LOCK)
        except FileNotFoundError:
            return None

    def _swap(self, seen: bytes | None) -> None:
        self._beats += 1
        content = _record(self._beats)
        self._objects.swap(LOCK, content, seen)
        self._content = content


_TOKEN = secrets.token_hex(8)


def _record(beats: int = 0) -> bytes:
    me = psutil.Process()
    holder = {
        "pid": me.pid,
        "host": socket.gethostname(),
        "started": me.create_time(),
        "token": _TOKEN,
        "beats": beats,
    }
    return json.dumps(holder, sort_keys=True).encode()


def _parsed(content: bytes) -> dict[str, Any] | None:
    """The holder a lock names; None if it is free."""
    if not content:
        return None
    try:
        found = json.loads(content)
        return {"pid": int(found["pid"]), "host": str(found["host"]), "started": found["started"]}
    except (ValueError, KeyError, TypeError):
        return {"pid": 0, "host": "an unknown machine", "started": None}


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is gone."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        return psutil.Process(holder["pid"]).create_time() != holder["started"]
    except psutil.Error:
        return True


def _beats(modified: float, look: Any) -> bool:
    """Whether a lock is alive: it beats while we watch, or did so too lately to be called dead."""
    until = time.monotonic() + WATCH_S
    while time.monotonic() < until:
        if look() != modified:
            return True
        time.sleep(BEAT_S / 4)
    return time.time() - modified < STALE_S


def _locked(location: str, holder: dict[str, Any] | None) -> LockedError:
    who = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
    return LockedError(
        f"{location} is being written by {who}; wait for it to end, or stop it (a lock whose holder is "
        f"dead is free after {STALE_S:g} s)"
    )
