"""Tables beside an archive: CSV files that give every scene a date, a label or a split."""

import csv
import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import ArchiveError, SceneError
from pipeline.fetch.files import read_bytes
from pipeline.locations import check_allowed, is_url
from pipeline.readers.gates import read_regular
from pipeline.readers.rasters import SUFFIXES
from pipeline.scenes import Access


def read_table(file: str, columns: tuple[str, str], access: Access) -> dict[str, str]:
    """The second of `columns` by the first, the scene, of a CSV file with a header line.

    `file` is an absolute path or URL below the roots; UTF-8, with or without a byte order mark. A scene
    may be given with or without the suffix of its file (`scene_key`). Raises ArchiveError for a file
    that cannot be read, a missing column, an empty cell, or a scene with two values.
    """
    lines = io.StringIO(_text(file, access), newline="")
    table: dict[str, str] = {}
    try:
        for line, scene, value in _cells(file, columns, csv.reader(lines, strict=True)):
            known = table.setdefault(scene_key(scene), value)
            if known != value:
                raise ArchiveError(
                    f"{file}, line {line}: {columns[1]} of {scene!r:.200} is {value!r:.80}, but further up "
                    f"{known!r:.80}; leave one of them"
                )
    except csv.Error as error:
        raise ArchiveError(f"{file}: not a CSV file: {error}; expected commas and UTF-8") from None
    return table


def scene_key(scene: str) -> str:
    """A scene as tables name it, in the form of scene ids: without the suffix of a raster file."""
    suffix = PurePosixPath(scene).suffix
    plain = scene[: -len(suffix)] if suffix.lower() in SUFFIXES else scene
    return plain.removeprefix("./")


def _text(file: str, access: Access) -> str:
    try:
        check_allowed(file, access)
        # Text takes four times its bytes while it is taken apart.
        most = access.max_block_bytes // 4
        if is_url(file):
            return str(read_bytes(file, access, most), encoding="utf-8-sig")
        content = read_regular(file, most, "a quarter of run.max_block_bytes,")
        return str(content, encoding="utf-8-sig")
    except SceneError as error:
        raise ArchiveError(f"{file} {error}") from None
    except UnicodeDecodeError as error:
        raise ArchiveError(
            f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except Exception as error:  # drivers of remote stores have errors of their own
        reason = getattr(error, "strerror", None) or error
        raise ArchiveError(f"{file}: cannot be read: {reason}; expected a CSV file") from None


def _places(file: str, columns: tuple[str, str], header: list[str]) -> tuple[int, int]:
    names = [name.strip() for name in header]
    for column in columns:
        if names.count(column) != 1:
            found = "twice" if column in names else "missing"
            raise ArchiveError(
                f"{file}: column {column!r} is {found}; it has {', '.join(map(repr, names)) or 'none'}, "
                f"expected {' and '.join(map(repr, columns))} once, separated by a comma"
            )
    return names.index(columns[0]), names.index(columns[1])


def _cells(file: str, columns: tuple[str, str], reader: Any) -> Iterator[tuple[int, str, str]]:
    """Line number, scene and value of every row that is not blank."""
    places = _places(file, columns, next(reader, []))
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        scene, value = (row[p].strip() if p < len(row) else "" for p in places)
        if not (scene and value):
            raise ArchiveError(
                f"{file}, line {reader.line_num}: {columns[1] if scene else columns[0]} is empty; fill it "
                "or leave out the line"
            )
        yield reader.line_num, scene, value
