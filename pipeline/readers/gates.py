"""What files claim, checked against a budget before a library believes it.

A library takes a header's word for how much memory a directory, a tag, a mask or a document needs. These
checks read the few bytes that make such claims themselves.
"""

import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import SceneError
from pipeline.fetch.files import refuse_special_file

# More bands than this are no image: a tile of them alone would take gigabytes.
MAX_BANDS = 4096
# GDAL walks through all directories of a file; honest ones have an image, a mask and their overviews.
_MAX_DIRECTORIES = 1024
_MAX_ENTRIES = 4096
_WIDTH, _LENGTH, _BITS, _PACKED, _SAMPLES, _ROWS, _PLANAR = 256, 257, 258, 259, 277, 278, 284
_SUBFILE, _TILE_WIDTH, _TILE_LENGTH = 254, 322, 323
# Where blocks lie and how long they are; these lists are as long as the image is large.
_BLOCK_LISTS = (273, 279, 324, 325)
_KNOWN = (
    _WIDTH, _LENGTH, _BITS, _PACKED, _SAMPLES, _ROWS, _PLANAR, _SUBFILE, _TILE_WIDTH, _TILE_LENGTH,
)  # fmt: skip
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}  # fmt: skip
_REDUCED, _MASK = 1, 4
_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_COEFFICIENT_BYTES = 2
# Memory that a parsed JSON document takes: per object, per key or value, and per byte of text.
_OBJECT_BYTES, _VALUE_BYTES = 200, 64
_WIDE_CHARACTER_BYTES = 4


def refuse_many_pixels(height: int, width: int, limit: int) -> None:
    """Raise SceneError for a scene whose tiles alone, empty or not, would be too many to plan."""
    if height * width > limit:
        raise SceneError(
            f"has {height} x {width} px, more than run.max_scene_px {limit}; raise that, or cut the scene "
            "into parts"
        )


def refuse_many_bands(count: int) -> None:
    """Raise SceneError for more bands than a tile can hold."""
    if count > MAX_BANDS:
        raise SceneError(f"has {count} bands; at most {MAX_BANDS} are read, so divide it")


def refuse_large_document(content: bytes, budget: int, what: str) -> None:
    """Raise SceneError for JSON that would take more than twice the budget once it is parsed.

    `what` names the document, `budget` is `run.max_block_bytes`. Counts brackets, commas and colons, in
    texts too: an upper bound.
    """
    values = content.count(b"[") + content.count(b",") + content.count(b":")
    plain = content.isascii() and b"\\u" not in content
    text = len(content) * (1 if plain else _WIDE_CHARACTER_BYTES)
    needed = content.count(b"{") * _OBJECT_BYTES + values * _VALUE_BYTES + text
    if needed > 2 * budget:
        raise SceneError(
            f"{what} takes up to {needed} bytes of memory, more than twice run.max_block_bytes {budget}; "
            "raise that, or divide it"
        )


def refuse_wide_rows(metadata: Any, columns: Collection[str], most_rows: int, budget: int) -> None:
    """Raise SceneError where `most_rows` rows of some columns of a Parquet file, read at once, take more
    than the budget. By its footer: columns decode to what they are in plain pages."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = (group.column(n) for n in range(group.num_columns))
        total = sum(p.total_uncompressed_size for p in parts if p.path_in_schema in columns)
        needed = total * min(most_rows, group.num_rows) // max(1, group.num_rows)
        if needed > budget:
            raise SceneError(
                f"has rows so wide that {min(most_rows, group.num_rows)} of them take {needed} bytes, more "
                f"than run.max_block_bytes {budget}; raise that, or leave columns out"
            )


def read_regular(path: str, most: int, setting: str) -> bytes:
    """All bytes of a regular local file; SceneError if there are more than `most`, which `setting` names.

    Raises OSError where it cannot be read.
    """
    refuse_special_file(path)
    size = Path(path).stat().st_size
    if size > most:
        raise SceneError(f"has {size} bytes, more than {setting} {most}; raise that")
    return Path(path).read_bytes()


def check_tiff(path: str, budget: int) -> None:
    """Raise SceneError where a directory of a local TIFF holds more than `budget` bytes in its tags, or an
    image or mask in one of its blocks, or where the lists of its blocks lie beyond its end: depending on
    how it is opened, GDAL takes such blocks for sparse ones, which are zero. What is no TIFF at all, or
    otherwise cut short, is left to GDAL."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        form = _tiff_form(file.read(16))
        if form is None:
            return
        for entries in _directories(file, form):
            if isinstance(entries, SceneError):
                raise entries
            _refuse_tags(entries, budget)
            _refuse_lost_lists(form, entries, size)
            _refuse_blocks(file, form, entries, budget)


