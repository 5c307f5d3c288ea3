"""What commands show: text on stdout, progress and notes on stderr, and only on a terminal."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_PIPE_WIDTH = 160


def console() -> Console:
    """stdout; wide enough for tables when it is not a terminal."""
    return Console(
        highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH
    )


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr)  # noqa: T201


def print_json(content: Any) -> None:
    """One JSON document on stdout; no NaN or infinity."""
    print(json.dumps(content, indent=2, allow_nan=False))  # noqa: T201


def plain_table(*columns: str) -> Table:
    """A table whose first column is left and the others right aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def repaired_in_words(objects: int, shards: int) -> str:
    """For example: repaired 3 objects in 2 shards."""
    of = f" in {shards} shard{'s' * (shards != 1)}" if shards else ""
    return f"repaired {objects} object{'s' * (objects != 1)}{of}"


def bar_columns(unit: str) -> tuple[ProgressColumn, ...]:
    """What a bar shows: count, elapsed and remaining time."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}"),
    )


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """A bar with count, elapsed and remaining time on stderr; nothing when that is no terminal."""
    stderr = Console(stderr=True)
    columns = bar_columns(unit)
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        yield bar
