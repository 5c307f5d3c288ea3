"""How much room on a disk the rest of a job takes, judged by the shards that are done."""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.errors import NoSpaceError
from pipeline.storage.layout import ArraySpec
from pipeline.storage.objects import LocalObjects, Objects

# Lossless codecs seldom make imagery smaller than this part of itself.
_LEAST_PART = 1 / 8
# Shown on stderr unless a program sets up logging of its own.
_log = logging.getLogger("aptile")


def warn_if_short(
    objects: Objects, done: Iterable[dict[str, Any]], num_left: int, arrays: Iterable[ArraySpec]
) -> None:
    """Say so before the work if a local disk has less room than the shards that are left need.

    `done` are ledger rows of finished shards, `arrays` are written for every shard. The job goes on as far
    as it gets, since all that is done stays done.
    """
    if not num_left or not isinstance(objects, LocalObjects):
        return
    free, shard = shutil.disk_usage(objects.folder).free, _mean_bytes(done)
    need = num_left * (shard if shard is not None else _LEAST_PART * _plain_bytes(arrays))
    if free < need:
        _log.warning(
            "%s: %s free, but the %d shards that are left will need about %s%s",
            objects.location,
            in_units(free),
            num_left,
            in_units(need),
            "" if shard is not None else " or more",
        )


@contextlib.contextmanager
def telling_space(
    rows: Callable[[], Iterable[dict[str, Any]]], num_shards: int, arrays: Iterable[ArraySpec]
) -> Iterator[None]:
    """Adds what the rest of the job needs to the error of a full disk.

    `rows` gives the ledger rows of the shards done by then, out of `num_shards`.
    """
    try:
        yield
    except NoSpaceError as error:
        done = list(rows())
        left, shard = num_shards - len(done), _mean_bytes(done)
        if not left:
            rest = "all shards are written, only a few small objects are left"
        elif shard is None:
            need = in_units(left * _plain_bytes(arrays))
            rest = f"the {left} shards that are left need {need} uncompressed, mostly much less"
        else:
            rest = f"about {in_units(left * shard)} more are needed for the {left} shards that are left"
        raise NoSpaceError(f"{error} ({rest})") from None


def _mean_bytes(rows: Iterable[dict[str, Any]]) -> float | None:
    """Bytes of a shard's objects on average; None where no shard is done."""
    sizes = [sum(written["bytes"] for written in row["objects"].values()) for row in rows]
    return sum(sizes) / len(sizes) if sizes else None


def _plain_bytes(arrays: Iterable[ArraySpec]) -> int:
    """Bytes of a shard as it is in memory."""
    return sum(math.prod(spec.shard) * np.dtype(spec.dtype).itemsize for spec in arrays)


def in_units(number: float) -> str:
    """Bytes as people say them, such as 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"