def check_jpeg(path: str, budget: int) -> None:
    """Raise SceneError where a local JPEG in several scans, which has to be decoded as a whole, takes more
    than `budget` bytes. What is no JPEG, or cut short, is left to GDAL."""
    with Path(path).open("rb") as file:
        numbers = 0
        while (marker := file.read(4)) and len(marker) == 4:
            if marker[:2] == _JPEG_START:
                file.seek(-2, 1)
                continue
            kind, length = marker[1], int.from_bytes(marker[2:], "big")
            content = file.read(max(0, length - 2))
            if marker[0] != 0xFF or len(content) < length - 2:
                return
            if kind in _JPEG_FRAMES and length >= 8:
                height, width = struct.unpack_from(">HH", content, 1)
                numbers, several = height * width * content[5], kind in _JPEG_PROGRESSIVE
                components = content[5]
            elif kind == _JPEG_SCAN and numbers:
                if (several or content[0] < components) and numbers * _COEFFICIENT_BYTES > budget:
                    raise SceneError(
                        f"is a progressive JPEG that takes {numbers * _COEFFICIENT_BYTES} bytes to decode, "
                        f"more than run.max_block_bytes {budget}; raise that, or rewrite it as GeoTIFF"
                    )
                return


@dataclass(frozen=True)
class _TiffForm:
    """Byte order and field sizes of a TIFF; `first` is where its first directory lies."""

    order: str
    is_big: bool
    first: int

    @property
    def offset(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.is_big else "I"))

    @property
    def number(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.is_big else "H"))

    @property
    def entry(self) -> struct.Struct:
        return struct.Struct(self.order + ("HHQ8s" if self.is_big else "HHI4s"))


# Of a tag: type, count, and the bytes of its value or of where that lies.
_Entries = dict[int, tuple[int, int, bytes]]


def _tiff_form(start: bytes) -> _TiffForm | None:
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None or len(start) < 16:
        return None
    (version,) = struct.unpack_from(order + "H", start, 2)
    if version == 42:
        return _TiffForm(order, False, struct.unpack_from(order + "I", start, 4)[0])
    if version == 43:
        return _TiffForm(order, True, struct.unpack_from(order + "Q", start, 8)[0])
    return None


def _directories(file: BinaryIO, form: _TiffForm) -> Iterator[_Entries | SceneError]:
    """Every directory of the chain once, as far as it can be read."""
    seen: set[int] = set()
    at = form.first
    while at and at not in seen:
        seen.add(at)
        if len(seen) > _MAX_DIRECTORIES:
            yield SceneError(f"has more than {_MAX_DIRECTORIES} directories; keep its image only")
            return
        file.seek(at)
        head = file.read(form.number.size)
        if len(head) < form.number.size:
            return
        (count,) = form.number.unpack(head)
        if count > _MAX_ENTRIES:
            yield SceneError(f"has a directory of {count} tags, so it is damaged; copy it again")
            return
        content = file.read(count * form.entry.size + form.offset.size)
        if len(content) < count * form.entry.size:
            return
        found = form.entry.iter_unpack(content[: count * form.entry.size])
        yield {tag: (kind, number, value) for tag, kind, number, value in found}
        rest = content[count * form.entry.size :]
        at = form.offset.unpack(rest)[0] if len(rest) == form.offset.size else 0


def _refuse_tags(entries: _Entries, budget: int) -> None:
    for tag, (kind, count, _) in entries.items():
        needed = count * _TYPE_BYTES.get(kind, 1)
        if tag not in _BLOCK_LISTS and needed > budget:
            raise SceneError(
                f"its TIFF tag {tag} holds {needed} bytes, more than run.max_block_bytes {budget}; remove "
                "it, or raise that"
            )


def _refuse_lost_lists(form: _TiffForm, entries: _Entries, size: int) -> None:
    for tag in _BLOCK_LISTS:
        kind, count, value = entries.get(tag, (0, 0, b""))
        needed = count * _TYPE_BYTES.get(kind, 1)
        if needed > len(value) and form.offset.unpack(value)[0] + needed > size:
            raise SceneError(
                f"its TIFF tag {tag}, which says where its blocks lie, is beyond the end of the file, so "
                "it is cut short or damaged; copy it again"
            )


def _refuse_blocks(file: BinaryIO, form: _TiffForm, entries: _Entries, budget: int) -> None:
    """Overviews are never read; the blocks of all other directories may be."""
    tags = {tag: _number(file, form, entries[tag]) for tag in _KNOWN if tag in entries}
    kind = tags.get(_SUBFILE, 0)
    if kind & _REDUCED:
        return
    height, width = tags.get(_LENGTH, 0), tags.get(_WIDTH, 0)
    rows = tags.get(_TILE_LENGTH, min(tags.get(_ROWS, height), height))
    cols = tags.get(_TILE_WIDTH, width)
    if tags.get(_PACKED, 1) == 1 and _TILE_WIDTH not in tags and rows >= height:
        return  # libtiff reads a single raw strip in small pieces
    samples = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == 1 else 1
    needed = rows * cols * samples * max(1, -(-tags.get(_BITS, 1) // 8))
    if needed > budget:
        what = "its mask" if kind & _MASK else "it"
        raise SceneError(
            f"one block of {what} decodes to {needed} bytes ({rows} x {cols} px), more than "
            f"run.max_block_bytes {budget}; raise that, or rewrite the scene in smaller blocks"
        )


def _number(file: BinaryIO, form: _TiffForm, entry: tuple[int, int, bytes]) -> int:
    """The first value of a tag of whole numbers; 0 for what is none."""
    kind, count, value = entry
    code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
    if code is None or not count:
        return 0
    one = struct.Struct(form.order + code)
    if count * one.size > len(value):
        file.seek(form.offset.unpack(value)[0])
        value = file.read(one.size)
    return int(one.unpack(value[: one.size])[0]) if len(value) >= one.size else 0
