"""What a dataset is asked for, checked against the store: modalities, band sets, tiles, labels, format."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.data.frames import DateTable, LabelReader, ModalityReader, PixelFormat, band_ranges
from pipeline.errors import ConfigError
from pipeline.settings.canonical import canonical_json
from pipeline.storage.layout import BandSet, StoreLayout
from pipeline.storage.objects import Location
from pipeline.storage.partitions import DEFAULT_PARTITION
from pipeline.store import Store, open_store

ModalityChoice = str | Iterable[str] | Mapping[str, Iterable[str] | None] | None
LabelChoice = str | Iterable[str] | Mapping[str, Any] | None
DTYPES = ("float16", "float32")
# float16 holds whole numbers exactly up to 2048.
_EXACT_IN_FLOAT16 = ("uint8", "int8")


def opened(store: Store | Location, commit: int | None) -> Store:
    """The store at a path or URL, or the one that is open; ConfigError if that is of another commit."""
    if not isinstance(store, Store):
        return open_store(store, commit)
    if commit is not None and commit != store.commit.number:
        raise ConfigError(
            f"commit is {commit}, but the store that was given is open at commit {store.commit.number}; "
            "give its path, or leave commit out"
        )
    return store


def band_sets_of(store: Store, choice: ModalityChoice) -> dict[str, tuple[BandSet, ...]]:
    """The band sets to read of every modality, in the order given; all that have tokens without a choice.

    Raises ConfigError for names that are not there, or twice.
    """
    match choice:
        case None:
            wanted: list[tuple[str, Iterable[str] | None]] = [(m, None) for m in store.tokenized]
        case str():
            wanted = [(choice, None)]
        case Mapping():
            wanted = list(choice.items())
        case _:
            wanted = [(name, None) for name in choice]
    if not wanted:
        raise ConfigError(
            f"modalities is empty; give some of {', '.join(store.tokenized)}, or leave it out for all"
        )
    names = [name for name, _ in wanted]
    _check_no_repeats("modalities", names)
    for name in names:
        _check_tokenized(store, name)
    return {name: _band_sets(store.layouts[name], sets) for name, sets in wanted}


def readers_of(
    store: Store, sets: Mapping[str, tuple[BandSet, ...]], partition: str, pixels: PixelFormat
) -> list[ModalityReader]:
    """A reader for each modality; StoreError or ConfigError where it cannot be read as asked."""
    dates = DateTable.of(store.manifest)
    readers = []
    for name, band_sets in sets.items():
        store.check_partition(name, partition)
        layout, entry = store.layouts[name], store.header["modalities"][name]
        ranges = band_ranges(layout, entry["value_range"])
        _check_format(name, band_sets, pixels, ranges)
        readers.append(
            ModalityReader(
                layout=layout,
                band_sets=band_sets,
                partition=partition,
                frames=store.frame_table(name),
                dates=None if entry["static"] else dates,
                ranges=ranges,
                format=pixels,
            )
        )
    return readers


def pixel_format(normalize: str | None, dtype: str | None) -> PixelFormat:
    """The format asked for; ConfigError if there is none of that name."""
    if normalize not in (None, "value_range"):
        raise ConfigError(f"normalize is {normalize!r}; it must be 'value_range' or None")
    if dtype not in (None, *DTYPES):
        raise ConfigError(
            f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or None for the store's own"
        )
    return PixelFormat(normalize is not None, dtype)


def checked_limit(limit: int | None) -> int | None:
    """A limit on a tile's tokens; ConfigError if it would leave none."""
    if limit is not None and limit < 1:
        raise ConfigError(f"max_tokens_per_tile is {limit}; it must be at least 1")
    return limit


def rows_of_split(store: Store, split: str | Sequence[str] | None) -> np.ndarray:
    """int64 [tile]: rows of the manifest in some splits, all without one; ConfigError if one is empty."""
    if split is None:
        return np.arange(len(store.manifest))
    wanted = [split] if isinstance(split, str) else list(split)
    _check_no_repeats("split", wanted)
    column = store.manifest["split"]
    known = sorted(name for name in pc.unique(column).to_pylist() if name is not None)
    absent = [name for name in wanted if name not in known]
    if absent or not wanted:
        there = f"its splits are {', '.join(known)}" if known else "its tiles are in no split"
        raise ConfigError(
            f"{store.location}: no tile is in split {', '.join(map(repr, absent or wanted))}; {there}"
        )
    within = pc.is_in(column, value_set=pa.array(wanted, column.type))
    return np.flatnonzero(within.to_numpy())


