"""Stores made of arrays, without a job: committed, with a ledger, but without a manifest."""

from pathlib import Path

import numpy as np

from pipeline.storage.commit import PREPROCESS, Batch, Commit, named
from pipeline.storage.header import modality_header
from pipeline.storage.layout import FORMAT_VERSION, StoreLayout
from pipeline.storage.ledger import Ledger
from pipeline.storage.objects import LocalObjects, entry, objects_at
from pipeline.storage.sharding import encoders, write_shard
from pipeline.store import Store

FACTS = {
    "value_range": [],
    "statistics": None,
    "ground_sample_distance_m": None,
    "scale": None,
    "offset": None,
    "wavelengths_nm": None,
    "kind": "image",
    "static": False,
    "ignore_index": None,
}


def make_store(location: str | Path, layout: StoreLayout, blocks: dict[str, np.ndarray]) -> Store:
    """A store whose arrays lead with these values, those of each shard [shard, ...]."""
    objects, rows = objects_at(location), {}
    for shard in range(layout.num_shards):
        encoded = encoders(layout.arrays(), layout.codec)
        for name, block in blocks.items():
            encoded[name].put_leading(block[shard])
        rows[shard] = write_shard(objects, shard, encoded)
    return committed(objects, layout, rows)


def committed(objects, layout: StoreLayout, named_objects: dict[int, dict]) -> Store:
    """A store of these shards' objects, as the ledger names them."""
    rows = {shard: {"shard": shard, "objects": objects} for shard, objects in named_objects.items()}
    head = {"batch": 1, "first_shard": 0, "num_shards": layout.num_shards}
    ledger = Ledger(head, shards=rows)
    ledger.create(objects)
    modalities = {layout.modality: modality_header(layout, FACTS)}
    header = {"format_version": FORMAT_VERSION, "config": {}, "modalities": modalities}
    what = named("ledger/000001.jsonl", ledger.canonical())
    batch = Batch(1, 0, layout.num_shards, what)
    return Store(objects, header, Commit(1, PREPROCESS, None, header, {}, (batch,), {}, {}))


def forged(store: Store, path: str, content: bytes) -> Store:
    """The store with another object, whose ledger row says that it is as it should be."""
    assert isinstance(store.objects, LocalObjects)
    (store.objects.folder / path).write_bytes(content)
    rows = {n: dict(row["objects"]) for n, row in store.history.shards.items()}
    for named_objects in rows.values():
        if path in named_objects:
            named_objects[path] = entry(content)
    return committed(store.objects, next(iter(store.layouts.values())), rows)
