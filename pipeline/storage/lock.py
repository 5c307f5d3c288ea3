"""One writer at a time: a lock that names its holder, beats while it lives, and is free once it is dead.

A local store is locked by the kernel; the beat is for holders that the kernel may not see, on other
machines or where a file system has no locks. In an object store the lock is an object replaced on
condition, and the beat is all there is. No clocks are compared: who finds a lock watches whether it beats.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import psutil

from pipeline.errors import LockedError, StoreError
from pipeline.storage.objects import LocalObjects, Objects, make_folder

LOCK = ".lock"
# A holder beats this often, so that whoever watches can name a live one within 5 s.
BEAT_S = 2.0
# One that did not beat so long while it was watched is dead, whatever became of it.
STALE_S = 30.0
# A holder whose beats fail goes on for half of `STALE_S`, and then tries so long before it gives up.
PATIENCE_S = 120.0
# What cannot be read when a lock is given back is asked for again so often.
_FREE_TRIES = 3


class Held:
    """A lock that is held. `check` before every step that others would see."""

    def __init__(self, lock: "_Lock") -> None:
        self._lock, self._mutex = lock, threading.Lock()
        self._lost, self._failure, self._beaten = False, "", _now()
        self._stop = threading.Event()
        # A daemon, so that it keeps no interpreter alive.
        self._thread = threading.Thread(target=self._beat, name="store lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LockedError if the lock was taken over, as from a process that stood still too long.

        Raises StoreError where it has not been possible to find out for long.
        """
        # After a pause of this process the thread may not have beaten yet.
        while not self._lost and _now() - self._beaten > STALE_S / 2 and not self._renew():
            if _now() - self._beaten > PATIENCE_S:
                raise StoreError(
                    f"{self._lock.location}: the lock could not be kept for {_now() - self._beaten:.0f} s: "
                    f"{self._failure:.300}; once this is mended, run the same command again"
                )
            self._stop.wait(BEAT_S / 4)
        if self._lost:
            raise LockedError(
                f"{self._lock.location}: the lock is no longer this process's; another one took the store "
                "over, or the lock was removed. Run the same command again once no other works on it"
            )

    def release(self) -> None:
        """Give the lock back, unless it was lost."""
        self._stop.set()
        self._thread.join()
        self._lock.free()

    def _beat(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_S):
            self._renew()

    def _renew(self) -> bool:
        """Beat once; False if that failed, for whatever reason: `check` tells it."""
        with self._mutex:
            begun = _now()
            try:
                self._lost = not self._lock.beat()
            except Exception as error:
                self._failure = " ".join(str(error).split()) or type(error).__name__
                return False
            self._beaten = begun
            return True


@contextmanager
def exclusive(objects: Objects) -> Iterator[Held]:
    """Hold a store for writing. LockedError names the holder; a dead holder's lock is taken over."""
    lock = _lock_of(objects)
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


def _lock_of(objects: Objects) -> "_Lock":
    if isinstance(objects, LocalObjects):
        return _FileLock(objects.folder)
    from pipeline.storage.buckets import FOR_LOCK, BucketObjects  # obstore is an extra

    return _ObjectLock(BucketObjects(objects.location, FOR_LOCK))


class _Lock(Protocol):
    location: str

    def take(self) -> None: ...

    def beat(self) -> bool:
        """Show that the holder lives; False if the lock is another's."""

    def free(self) -> None:
        """Give the lock back if it is still the holder's."""


