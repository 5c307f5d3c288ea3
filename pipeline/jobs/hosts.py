"""What workers on other hosts must have in common with this process: versions, and the files of a job."""

import asyncio
import contextlib
import functools
import importlib.metadata
import platform
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed import Client, get_worker

from pipeline.errors import StoreError

# What decides the bytes of a store, or whether tasks can be sent at all.
_COMPARED = ("aptile", "distributed", "numpy", "numba", "rasterio", "zarr", "numcodecs")
# Network file systems show a new file to other hosts only after their cached listing has aged.
_SEEN_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.5
_SHARE_IT = "give a path that all hosts share"


def check_workers(client: Client, store: str | None, reads: Sequence[str]) -> None:
    """Raise StoreError unless every worker has the versions of this process and sees its files.

    `store` is the folder that workers write to, `reads` are those they read from; URLs are not looked at.
    """
    paths = local_paths(reads)
    with _marked(store) as mark:
        answers = client.run(_seen_here, [*mark, *paths], _SEEN_WITHIN_S, on_error="return")
    here = _versions()
    problems = {
        worker: problem
        for worker, answer in sorted(answers.items())
        if (problem := _problem(answer, here, mark, store)) is not None
    }
    if problems:
        worker, problem = next(iter(problems.items()))
        more = f"; {len(problems) - 1} more workers differ" if len(problems) > 1 else ""
        raise StoreError(f"worker {worker} {problem}{more}")


def local_paths(locations: Sequence[str]) -> tuple[str, ...]:
    """Those that are no URLs, absolute."""
    return tuple(str(Path(path).absolute()) for path in locations if "://" not in path)


@functools.cache
def require_seen(paths: tuple[str, ...]) -> None:
    """Raise StoreError in a worker that does not see these, such as one that joined late; looks once."""
    for path in paths:
        if not Path(path).exists():
            raise StoreError(f"worker {get_worker().address} does not see {path}; {_SHARE_IT}")


def _problem(
    answer: Any, here: dict[str, str | None], mark: list[str], store: str | None
) -> str | None:
    """What is wrong with a worker that answered this; None for one that is as it should be or gone."""
    if isinstance(answer, ModuleNotFoundError):
        return f"has no {answer.name}; install the same aptile there"
    if isinstance(answer, Exception):
        return None if isinstance(answer, OSError) else f"cannot be used: {answer!r:.200}"
    versions, unseen = answer
    for name, version in here.items():
        if versions[name] != version:
            return f"has {name} {versions[name]}, here it is {version}; install the same on both"
    if not unseen:
        return None
    if unseen[0] in mark:
        return f"does not see {store} as it is here; {_SHARE_IT}"
    return f"does not see {unseen[0]}; {_SHARE_IT}"


async def _seen_here(paths: list[str], within_s: float) -> tuple[dict[str, str | None], list[str]]:
    """Versions in this process, and the paths that do not appear here."""
    for _ in range(round(within_s / _LOOK_EVERY_S)):
        if all(Path(path).exists() for path in paths):
            break
        await asyncio.sleep(_LOOK_EVERY_S)
    return _versions(), [path for path in paths if not Path(path).exists()]


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _COMPARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@contextlib.contextmanager
def _marked(store: str | None) -> Iterator[list[str]]:
    """A file of a new name in the store, to tell it from another one at the same path elsewhere."""
    if store is None or "://" in store:
        yield []
        return
    mark = Path(store).absolute() / f"{uuid.uuid4().hex}.partial"
    mark.touch()
    try:
        yield [str(mark)]
    finally:
        mark.unlink(missing_ok=True)
