"""The `zarr.json` files of a store, by which other Zarr readers know it."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.storage.header import layouts_of
from pipeline.storage.layout import metadata_objects
from pipeline.storage.objects import Objects


def write_metadata(
    objects: Objects, header: dict[str, Any], partitions: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Any]]:
    """Write every `zarr.json`, the root's last: what a commit names as `metadata`."""
    made = metadata_objects(header, layouts_of(header).values(), partitions)
    return {name: objects.write(name, content) for name, content in made.items()}
