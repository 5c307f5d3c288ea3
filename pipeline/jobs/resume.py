"""Whether a store may be written: free, or begun by the very same job."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ArchiveError, StoreError
from pipeline.locations import is_url
from pipeline.planning.inputs import Job
from pipeline.settings.canonical import plain
from pipeline.settings.config import DataConfig
from pipeline.storage.commit import Commit, read_commit
from pipeline.storage.header import check_version, read_header
from pipeline.storage.history import History, read_history
from pipeline.storage.layout import ROOT_METADATA
from pipeline.storage.ledger import PLANNED, Ledger
from pipeline.storage.lock import LOCK
from pipeline.storage.objects import LocalObjects, Location, Objects, objects_at

Files = dict[tuple[str, str], str]
# What there can be before a store's root metadata, which is written last, says that it is one; or when all
# of it is being removed, the root metadata first.
_LEFT = re.compile(
    rf"{re.escape(LOCK)}|ledger/000001\.jsonl|(?:[^/]+/)+zarr\.json|(?:[^/]+/)+c(?:/\d+)+"
)


@dataclass(frozen=True)
class State:
    """What is at a location: the header, the newest commit with its batches, and the batch under way.

    `header` is None where there is no store, `commit` while none was made.
    """

    header: dict[str, Any] | None
    commit: Commit | None
    history: History
    under_way: Ledger | None

    @classmethod
    def read(cls, objects: Objects) -> "State":
        """The state of a store; IntegrityError where what a commit names is damaged."""
        header, commit = read_header(objects), read_commit(objects)
        if commit is None:
            under_way = None if header is None else Ledger.read(objects, 1)
            return cls(header, None, History(()), under_way)
        check_version(objects.location, commit.header)
        history = read_history(objects, commit)
        under_way = Ledger.read(objects, len(commit.batches) + 1)
        return cls(commit.header, commit, history, under_way)


def check_free(location: Location, begun: bool = True) -> None:
    """Raise StoreError unless a new store can be made at that location.

    With `begun`, one that another process seems to be beginning passes: its lock decides.
    """
    if isinstance(location, str) and is_url(location):
        _refuse_others(location, objects_at(location), begun)
        return
    store = Path(location)
    if store.absolute() == Path.cwd():
        raise StoreError(
            f"{store} is the current folder; give a name for the store, such as ./store"
        )
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file; give a path for a new store")
    if store.is_dir():
        _refuse_others(str(store), LocalObjects(store), begun)
    above = next(folder for folder in [store, *store.parents] if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(f"{store}: cannot create a store in {above}; give a path you may write to")


def _refuse_others(location: str, objects: Objects, begun: bool) -> None:
    """Raise StoreError where there is anything but what a killed attempt to begin a store leaves."""
    found = sorted(objects.names())
    if begun and LOCK in found and ROOT_METADATA in found:
        return
    if any(not _LEFT.fullmatch(name) for name in found) or (found and LOCK not in found):
        raise StoreError(
            f"{location} exists and is no aptile store (it holds {found[0].split('/')[0]!r}); give a new "
            "path or an empty folder"
        )


def check_apart(location: Location, job: Job) -> None:
    """Raise StoreError for a store inside a Zarr dataset that is its archive, which it would change."""
    if isinstance(location, str) and is_url(location):
        return
    store = Path(location)
    scenes = (scene for modality in job.plan.modalities.values() for scene in modality.scenes)
    arrays = {a.href for scene in scenes for a in scene.assets if a.kind == "array"}
    for href in sorted(arrays):
        if not is_url(href) and store.resolve().is_relative_to(Path(href).resolve()):
            raise StoreError(
                f"{store} lies inside the dataset {href} that is read; give a path outside it"
            )


def check_same_config(location: str, header: dict[str, Any], config: DataConfig) -> None:
    """Raise StoreError, which names a key, if a store was made with another configuration."""
    if header["config_digest"] != config.digest():
        was, now = header["config"], plain(config.model_dump())
        raise StoreError(
            f"{location} was made with another configuration: {_first_difference(was, now)}; use that "
            "configuration, or give a new store path"
        )


def check_same_files(location: str, history: History, found: Files) -> None:
    """Raise ArchiveError if the archive's files are not those of the store.

    A batch that was made from another archive has none of its files in this one.
    """
    known = history.fingerprints()
    of_batches = [ledger.fingerprints() for ledger in history.ledgers]
    here = [own for own in of_batches if own.keys() & found.keys()] or of_batches[:1]
    _compare(location, {key: known[key] for own in here for key in own}, found)


def check_same_batch(location: str, ledger: Ledger, history: History, found: Files) -> None:
    """Raise ArchiveError if the archive's files changed since the batch under way was planned."""
    _compare(location, ledger.fingerprints(), new_files(history, found))


def new_files(history: History, found: Files) -> Files:
    """Files that no batch knows as they are now."""
    known = history.fingerprints()
    return {key: f for key, f in found.items() if known.get(key) != f}


def _compare(location: str, planned: Files, found: Files) -> None:
    if planned == found:
        return
    differing = [key for key in sorted(planned | found) if planned.get(key) != found.get(key)]
    example = differing[0]
    change = (
        "is new" if example not in planned else "is gone" if example not in found else "was changed"
    )
    advice = "restore it, or preprocess into a new store path"
    if planned.items() <= found.items():
        advice = "add --append to take in what is new, or preprocess into a new store path"
    raise ArchiveError(
        f"the archive is not the one {location} was begun with: {len(differing)} of its files differ, "
        f"{example[1]} {change}; {advice}"
    )


def check_unchanged(job: Job, history: History) -> None:
    """Raise ArchiveError where a file of a scene that is in the store is another one now."""
    known = history.fingerprints()
    for key, fingerprint in job.files.items():
        if key in known and known[key] != fingerprint and key[1] in job.scene_files:
            raise ArchiveError(
                f"{key[1]} is in the store, and was changed since; restore it, or preprocess the whole "
                "archive into a new store path"
            )


def check_same_choice(location: str, ledger: Ledger, job: Job) -> None:
    """The frames' slots follow from which scenes are in, so the rest of a job needs the same ones."""
    before = {row["scene"]: row["reason"] for row in ledger.scenes if row["status"] != PLANNED}
    now = {**job.skipped, **job.refused}
    differing = sorted(before.keys() ^ now.keys())
    if differing:
        name = differing[0]
        raise ArchiveError(
            f"{location} was begun with another choice of scenes: {name}: {before.get(name, 'accepted')} "
            f"then, {now.get(name, 'accepted')} now; use the same run settings, or preprocess into a new "
            "store path"
        )


def _first_difference(was: Any, now: Any, key: str = "") -> str:
    if isinstance(was, dict) != isinstance(now, dict):
        stated = {True: "given", False: "not given"}
        return f"{key} is {stated[was is not None]} there and {stated[now is not None]} now"
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                path = f"{key}.{name}" if key else name
                return _first_difference(was.get(name), now.get(name), path)
    return f"{key} is {was} there and {now} now"
