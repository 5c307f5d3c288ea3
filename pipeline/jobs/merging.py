"""The manifest of a store and that of further scenes as one: tiles of both get the timesteps of both."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Fields of a modality that are one number per tile: sums over its frames.
_SUMS = ("base_cells", "tokens")


def merged_manifest(old: pa.Table, new: pa.Table, static: frozenset[str]) -> pa.Table:
    """Rows of `old`, then tiles that only `new` has; columns as in `pipeline.jobs.manifest`.

    A tile of both keeps its row's facts. Where both have an entry for a date, the one with a frame counts.
    `static` names the modalities with one entry per tile.
    """
    if not len(old) or not len(new):
        return new if not len(old) else old
    # Parquet has no timestamps in whole seconds.
    old, new = old.cast(new.schema).combine_chunks(), new.combine_chunks()
    at_old = pc.index_in(new["id"], old["id"].combine_chunks()).combine_chunks()
    known = at_old.is_valid().to_numpy(zero_copy_only=False)
    rows = np.empty(len(new), np.int64)
    rows[known] = at_old.drop_null().to_numpy()
    rows[~known] = len(old) + np.arange(np.count_nonzero(~known))
    both = _Both(old, new, rows)
    columns = {}
    for name in old.column_names:
        kind = old.schema.field(name).type
        if name == "datetimes":
            columns[name] = both.entries(lambda table: table["datetimes"].combine_chunks())
        elif pa.types.is_struct(kind):
            columns[name] = _modality(both, name, name in static)
        else:
            columns[name] = pc.take(
                pa.chunked_array([*old[name].chunks, *new[name].chunks]), pa.array(both.leading)
            )
    return pa.table(columns)


class _Both:
    """Two tables below one another; `rows` int64 says which row of the result each one of `new` becomes."""

    def __init__(self, old: pa.Table, new: pa.Table, rows: np.ndarray) -> None:
        self.tables = (old, new)
        self.row_of = (np.arange(len(old)), rows)
        self.num_rows = max(len(old), int(rows.max(initial=-1)) + 1)
        # int64 [row]: where, counted through both tables, the row comes from that gives its facts.
        self.leading = np.empty(self.num_rows, np.int64)
        self.leading[rows] = len(old) + np.arange(len(new))
        self.leading[: len(old)] = np.arange(len(old))

    def entries(
        self,
        column: Callable[[pa.Table], pa.ListArray],
        present: Callable[[pa.Table], np.ndarray] | None = None,
        dated: bool = True,
    ) -> pa.ListArray:
        """Lists with one entry per date, in order of time (one in all unless `dated`).

        `present` bool [entry] says whose entry counts where both have one.
        """
        lists = [column(table) for table in self.tables]
        lengths = [pc.list_value_length(part).to_numpy() for part in lists]
        row = np.concatenate([np.repeat(at, n) for at, n in zip(self.row_of, lengths, strict=True)])
        when = np.zeros(len(row), np.int64)
        if dated:
            when = np.concatenate([_seconds(table) for table in self.tables])
        absent = np.zeros(len(row), np.bool_)
        if present is not None:
            absent = ~np.concatenate([present(table) for table in self.tables])
        order = np.lexsort((absent, when, row))
        first = np.ones(len(order), np.bool_)
        first[1:] = (np.diff(row[order]) != 0) | (np.diff(when[order]) != 0)
        chosen = order[first]
        values = pa.concat_arrays([part.flatten() for part in lists]).take(pa.array(chosen))
        ends = np.cumsum(np.bincount(row[chosen], minlength=self.num_rows))
        starts = np.concatenate([[0], ends]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(starts), values)


def _modality(both: _Both, name: str, is_static: bool) -> pa.StructArray:
    def part(field: str) -> Callable[[pa.Table], pa.Array]:
        return lambda table: table[name].combine_chunks().field(field)

    def present(table: pa.Table) -> np.ndarray:
        frames = part("frames")(table).flatten()
        return np.asarray(frames.is_valid().to_numpy(zero_copy_only=False))

    kind = both.tables[0].schema.field(name).type
    fields: dict[str, pa.Array] = {}
    for field in (kind.field(index) for index in range(kind.num_fields)):
        if field.name in _SUMS:
            fields[field.name] = _sums(both, part(field.name), part("frames"), is_static)
        elif pa.types.is_list(field.type):
            fields[field.name] = both.entries(part(field.name), present, not is_static)
        else:
            parts = pa.concat_arrays([part(field.name)(table) for table in both.tables])
            fields[field.name] = parts.take(pa.array(both.leading))
    return pa.StructArray.from_arrays(list(fields.values()), list(fields))


def _sums(
    both: _Both,
    column: Callable[[pa.Table], pa.Array],
    frames: Callable[[pa.Table], pa.ListArray],
    is_static: bool,
) -> pa.Array:
    """Sums over all frames of a tile; of a static modality its first frame alone counts."""
    parts = [column(table) for table in both.tables]
    width = parts[0].type.list_size if pa.types.is_fixed_size_list(parts[0].type) else 1
    numbers = [
        (part.flatten() if width > 1 or pa.types.is_fixed_size_list(part.type) else part)
        .to_numpy()
        .reshape(-1, width)
        for part in parts
    ]
    total = np.zeros((both.num_rows, width), np.int64)
    total[both.row_of[0]] = numbers[0]
    added = numbers[1]
    if is_static:
        there = np.zeros(both.num_rows, np.bool_)
        there[both.row_of[0]] = _any_frame(frames(both.tables[0]))
        added = np.where(there[both.row_of[1], None], 0, added)
    total[both.row_of[1]] += added
    flat = pa.array(total.ravel())
    fixed = pa.types.is_fixed_size_list(parts[0].type)
    return pa.FixedSizeListArray.from_arrays(flat, width) if fixed else flat


def _any_frame(frames: pa.ListArray) -> np.ndarray:
    """bool [tile]: whether the only entry of a static modality is there."""
    return np.asarray(frames.flatten().is_valid().to_numpy(zero_copy_only=False))


def _seconds(table: pa.Table) -> np.ndarray:
    """int64 [entry]: dates of all tiles as seconds; the smallest number where unknown."""
    dates = table["datetimes"].combine_chunks().flatten().cast(pa.int64())
    return np.asarray(dates.fill_null(np.iinfo(np.int64).min).to_numpy())
