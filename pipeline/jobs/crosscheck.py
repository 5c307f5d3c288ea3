"""Whether the intact records of a store agree with each other: header, manifest, ledgers, arrays."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.settings.canonical import canonical_json, plain
from pipeline.storage.commit import Commit
from pipeline.storage.header import layouts_of
from pipeline.storage.layout import FORMAT_NAME, ROOT_METADATA, metadata_objects
from pipeline.storage.objects import Objects
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.store import Store

_COUNTED = ("num_valid", "num_cloud", "num_nodata")


def metadata_problems(objects: Objects, commit: Commit) -> Iterator[str]:
    """How the metadata that others read contradicts a commit, whose objects of it are intact."""
    attributes = json.loads(objects.read(ROOT_METADATA)).get("attributes", {})
    if canonical_json(attributes.get(FORMAT_NAME)) != canonical_json(plain(commit.header)):
        yield f"{ROOT_METADATA} has another header than the commit"
    layouts = layouts_of(commit.header).values()
    expected = metadata_objects(commit.header, layouts, commit.partitions).keys()
    for name in sorted(expected ^ commit.metadata.keys()):
        yield f"{name} is {'not named' if name in expected else 'named'}, but no array or group says so"


def manifest_problems(store: Store) -> Iterator[str]:
    """How the manifest contradicts ledgers and arrays. Raises IntegrityError where one cannot be read."""
    manifest = store.manifest
    if len(pc.unique(manifest["id"])) != len(manifest):
        yield "the manifest has several rows of one tile"
    if len(manifest) != store.commit.summary["tiles"]:
        yield f"the manifest has {len(manifest)} tiles, the commit {store.commit.summary['tiles']}"
    planned = pa.array(store.history.planned().keys(), pa.string())
    for modality in store.modalities:
        yield from _modality_problems(store, modality, planned)


def _modality_problems(store: Store, modality: str, planned: pa.Array) -> Iterator[str]:
    layout, table = store.layouts[modality], store.frame_table(modality)
    slots = table.slots
    if len(np.unique(slots)) != len(slots):
        yield f"{modality}: several tiles of the manifest share a frame"
    if len(slots) and (slots.min() < 0 or slots.max() >= layout.num_frames):
        yield f"{modality}: the manifest names frames beyond the last shard"
        return
    column = store.manifest[modality].combine_chunks()
    scenes = column.field("scene_ids").flatten().drop_null()
    if not pc.all(pc.is_in(scenes, planned)).as_py() and len(scenes):
        yield f"{modality}: the manifest names scenes that no ledger knows"
    pixels = layout.band_sets[0].tile_size_px ** 2
    there = column.field("frames").flatten().is_valid()
    for what in _COUNTED:
        fractions = column.field(f"{what.removeprefix('num_')}_fraction").flatten().filter(there)
        counted = store.per_frame(modality, what)[slots] / pixels
        if not np.array_equal(counted, fractions.to_numpy(zero_copy_only=False)):
            yield f"{modality}: the manifest and array {what} disagree"
    if layout.tokenized:
        yield from _token_problems(store, modality)


def _token_problems(store: Store, modality: str) -> Iterator[str]:
    """Sums over the frames of every tile."""
    table = store.frame_table(modality)
    column = store.manifest[modality].combine_chunks()
    for field, name in (
        ("base_cells", "num_cells"),
        ("tokens", f"partitions/{DEFAULT_PARTITION}/tokens"),
    ):
        per_frame = store.per_frame(modality, name)[table.slots].astype(np.int64)
        until = np.concatenate([np.zeros((1, *per_frame.shape[1:]), np.int64), per_frame.cumsum(0)])
        summed = until[table.starts[1:]] - until[table.starts[:-1]]
        found = column.field(field)
        stated = found.to_numpy() if field == "base_cells" else found.flatten().to_numpy()
        if not np.array_equal(summed.ravel(), stated):
            yield f"{modality}: the manifest's {field} and array {name} disagree"
    counts = store.per_frame(modality, f"partitions/{DEFAULT_PARTITION}/counts")[table.slots]
    tokens = store.per_frame(modality, f"partitions/{DEFAULT_PARTITION}/tokens")[table.slots]
    if (tokens.sum(axis=1) > counts).any():
        yield f"{modality}: a partition has more tokens than leaves"
