"""stac-geoparquet tables: rows as STAC items, a few columns and a few thousand rows at a time.

Follows the stac-geoparquet specification: one row per item, properties as columns of their own, assets
as one struct of structs. Rows become dicts as JSON has them, so that `pipeline.sources.stac_items` treats
every form of catalogue alike.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ArchiveError, SceneError
from pipeline.fetch.files import open_file
from pipeline.readers.gates import refuse_wide_rows
from pipeline.scenes import Access
from pipeline.sources.stac_facts import (
    BAND_FIELDS,
    BAND_LISTS,
    FILE_FIELDS,
    SHARED_FIELDS,
    stated_bands,
)
from pipeline.sources.stac_grids import GRID_FIELDS
from pipeline.sources.stac_items import PROPERTY_FIELDS

BATCH_ROWS = 2000
_ASSET_FIELDS = (*FILE_FIELDS, *GRID_FIELDS, *SHARED_FIELDS)


def parquet_items(location: str, access: Access) -> Iterator[dict[str, Any]]:
    """Every row as an item with `id`, `properties` and `assets`; only what a scene needs of them.

    Raises ArchiveError for a file that is no such table. The caller has checked that it may be opened.
    """
    try:
        with open_file(location, access) as source:
            table = pq.ParquetFile(source)
            columns = _columns(location, table)
            refuse_wide_rows(table.metadata, set(columns), BATCH_ROWS, access.max_block_bytes)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield from _items(batch)
    except (ImportError, ArchiveError):
        raise
    except SceneError as error:
        raise ArchiveError(f"{location} {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArchiveError(f"{location} cannot be read as stac-geoparquet: {reason}") from None


def _columns(location: str, table: Any) -> list[str]:
    """Dotted paths of the columns that matter. Raises ArchiveError where a table has no items."""
    schema = table.schema_arrow
    for name, expected, fits in (
        ("id", "text", pa.types.is_string),
        ("assets", "one struct of assets", pa.types.is_struct),
    ):
        index = schema.get_field_index(name)
        kind = None if index < 0 else _storage(schema.field(index).type)
        if kind is None or not (fits(kind) or (name == "id" and pa.types.is_large_string(kind))):
            found = "is missing" if kind is None else f"is {str(kind)[:60]}"
            raise ArchiveError(
                f"{location}: column {name!r} {found}; expected {expected}, as stac-geoparquet has it"
            )
    keys = [field.name for field in _storage(schema.field("assets").type)]
    wanted = {f"assets.{key}.{field}" for key in keys for field in (*_ASSET_FIELDS, *BAND_LISTS)}
    paths = [table.schema.column(number).path for number in range(len(table.schema))]
    return [path for path in paths if _matters(path, wanted)]


def _matters(path: str, wanted: set[str]) -> bool:
    if path == "id" or path.split(".")[0] in PROPERTY_FIELDS:
        return True
    if path in wanted:
        return True
    # Below an asset's field: parts of a list or object, of which bands have very many.
    parts = path.split(".")
    inside = next((n for n in range(len(parts) - 1, 2, -1) if ".".join(parts[:n]) in wanted), None)
    if inside is None:
        return False
    return parts[inside - 1] not in BAND_LISTS or parts[-1] in BAND_FIELDS


def _items(batch: Any) -> Iterator[dict[str, Any]]:
    columns = {
        field.name: _assets(batch.column(index))
        if field.name == "assets"
        else _values(batch.column(index))
        for index, field in enumerate(batch.schema)
    }
    ids, assets = columns.pop("id"), columns.pop("assets", [{}] * batch.num_rows)
    names = tuple(columns)
    rows = zip(*columns.values(), strict=True) if columns else [()] * batch.num_rows
    for name, held, row in zip(ids, assets, rows, strict=True):
        yield {"id": name, "properties": dict(zip(names, row, strict=True)), "assets": held}


def _assets(array: Any) -> list[dict[str, Any]]:
    """Per row the assets by key, those that it has: a table has a column for each that any row has."""
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    rows: list[dict[str, Any]] = [{} for _ in range(len(array))]
    for field, column in zip(array.type, array.flatten(), strict=True):
        for row, asset in zip(rows, _one_asset(column), strict=True):
            if _is_there(asset):
                row[field.name] = asset
    return rows


def _one_asset(column: Any) -> list[Any]:
    """An asset of every row. Rows whose bands are alike, as most are, share one list of them."""
    if not pa.types.is_struct(column.type):
        return _values(column)
    fields = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
    described = [name for name in fields if name in (*BAND_LISTS, *SHARED_FIELDS)]
    plain = {name: _values(fields[name]) for name in fields if name not in described}
    if described:
        bands = pa.StructArray.from_arrays([fields[name] for name in described], described)
        first, group = np.unique(_codes(bands), return_index=True, return_inverse=True)[1:]
        lists = [stated_bands(asset) for asset in _values(bands.take(pa.array(first)))]
        plain["bands"] = [lists[number] for number in group.tolist()]
    names = tuple(plain)
    return [dict(zip(names, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def _codes(array: Any) -> np.ndarray:
    """int64 [row]: rows of equal values, and only those, have equal codes."""
    if isinstance(array, pa.ExtensionArray):
        return _codes(array.storage)
    codes = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            codes = _joined(codes, _codes(child))
        return codes
    if not _is_list(array.type):
        return _joined(codes, _code_of_value(array))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
    inner, codes = _codes(array.flatten()), _joined(codes, lengths)
    begin = np.cumsum(lengths) - lengths
    for position in range(int(lengths.max(initial=0))):
        inside = position < lengths
        codes = _joined(codes, np.where(inside, inner[np.where(inside, begin + position, 0)], -1))
    return codes


def _code_of_value(array: Any) -> np.ndarray:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    codes = array.dictionary_encode(null_encoding="encode").indices
    return codes.to_numpy(zero_copy_only=False).astype(np.int64)


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Codes that are equal where both are; they stay small, so that they never overflow."""
    pairs = (one - one.min(initial=0)) * (np.ptp(other) + 1 if len(other) else 1) + other
    return np.unique(pairs, return_inverse=True)[1].astype(np.int64)


def _is_there(asset: Any) -> bool:
    """A table has a column for every asset that any item has."""
    return isinstance(asset, dict) and asset.get("href") is not None


def _values(array: Any) -> list[Any]:
    """The values as JSON has them; times as ISO 8601 text in UTC.

    Column by column, which is several times faster than pyarrow's own conversion row by row.
    """
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _values(array.storage)
    if pa.types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if pa.types.is_struct(kind):
        names = tuple(field.name for field in kind)
        rows = zip(*map(_values, array.flatten()), strict=True) if names else [()] * len(array)
        return _with_nulls(array, [dict(zip(names, row, strict=True)) for row in rows])
    if _is_list(kind):
        flat, begin, lists = _values(array.flatten()), 0, []
        for length in pc.fill_null(pc.list_value_length(array), 0).to_pylist():
            lists.append(flat[begin : begin + length])
            begin += length
        return _with_nulls(array, lists)
    if pa.types.is_timestamp(kind):
        # Without its zone, which is for show, a time is in UTC.
        return list(array.cast(pa.timestamp("us"), safe=False).cast(pa.string()).to_pylist())
    return list(array.to_pylist())


def _with_nulls(array: Any, values: list[Any]) -> list[Any]:
    if not array.null_count:
        return values
    valid = array.is_valid().to_pylist()
    return [value if there else None for value, there in zip(values, valid, strict=True)]


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _storage(kind: Any) -> Any:
    return getattr(kind, "storage_type", kind)
