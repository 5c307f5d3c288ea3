"""Arrays of netCDF-4 files, which are HDF5: checked for what may not be followed, then read by chunk.

HDF5 can point to other files (external links, external storage, virtual datasets) and load filters from
the environment; a file that does is refused before h5netcdf, which follows links, looks at it. Chunks of
the usual filters are taken as bytes and decoded within bounds (`pipeline.readers.chunks`). What this
cannot prevent: on some damaged files the HDF5 library itself (2.0.0) never returns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.errors import ArchiveError, SceneError
from pipeline.fetch.files import PythonFile, opened
from pipeline.readers.array_base import (
    MAX_MEMBERS,
    ArrayHeader,
    refuse_large_block,
    scene_errors,
    strips,
)
from pipeline.readers.chunks import Codec, Decoding, decode
from pipeline.scenes import Access

# HDF5's own numbers of its filters; the last one is h5py's.
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_FILTERS = {_DEFLATE, _SHUFFLE, _FLETCHER32, 4, 5, 6, 32000}
_INTERNAL = (
    "DIMENSION_LIST",
    "REFERENCE_LIST",
    "CLASS",
    "NAME",
    "_Netcdf4Dimid",
    "_Netcdf4Coordinates",
)


@contextmanager
def open_hdf5(href: str, access: Access) -> Iterator["Hdf5File"]:
    """A netCDF-4 file; SceneError if it is damaged or refers to other files."""
    try:
        import h5netcdf
        import h5py
    except ImportError:
        raise ArchiveError(
            f"{href} is a netCDF-4 file, which needs h5netcdf; install aptile[xarray]"
        ) from None
    # HDF5 reads through Python, where what a disk or server says can be heard and tried again.
    with opened(href, access) as source, h5py.File(PythonFile(source), "r") as file:
        _refuse_references(file, h5py)
        with h5netcdf.File(file, "r", phony_dims="access", decode_vlen_strings=True) as netcdf:
            yield Hdf5File(file, netcdf, access.max_block_bytes)


class Hdf5File:
    """An open netCDF-4 file as an `ArrayFile`."""

    def __init__(self, file: Any, netcdf: Any, max_block_bytes: int) -> None:
        self._file, self._netcdf, self._max_block_bytes = file, netcdf, max_block_bytes
        self._headers: dict[str, ArrayHeader | None] = {}
        self._decodings: dict[str, Decoding | None] = {}

    @scene_errors()
    def header(self, path: str) -> ArrayHeader | None:
        if path not in self._headers:
            variable = self._variable(path)
            self._headers[path] = None if variable is None else self._new_header(path, variable)
        return self._headers[path]

    @scene_errors()
    def members(self, group: str) -> tuple[str, ...]:
        found = self._group(group)
        start = f"{group}/" if group else ""
        return tuple(sorted(start + name for name in found.variables)) if found else ()

    @scene_errors()
    def arrays(self) -> tuple[str, ...]:
        found, pending = [*self.members("")], [("", self._netcdf)]
        while pending:
            start, group = pending.pop()
            for name in group.groups:
                pending.append((f"{start}{name}/", group.groups[name]))
                found += self.members(start + name)
        return tuple(sorted(found))

    @scene_errors()
    def group_attrs(self, group: str) -> Mapping[str, Any]:
        found = self._group(group)
        return _attrs(found) if found else {}

    @scene_errors()
    def check(self, path: str) -> None:
        header, dataset = self._known(path), self._file[path]
        if header.stored.kind not in "iufbSO":
            raise SceneError(f"its array {path} is {header.stored.name}; expected real numbers")
        if dataset.shape != header.shape:
            raise SceneError(
                f"its array {path} holds {dataset.shape} of the {header.shape} numbers that its dimensions "
                "promise; write the rest of it"
            )
        size = dataset.dtype.itemsize
        refuse_large_block(path, header.block_shape, size, self._max_block_bytes)

    @scene_errors()
    def block(self, path: str, index: tuple[int, ...]) -> np.ndarray | None:
        header, dataset = self._known(path), self._file[path]
        starts = tuple(i * size for i, size in zip(index, header.block_shape, strict=True))
        part = tuple(
            slice(start, min(start + size, length))
            for start, size, length in zip(starts, header.block_shape, header.shape, strict=True)
        )
        if dataset.chunks is None:
            return None if _is_unwritten(dataset) else np.asarray(self._variable(path)[part])
        info = dataset.id.get_chunk_info_by_coord(starts)
        if info.byte_offset is None:
            return None
        decoding = self._decoding(path)
        if decoding is None:
            return np.asarray(self._variable(path)[part])
        if info.size > decoding.limit:
            raise SceneError(
                f"a chunk of its array {path} has {info.size} bytes; expected at most {decoding.limit}"
            )
        mask, data = dataset.id.read_direct_chunk(starts)
        whole = decode(_unmasked(decoding, mask), data)
        return whole[tuple(slice(0, piece.stop - piece.start) for piece in part)]

    @scene_errors()
    def fill(self, path: str) -> Any:
        header = self._known(path)
        return self._file[path].fillvalue if header.stored.kind in "iufb" else ""

    def _known(self, path: str) -> ArrayHeader:
        header = self.header(path)
        if header is None:
            raise SceneError(f"has no array {path}")
        return header

    def _group(self, path: str) -> Any:
        group = self._netcdf
        for name in path.split("/") if path else ():
            if name not in group.groups:
                return None
            group = group.groups[name]
        return group

    def _variable(self, path: str) -> Any:
        parent, _, name = path.rpartition("/")
        group = self._group(parent)
        return group.variables.get(name) if group is not None else None

    def _new_header(self, path: str, variable: Any) -> ArrayHeader:
        shape, dataset = tuple(int(n) for n in variable.shape), self._file[path]
        chunks = dataset.chunks or strips(shape, dataset.dtype.itemsize)
        return ArrayHeader(
            path, tuple(variable.dimensions), shape, dataset.dtype, chunks, _attrs(variable)
        )

    def _decoding(self, path: str) -> Decoding | None:
        """How to decode the bytes of a chunk; None where only the library can."""
        if path not in self._decodings:
            self._decodings[path] = _direct(self._file[path])
        return self._decodings[path]


def _refuse_references(file: Any, h5py: Any) -> None:
    """Raise SceneError where anything in the file lies elsewhere, or needs a filter from elsewhere."""
    links: list[tuple[bytes, int]] = []

    def visit(name: bytes, info: Any) -> bool | None:
        links.append((name, info.type))
        return True if len(links) > MAX_MEMBERS else None

    file.id.links.visit(visit, info=True)
    if len(links) > MAX_MEMBERS:
        raise SceneError(f"has more than {MAX_MEMBERS} groups and arrays, which is too many")
    for name, kind in links:
        shown = name.decode(errors="replace")
        if kind not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
            raise SceneError(
                f"has a link {shown!r} to another file, which is not followed; copy it"
            )
        if kind == h5py.h5l.TYPE_HARD and isinstance(
            opened := h5py.h5o.open(file.id, name), h5py.h5d.DatasetID
        ):
            _refuse_dataset(shown, opened.get_create_plist(), h5py)


def _refuse_dataset(name: str, plan: Any, h5py: Any) -> None:
    if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
        raise SceneError(
            f"has an array {name!r} whose numbers lie in another file; copy them into it"
        )
    filters = {plan.get_filter(number)[0] for number in range(plan.get_nfilters())}
    if not filters <= _FILTERS:
        raise SceneError(
            f"has an array {name!r} with HDF5 filter {min(filters - _FILTERS)}, which is not read; rewrite "
            "it with gzip, shuffle, fletcher32, szip, lzf, n-bit or scale-offset"
        )


def _direct(dataset: Any) -> Decoding | None:
    import h5py

    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(number) for number in range(plan.get_nfilters())]
    plain = (
        dataset.dtype.kind in "iuf" and h5py.h5t.py_create(dataset.dtype) == dataset.id.get_type()
    )
    if not plain or not {code for code, *_ in filters} <= {_DEFLATE, _SHUFFLE, _FLETCHER32}:
        return None
    names = {_DEFLATE: "zlib", _SHUFFLE: "shuffle", _FLETCHER32: "fletcher32"}
    size = {_SHUFFLE: {"elementsize": dataset.dtype.itemsize}}
    packers = tuple(Codec(names[code], size.get(code, {})) for code, *_ in filters)
    return Decoding(dataset.dtype, dataset.chunks, tuple(range(dataset.ndim)), packers)


def _unmasked(decoding: Decoding, mask: int) -> Decoding:
    """Without the filters that a chunk's mask says were left out."""
    if not mask:
        return decoding
    kept = tuple(codec for bit, codec in enumerate(decoding.packers) if not mask >> bit & 1)
    return Decoding(decoding.dtype, decoding.block_shape, decoding.axes, kept)


def _is_unwritten(dataset: Any) -> bool:
    import h5py

    layout = dataset.id.get_create_plist().get_layout()
    return bool(layout == h5py.h5d.CONTIGUOUS and dataset.size and dataset.id.get_offset() is None)


def _attrs(item: Any) -> dict[str, Any]:
    """Attributes as plain text and numbers; those of other types are left out."""
    plain = {}
    for name in item.attrs:
        if name in _INTERNAL:
            continue
        try:
            value = item.attrs[name]
        except (OSError, TypeError, ValueError, KeyError):
            continue
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.reshape(-1)[0]
        if isinstance(value, str):
            value = value.encode(errors="surrogateescape")
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        plain[name] = value
    return plain