def labels_of(
    store: Store, choice: LabelChoice, num_tiles: int
) -> tuple[dict[str, LabelReader], dict[str, np.ndarray]]:
    """Readers of label rasters, and labels given per tile, by name."""
    if choice is None:
        return {}, {}
    if isinstance(choice, str):
        choice = [choice]
    given = dict(choice) if isinstance(choice, Mapping) else {}
    rasters = [name for name in choice if given.get(name) is None]
    _check_no_repeats("labels", rasters)
    if not given and not rasters:
        raise ConfigError("labels is empty; leave it out for a batch without labels")
    readers = {name: _label_reader(store, name) for name in rasters}
    arrays = {
        name: _label_array(name, labels, num_tiles)
        for name, labels in given.items()
        if labels is not None
    }
    return readers, arrays


def fingerprint(
    store: Store,
    partition: str,
    modalities: Mapping[str, Sequence[str]],
    split: str | Sequence[str] | None,
    limit: int | None,
    pixels: PixelFormat,
    augment: Any,
    label_rasters: Sequence[str],
) -> str:
    """sha256 of a commit's digests and a dataset's settings."""
    commit = store.commit
    ledgers = {
        name: [what["sha256"] for what in commit.partitions[name][partition]["ledgers"]]
        for name in modalities
        if partition != DEFAULT_PARTITION
    }
    facts = {
        "manifest": commit.manifest["sha256"],
        "batches": [batch.ledger["sha256"] for batch in commit.batches],
        "partition": partition,
        "partition_ledgers": ledgers,
        "modalities": [[name, list(sets)] for name, sets in modalities.items()],
        "split": [split] if isinstance(split, str) else split and list(split),
        "max_tokens_per_tile": limit,
        "normalize": pixels.normalize,
        "dtype": pixels.dtype,
        "augment": None if augment is None else augment.model_dump(),
        "label_rasters": list(label_rasters),
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def _check_no_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{what} names {', '.join(repeated)} more than once; name each once")


def _check_tokenized(store: Store, name: str) -> None:
    if name in store.tokenized:
        return
    if name in store.modalities:
        raise ConfigError(
            f"modality {name!r} of {store.location} is a label raster, it has no tokens; give it as "
            f"labels=[{name!r}]"
        )
    raise ConfigError(
        f"{store.location} has no modality {name!r} with tokens; it has {', '.join(store.tokenized)}"
    )


def _band_sets(layout: StoreLayout, wanted: Iterable[str] | None) -> tuple[BandSet, ...]:
    if wanted is None:
        return layout.band_sets
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    known = {s.name: s for s in layout.band_sets}
    _check_no_repeats(f"modality {layout.modality}", [repr(name) for name in names])
    absent = [name for name in names if name not in known]
    if absent or not names:
        raise ConfigError(
            f"modality {layout.modality} has no band set {', '.join(map(repr, absent)) or 'in []'}; it has "
            f"{', '.join(map(repr, known))} ('' is the first)"
        )
    return tuple(known[name] for name in names)


def _check_format(
    name: str, band_sets: Sequence[BandSet], pixels: PixelFormat, ranges: Mapping[str, np.ndarray]
) -> None:
    if pixels.normalize and not ranges:
        raise ConfigError(
            f"normalize='value_range': the store has no value range of every band of modality {name}; "
            "leave normalize out"
        )
    for band_set in band_sets:
        if pixels.normalize and not (np.diff(ranges[band_set.name]) > 0).all():
            raise ConfigError(
                f"normalize='value_range': a value range of modality {name} is empty in float32; "
                "leave normalize out"
            )
        if pixels.dtype == "float16" and not pixels.normalize:
            _check_float16(name, band_set)


def _check_float16(name: str, band_set: BandSet) -> None:
    if band_set.dtype not in _EXACT_IN_FLOAT16:
        raise ConfigError(
            f"dtype='float16' would round or overflow the {band_set.dtype} pixels of modality {name}; give "
            "normalize='value_range' too, or dtype='float32'"
        )


def _label_reader(store: Store, name: str) -> LabelReader:
    rasters = [m for m in store.modalities if m not in store.tokenized]
    if name not in rasters:
        there = f"it has {', '.join(rasters)}" if rasters else "it has none"
        raise ConfigError(f"{store.location} has no label raster {name!r}; {there}")
    entry = store.header["modalities"][name]
    return LabelReader(
        store.layouts[name], store.frame_table(name), entry["ignore_index"], entry["static"]
    )


def _label_array(name: str, labels: Any, num_tiles: int) -> np.ndarray:
    array = np.ascontiguousarray(labels)
    if array.dtype.kind not in "biuf":
        raise ConfigError(
            f"labels[{name!r}] holds {array.dtype}; give numbers, one entry per tile of the dataset"
        )
    if array.ndim == 0 or len(array) != num_tiles:
        found = len(array) if array.ndim else "one number"
        raise ConfigError(
            f"labels[{name!r}] has {found} where the dataset has {num_tiles} tiles; give one entry per "
            "tile, in the order of dataset.tile_ids"
        )
    return array