class _FileLock:
    """A file with its holder in it, locked by the kernel; its modification time is the beat."""

    def __init__(self, folder: Path) -> None:
        self.location, self.path = str(folder), folder / LOCK
        self._record = _record(secrets.token_hex(8), 0)
        self._file: FileIO | None = None

    def take(self) -> None:
        try:
            self._file = self._opened()
            self._take(self._file)
        except OSError as error:
            self._close()
            raise StoreError(
                f"{self.location}: cannot be locked for writing: {error.strerror}; give a path you may "
                "write to, on a disk that is not full"
            ) from None
        except BaseException:
            self._close()
            raise

    def _opened(self) -> FileIO:
        make_folder(self.path.parent)
        return FileIO(self.path, "a+")

    def _take(self, file: FileIO) -> None:
        kernel = _flock(file)
        if kernel is False or not self._is_in_place(file):
            raise _locked(self.location, _parsed(self._content()))
        holder = _parsed(self._content())
        if (
            holder is not None
            # A record that is torn names nobody: its holder died while it wrote it.
            and not (kernel and (_same_kernel(holder) or not holder["pid"]))
            and not _is_dead_here(holder)
        ):
            self._watch()
        file.truncate(0)
        if file.write(self._record) != len(self._record):
            file.truncate(0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kernel is None:
            # Two may have come this far; the one that wrote last has it.
            time.sleep(BEAT_S)
            if self._content() != self._record:
                raise _locked(self.location, _parsed(self._content()))

    def _watch(self) -> None:
        seen = self._look()
        if not _is_still(self._look, seen):
            holder = _parsed(self._content())
            if holder is not None:
                raise _locked(self.location, holder)

    def _look(self) -> tuple[bytes, int]:
        # Network file systems look at the server when a file is opened, and only then.
        with self.path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns

    def _is_in_place(self, file: FileIO) -> bool:
        """Whether the file is still the one at the path: a holder may have removed the store."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def beat(self) -> bool:
        if self._content() != self._record:
            return False
        os.utime(self.path)
        return True

    def free(self) -> None:
        # The file stays: removing it could hand two later holders two different files.
        with contextlib.suppress(OSError):
            if self._file is not None and self._content() == self._record:
                self._file.truncate(0)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _content(self) -> bytes:
        try:
            return self._look()[0]
        except FileNotFoundError:
            return b""


class _ObjectLock:
    """An object with its holder and a counter in it; empty while nobody holds it."""

    def __init__(self, objects: Objects) -> None:
        self.location, self._objects = objects.location, objects
        self._token = secrets.token_hex(8)
        self._beats, self._content = 0, b""

    def take(self) -> None:
        found = self._read()
        holder = _parsed(found or b"")
        if holder is not None and not _is_dead_here(holder) and not _is_still(self._read, found):
            found = self._read()
            holder = _parsed(found or b"")
            if holder is not None:
                raise _locked(self.location, holder)
        try:
            self._swap(found)
        except LockedError:
            raise _locked(self.location, _parsed(self._read() or b"")) from None

    def beat(self) -> bool:
        try:
            self._swap(self._content)
        except LockedError:
            # An earlier beat may have arrived though its answer never did.
            found = self._read() or b""
            if not self._is_own(found):
                return False
            self._content = found
        return True

    def free(self) -> None:
        # Out of reach, or another's: it goes stale by itself.
        for _ in range(_FREE_TRIES):
            with contextlib.suppress(StoreError):
                found = self._read() or b""
                if self._is_own(found):
                    self._objects.swap(LOCK, b"", found)
                return

    def _is_own(self, content: bytes) -> bool:
        """Whether this holder wrote it. StoreError where it cannot be read: it may have arrived in part."""
        holder = _parsed(content)
        if holder is not None and holder["token"] is None:
            raise StoreError(
                f"{self.location}/{LOCK} holds {len(content)} bytes that name no holder"
            )
        return holder is not None and bool(holder["token"] == self._token)

    def _read(self) -> bytes | None:
        try:
            return self._objects.read(LOCK)
        except FileNotFoundError:
            return None

    def _swap(self, seen: bytes | None) -> None:
        self._beats += 1
        content = _record(self._token, self._beats)
        self._objects.swap(LOCK, content, seen)
        self._content = content


def _record(token: str, beats: int) -> bytes:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "processes": _processes(),
        "started": _started(os.getpid()),
        "token": token,
        "beats": beats,
    }
    return json.dumps(holder).encode()


def _parsed(content: bytes) -> dict[str, Any] | None:
    """The holder a lock names; None if it is free."""
    if not content:
        return None
    unknown = {"pid": 0, "host": "an unknown machine"}
    try:
        found = json.loads(content)
        holder = {**unknown, **found, "pid": int(found["pid"])}
    except (ValueError, KeyError, TypeError):
        holder = unknown
    names = ("pid", "host", "kernel", "processes", "started", "token")
    return {name: holder.get(name) for name in names}


def _kernel() -> str:
    """What tells one running machine from all others, and from itself before it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _processes() -> str:
    """What tells process numbers of one container from those of another on the same machine."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (no path)
    except OSError:
        return ""


def _started(pid: int) -> float | None:
    """When a process started, by a clock nobody sets; None if it is gone or dead."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        # Linux counts from the start of the machine; seconds since 1970 would move with the clock.
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            return float(stat.read_text().rpartition(")")[2].split()[19])
        return float(process.create_time())
    except (OSError, psutil.Error):
        return None


def _same_kernel(holder: dict[str, Any]) -> bool:
    return bool(holder["kernel"] == _kernel())


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is gone."""
    if not _same_kernel(holder) or holder["processes"] != _processes():
        return False
    return _started(holder["pid"]) != holder["started"]


def _flock(file: FileIO) -> bool | None:
    """Lock a file by the kernel: True, False if another process has it, None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(look: Callable[[], Any], seen: Any) -> bool:
    """Watch a lock: whether it stays as it was `seen` for so long that its holder must be dead."""
    until = time.monotonic() + STALE_S
    while True:
        # In this order, so that a pause of this process ends with a look.
        is_last = time.monotonic() >= until
        if look() != seen:
            return False
        if is_last:
            return True
        time.sleep(BEAT_S / 4)


def _now() -> float:
    """Seconds that also pass while the machine is suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def _locked(location: str, holder: dict[str, Any] | None) -> LockedError:
    who = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
    return LockedError(
        f"{location} is being written by {who}; wait for it to end, or stop it (a lock that does not beat "
        f"for {STALE_S:g} s is taken over)"
    )
