"""The header of a netCDF-3 file, walked through before a library believes its numbers.

Format: "NetCDF Classic Format Specification" (Unidata), versions 1 (CDF-1) and 2 (CDF-2, 64-bit offset).
"""

import struct
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import SceneError
from pipeline.readers.array_base import MAX_MEMBERS

_DIMENSIONS, _VARIABLES, _ATTRIBUTES = 10, 11, 12
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8}
# Longer texts and lists in a header are no names, units or ranges.
_MAX_ATTRIBUTE_BYTES = 2**24
_MAX_NAME_BYTES = 2**16
_MAX_RANK = 1024


def check_netcdf3(path: str) -> None:
    """Raise SceneError for a header that ends early or claims more than any honest one needs."""
    with Path(path).open("rb") as file:
        magic = file.read(4)
        wide = magic[3:4] == b"\x02"
        _number(file)
        for _ in range(_count(file, _DIMENSIONS)):
            _skip(file, _number(file), _MAX_NAME_BYTES)
            _number(file)
        _attributes(file)
        for _ in range(_count(file, _VARIABLES)):
            _skip(file, _number(file), _MAX_NAME_BYTES)
            _skip(file, 4 * _number(file), 4 * _MAX_RANK)
            _attributes(file)
            for _ in range(4 if wide else 3):
                _number(file)


def _attributes(file: BinaryIO) -> None:
    for _ in range(_count(file, _ATTRIBUTES)):
        _skip(file, _number(file), _MAX_NAME_BYTES)
        kind, count = _number(file), _number(file)
        _skip(file, count * _TYPE_BYTES.get(kind, 8), _MAX_ATTRIBUTE_BYTES)


def _count(file: BinaryIO, expected: int) -> int:
    """How many entries a list has; an absent list is two zeros."""
    tag, count = _number(file), _number(file)
    if tag not in (0, expected) or (tag == 0 and count):
        raise SceneError(f"has a netCDF-3 header with tag {tag}, so it is damaged; copy it again")
    if count > MAX_MEMBERS:
        raise SceneError(
            f"claims {count} dimensions, arrays or attributes; at most {MAX_MEMBERS} are read"
        )
    return count


def _skip(file: BinaryIO, length: int, most: int) -> None:
    """Pass over bytes, filled up to a multiple of 4."""
    if length > most:
        raise SceneError(f"claims a name or attribute of {length} bytes; at most {most} are read")
    file.seek(-(-length // 4) * 4, 1)


def _number(file: BinaryIO) -> int:
    content = file.read(4)
    if len(content) < 4:
        raise SceneError("cannot be read (its netCDF-3 header ends early); copy it again")
    return int(struct.unpack(">I", content)[0])
