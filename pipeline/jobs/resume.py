"""Whether a store may be written: free, or begun by the very same job."""

import os
import re
from pathlib import Path
from typing import Any

from pipeline.errors import ArchiveError, StoreError
from pipeline.locations import is_url
from pipeline.planning.inputs import Job
from pipeline.settings.canonical import plain
from pipeline.settings.config import DataConfig
from pipeline.storage.ledger import PLANNED, Ledger

# What becomes of s3://bucket/store as a path.
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")


def check_free(store: Path) -> None:
    """Raise StoreError unless a new store can be made at that path."""
    if _URL.match(str(store)):
        raise StoreError(
            f"{store} looks like a URL, but stores are made in local folders; give a path, and copy the "
            "finished store where you want it"
        )
    if store.absolute() == Path.cwd():
        raise StoreError(
            f"{store} is the current folder; give a name for the store, such as ./store"
        )
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file; give a path for a new store")
    if store.is_dir() and any(store.iterdir()):
        raise StoreError(
            f"{store} exists and is no aptile store (it holds {next(store.iterdir()).name!r}); give a "
            "new path or an empty folder"
        )
    above = next(folder for folder in [store, *store.parents] if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(f"{store}: cannot create a store in {above}; give a path you may write to")


def check_apart(store: Path, job: Job) -> None:
    """Raise StoreError for a store inside a Zarr dataset that is its archive, which it would change."""
    scenes = (scene for modality in job.plan.modalities.values() for scene in modality.scenes)
    arrays = {a.href for scene in scenes for a in scene.assets if a.kind == "array"}
    for href in sorted(arrays):
        if not is_url(href) and store.resolve().is_relative_to(Path(href).resolve()):
            raise StoreError(
                f"{store} lies inside the dataset {href} that is read; give a path outside it"
            )


def check_same_config(store: Path, header: dict[str, Any], config: DataConfig) -> None:
    """Raise StoreError, which names a key, if a store was made with another configuration."""
    if header["config_digest"] != config.digest():
        was, now = header["config"], plain(config.model_dump())
        raise StoreError(
            f"{store} was made with another configuration: {_first_difference(was, now)}; use that "
            "configuration, or give a new store path"
        )


def check_same_files(store: Path, found: dict[tuple[str, str], str]) -> None:
    """Raise ArchiveError if the archive's files are not those a store was begun with."""
    planned = Ledger.read(store).fingerprints()
    if planned != found:
        differing = [key for key in sorted(planned | found) if planned.get(key) != found.get(key)]
        example = differing[0]
        change = (
            "is new"
            if example not in planned
            else "is gone"
            if example not in found
            else "was changed"
        )
        raise ArchiveError(
            f"the archive is not the one {store} was begun with: {len(differing)} of its files differ, "
            f"{example[1]} {change}; restore it, or preprocess into a new store path"
        )


def check_same_choice(store: Path, job: Job) -> None:
    """The frames' slots follow from which scenes are in, so the rest of a job needs the same ones."""
    before = {
        row["scene"]: row["reason"] for row in Ledger.read(store).scenes if row["status"] != PLANNED
    }
    now = {**job.skipped, **job.refused}
    differing = sorted(before.keys() ^ now.keys())
    if differing:
        name = differing[0]
        raise ArchiveError(
            f"{store} was begun with another choice of scenes: {name}: {before.get(name, 'accepted')} "
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
