"""What verification found, kept until it is repaired, and how damaged objects are made again.

An object is replaced only by the very bytes that were committed; nothing else is touched.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.storage.objects import Contents, Objects, Writer, entry, objects_at

# Names of damaged objects, for whoever repairs the store; no commit names it, readers do not look.
DAMAGED = "damaged.json"


def remembered(objects: Objects) -> frozenset[str]:
    """Names that were found damaged; untrusted, so each is looked at again before it is believed."""
    try:
        names = json.loads(objects.read(DAMAGED))["objects"]
        return frozenset(name for name in names if isinstance(name, str))
    except FileNotFoundError:
        return frozenset()
    except (ValueError, KeyError, TypeError):
        return frozenset()


def remember(objects: Objects, names: Iterable[str]) -> None:
    """Keep these names and no others; without any, no trace is left."""
    names = sorted(names)
    if names:
        objects.write(DAMAGED, json.dumps({"objects": names}, indent=1).encode() + b"\n")
    elif objects.size(DAMAGED) is not None:
        objects.remove([DAMAGED])


@dataclass(frozen=True)
class Repaired:
    """So many objects were written anew, those of arrays in so many shards; `left` are still damaged."""

    objects: int = 0
    shards: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Remade:
    """A place to write the objects of a shard that is made again.

    Of them, only those in `wanted` (`bytes` and `sha256` by name) are written.
    """

    objects: Objects
    wanted: Mapping[str, dict[str, Any]]

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        """As of `Objects`. Raises IntegrityError where the bytes are not those that were committed."""
        return self.write_all({name: [content]})[name]

    def write_all(self, contents: Contents) -> dict[str, dict[str, Any]]:
        """As `write`; nothing is written if any of the objects differs."""
        made = {name: entry(b"".join(pieces)) for name, pieces in contents.items()}
        wanted = {name: pieces for name, pieces in contents.items() if name in self.wanted}
        for name in wanted:
            if made[name] != self.wanted[name]:
                raise IntegrityError(differs(self.objects.location, name))
        self.objects.write_all(wanted)
        return made


def writer(location: str, wanted: Mapping[str, dict[str, Any]] | None) -> Writer:
    """Where a shard's objects go: all of them, or of a damaged one those `wanted`."""
    objects = objects_at(location)
    return objects if wanted is None else Remade(objects, wanted)


def differs(location: str, name: str) -> str:
    """What is said where something made again is not what was committed."""
    return (
        f"{location}/{name}: made again it differs from what was committed: the archive or a library "
        "changed; it was not replaced, preprocess into a new store"
    )
