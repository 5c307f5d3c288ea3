"""How a store becomes durable: atomic objects, the ledger, the lock and COMMIT.json.

Order of writes: every object of a shard (temporary name, fsync, rename), then the shard's ledger row,
and after the last shard the manifest, the ledger in canonical order and COMMIT.json. A shard counts
only once its row is in the ledger; a reader trusts only what COMMIT.json names.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.settings.canonical import canonical_json

LEDGER = "ledger.jsonl"
MANIFEST = "manifest.parquet"
COMMIT = "COMMIT.json"
LOCK = ".lock"
PARTIAL_SUFFIX = ".partial"


def write_object(path: Path, content: bytes) -> dict[str, Any]:
    """Write a whole object durably and atomically; its size and sha256 for the ledger."""
    return write_objects(path.parent, {path.name: [content]})[path.name]


def write_objects(root: Path, contents: Mapping[str, Sequence[bytes]]) -> dict[str, dict[str, Any]]:
    """Write whole objects durably, each atomically; size and sha256 of each for the ledger.

    `contents` holds the bytes of every object in pieces, by its path below `root`. All are written before
    the first is synced, and all are synced before the first gets its name: the disk is waited for once.
    Where one cannot be written, nothing half-written is left.
    """
    sums, partials, folders, name = {}, dict[str, Path](), dict[Path, None](), ""
    try:
        with ExitStack() as stack:
            for name, pieces in contents.items():
                path = root / name
                folders |= dict.fromkeys(_make_folders(path.parent))
                partials[name] = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
                file = stack.enter_context(partials[name].open("wb"))
                sums[name] = _write_pieces(file, pieces)
                stack.callback(os.fsync, file.fileno())
        for name in contents:
            partials[name].replace(root / name)
        for folder in folders:
            _sync_folder(folder)
    except OSError as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise StoreError(
            f"{root / name}: cannot write {_size(contents[name])} bytes: {error.strerror}; free some space "
            "or check the permissions, then run the same command again"
        ) from None
    return {name: {"bytes": _size(contents[name]), "sha256": sums[name]} for name in contents}


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


def sweep_partials(store: Path) -> None:
    """Remove what killed writers left; only the holder of the lock may call this."""
    for partial in store.rglob(f"*{PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)


def encode_rows(rows: Iterable[dict[str, Any]]) -> bytes:
    """The rows of a ledger, one JSON object per line."""
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def read_rows(path: Path, take: Callable[[dict[str, Any]], None]) -> None:
    """Hand every row of a ledger to `take`; an incomplete last line does not count.

    Raises IntegrityError where a line is no JSON, or `take` cannot use it.
    """
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(whole_lines, start=1):
        try:
            take(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise IntegrityError(
                f"{path}: line {number} is not a ledger row; the store is damaged, "
                "preprocess into a new one"
            ) from None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a ledger durably."""
    with path.open("r+b") as file:
        # A torn line of an earlier crash would swallow this row.
        kept = file.read().rfind(b"\n") + 1 if _torn(path) else file.seek(0, os.SEEK_END)
        file.seek(kept)
        file.truncate()
        file.write(canonical_json(row) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def write_commit(store: Path, ledger: bytes, manifest: bytes, summary: dict[str, Any]) -> None:
    """Make everything in the ledger visible to readers, in one atomic step."""
    objects = {
        MANIFEST: write_object(store / MANIFEST, manifest),
        LEDGER: write_object(store / LEDGER, ledger),
    }
    replace_commit(store, {"objects": objects, "summary": summary})


def replace_commit(store: Path, content: dict[str, Any]) -> None:
    """Put another COMMIT.json in place of the present one, in one atomic step."""
    write_object(store / COMMIT, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")


def read_commit(store: Path) -> dict[str, Any] | None:
    """The commit of a store, or None while its job is unfinished.

    `objects` and `summary`, and `partitions` by modality and name (the default one is not among them).
    """
    try:
        content = json.loads((store / COMMIT).read_bytes())
        return {
            "objects": dict(content["objects"]),
            "summary": dict(content["summary"]),
            "partitions": {m: dict(named) for m, named in content.get("partitions", {}).items()},
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(
            f"{store / COMMIT}: not a commit; the store is damaged, preprocess into a new one"
        ) from None


def read_committed(store: Path, name: str, commit: dict[str, Any]) -> bytes:
    """An object that COMMIT.json names; IntegrityError if it is not the one committed."""
    return read_checked(store / name, commit["objects"][name]["sha256"])


def read_checked(path: Path, sha256: str) -> bytes:
    """An object's content; IntegrityError if it is lost or another one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = None
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        found = "is missing" if content is None else "differs from what was committed"
        raise IntegrityError(f"{path} {found}; the store is damaged, preprocess into a new one")
    return content


@contextmanager
def exclusive(store: Path) -> Iterator[None]:
    """Hold the store for writing; LockedError names the holder. A dead holder's lock is free."""
    path = store / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(
                f"{store} is being written by {file.read().strip() or 'another process'}; wait for "
                "it to end, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            # The file stays: removing it could hand two later holders two different files.
            file.truncate(0)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
