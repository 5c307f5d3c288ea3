"""Zarr stores, versions 2 and 3, in a folder or behind a URL: metadata documents and blocks of numbers.

A folder is read by its nodes' own documents, a URL by its consolidated metadata where it has them.
Nothing outside the allowed roots is followed, be it the store, a document or a single chunk.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import SceneError
from pipeline.fetch.buckets import children, is_bucket
from pipeline.fetch.files import read_bytes, read_part
from pipeline.fetch.http import Span
from pipeline.fetch.retries import on_disk
from pipeline.locations import check_allowed, is_url, signed
from pipeline.readers.array_base import MAX_MEMBERS, ArrayHeader, scene_errors
from pipeline.readers.chunks import Codec, decode, reason, unpack
from pipeline.readers.gates import refuse_large_document
from pipeline.readers.zarr_metadata import (
    Document,
    ZarrLayout,
    is_absent,
    shard_entries,
    zarr_header,
    zarr_layout,
)
from pipeline.scenes import Access

DOCUMENTS = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
_MAX_DOCUMENT_BYTES = 64 * 2**20
# Indices of shards kept per open store.
_INDICES = 32


class Objects(Protocol):
    """Named objects below the root of a store."""

    def read(self, key: str, start: int, length: int | None, most: int) -> bytes | None:
        """Bytes of an object from `start` (from its end if negative); None if there is no such object.

        SceneError if there are more than `most` of them.
        """

    def children(self, key: str) -> list[str]:
        """Names directly below a key that may be arrays or groups, sorted."""


class LocalObjects:
    """A folder."""

    def __init__(self, root: str, access: Access) -> None:
        check_allowed(root, access)
        self._root, self._access = Path(root), access
        self._checked: set[Path] = set()

    def read(self, key: str, start: int, length: int | None, most: int) -> bytes | None:
        def tried() -> bytes:
            return self._read(key, start, length, most)

        try:
            return on_disk(tried, key, self._access.retries)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise SceneError(f"its object {key} cannot be read ({reason(error)})") from None

    def _read(self, key: str, start: int, length: int | None, most: int) -> bytes:
        path = self._root / key
        self._refuse_wrong_places(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = max(size + start, 0) if start < 0 else start
            wanted = size - start if length is None else length
            if wanted > most:
                raise SceneError(f"its object {key} has {wanted} bytes; expected at most {most}")
            file.seek(start)
            return file.read(max(wanted, 0))

    def children(self, key: str) -> list[str]:
        folder = self._root / key

        def tried() -> list[str]:
            self._refuse_outside(folder)
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())

        try:
            return on_disk(tried, key or "/", self._access.retries)
        except OSError as error:
            raise SceneError(f"its group {key or '/'} cannot be listed ({reason(error)})") from None

    def _refuse_outside(self, folder: Path) -> None:
        if folder not in self._checked:
            check_allowed(str(folder), self._access)
            self._checked.add(folder)

    def _refuse_wrong_places(self, path: Path) -> None:
        """Raise SceneError for what lies outside, or would never end being read."""
        self._refuse_outside(path.parent)
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            check_allowed(str(path), self._access)
            status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise SceneError(f"its object {path.relative_to(self._root)} is no regular file")


class RemoteObjects:
    """What lies below a URL. An object that is read in parts is the same one every time, or an error."""

    def __init__(self, root: str, access: Access) -> None:
        check_allowed(root, access)
        if signed(root, access) != root:
            raise SceneError("is a Zarr store, whose many objects run.sign cannot sign; unset it")
        self._root, self._access = root.rstrip("/"), access
        self._versions: dict[str, tuple[int, str]] = {}

    def read(self, key: str, start: int, length: int | None, most: int) -> bytes | None:
        url = f"{self._root}/{key}"
        try:
            if start == 0 and length is None:
                return read_bytes(url, self._access, most)
            stop = None if length is None or start < 0 else start + length
            part = read_part(url, self._access, Span(start, stop), most)
        except FileNotFoundError:
            return None
        version = part.size, part.tag
        if self._versions.setdefault(key, version) != version:
            raise SceneError(f"its object {key} changed while it was read; run the command again")
        return part.data

    def children(self, key: str) -> list[str]:
        url = f"{self._root}/{key}"
        if not is_bucket(url):
            raise SceneError(
                f"its group {key or '/'} cannot be listed, as web servers do not say what they have; "
                "consolidate its metadata or name its arrays in assets"
            )
        folders, objects = children(url, self._access)
        return sorted((*folders, *objects))


class ZarrFile:
    """A Zarr store as an `ArrayFile`."""

    def __init__(self, root: str, access: Access) -> None:
        self._objects: Objects = (RemoteObjects if is_url(root) else LocalObjects)(root, access)
        self._max_block_bytes = access.max_block_bytes
        self._documents: dict[str, Document | None] = {}
        self._headers: dict[str, ArrayHeader | None] = {}
        self._layouts: dict[str, ZarrLayout] = {}
        self._indices: dict[str, np.ndarray | None] = {}
        # Whether `_documents` has all there are.
        self._complete = False
        if is_url(root):
            self._complete = self._take_consolidated()

    def header(self, path: str) -> ArrayHeader | None:
        if path not in self._headers:
            document = self._array_document(path)
            self._headers[path] = None if document is None else self._new_header(path, document)
        return self._headers[path]

    def members(self, group: str) -> tuple[str, ...]:
        return tuple(path for path in self._below(group) if self._array_document(path) is not None)

    def arrays(self) -> tuple[str, ...]:
        return tuple(sorted(self._walk("")))

    def group_attrs(self, group: str) -> Mapping[str, Any]:
        start = f"{group}/" if group else ""
        document = self._document(f"{start}zarr.json")
        attrs = document.get("attributes") if document else self._document(f"{start}.zattrs")
        return _object(attrs)

    def check(self, path: str) -> None:
        self._layout(path)

    @scene_errors()
    def block(self, path: str, index: tuple[int, ...]) -> np.ndarray | None:
        header, layout = self._header(path), self._layout(path)
        data = self._packed(path, layout, index)
        if data is None:
            return None
        whole = decode(layout.decoding, data)
        ends = [
            length - i * size
            for length, i, size in zip(header.shape, index, header.block_shape, strict=True)
        ]
        return whole[tuple(slice(0, end) for end in ends)]

    def fill(self, path: str) -> Any:
        return self._layout(path).fill

    def _packed(self, path: str, layout: ZarrLayout, index: tuple[int, ...]) -> bytes | None:
        """Bytes of a block as they are stored."""
        most = layout.decoding.limit
        if layout.shards is None:
            return self._objects.read(f"{path}/{layout.object_key(index)}", 0, None, most)
        pairs = [divmod(i, n) for i, n in zip(index, layout.blocks_per_object, strict=True)]
        key = f"{path}/{layout.object_key(tuple(outer for outer, _ in pairs))}"
        entries = self._shard_index(key, layout)
        if entries is None:
            return None
        entry = entries[tuple(inner for _, inner in pairs)]
        if is_absent(entry):
            return None
        start, length = (int(number) for number in entry)
        data = (
            self._objects.read(key, start, length, most)
            if length <= most and start < 2**62
            else None
        )
        if data is None or len(data) != length:
            raise SceneError(
                f"its shard {key} is damaged: a chunk should lie at byte {start}, of {length}"
            )
        return data

    def _shard_index(self, key: str, layout: ZarrLayout) -> np.ndarray | None:
        if key not in self._indices:
            while len(self._indices) >= _INDICES:
                del self._indices[next(iter(self._indices))]
            self._indices[key] = self._read_shard_index(key, layout)
        return self._indices[key]

    def _read_shard_index(self, key: str, layout: ZarrLayout) -> np.ndarray | None:
        assert layout.shards is not None
        length = layout.index_bytes
        start = -length if layout.shards.at_end else 0
        data = self._objects.read(key, start, length, length)
        if data is None:
            return None
        if len(data) != length:
            raise SceneError(f"its shard {key} is damaged: it is shorter than its index")
        return shard_entries(
            layout, unpack(Codec("crc32c", {}), data, length) if layout.shards.checksum else data
        )

    def _new_header(self, path: str, document: Document) -> ArrayHeader:
        is_second = document.get("zarr_format") == 2
        attrs = self._document(f"{path}/.zattrs") if is_second else document.get("attributes")
        return zarr_header(path, document, _object(attrs))

    def _header(self, path: str) -> ArrayHeader:
        header = self.header(path)
        if header is None:
            raise SceneError(f"has no array {path}")
        return header

    def _layout(self, path: str) -> ZarrLayout:
        if path not in self._layouts:
            header, document = self._header(path), self._array_document(path)
            assert document is not None
            self._layouts[path] = zarr_layout(header, document, self._max_block_bytes)
        return self._layouts[path]

    def _array_document(self, path: str) -> Document | None:
        document = self._document(f"{path}/zarr.json")
        if document is not None:
            return document if document.get("node_type") == "array" else None
        return self._document(f"{path}/.zarray")

    def _document(self, key: str) -> Document | None:
        key = key.removeprefix("/")
        if key not in self._documents and not self._complete:
            content = self._objects.read(key, 0, None, _MAX_DOCUMENT_BYTES)
            if content is not None:
                refuse_large_document(
                    content, self._max_block_bytes, f"its metadata document {key}"
                )
            self._documents[key] = None if content is None else _parsed(key, content)
        return self._documents.get(key)

    def _take_consolidated(self) -> bool:
        """Take all documents from the one that holds them, if the store has it."""
        root, listed = self._document("zarr.json"), self._document(".zmetadata")
        if root is not None:
            nodes = _object(_object(root.get("consolidated_metadata")).get("metadata"))
            found = {f"{path}/zarr.json": _object(node) for path, node in nodes.items()}
        else:
            nodes = _object(_object(listed).get("metadata"))
            found = {key: _object(node) for key, node in nodes.items()}
        self._documents.update(found)
        return bool(found)

    def _below(self, group: str) -> list[str]:
        start = f"{group}/" if group else ""
        if not self._complete:
            return [start + name for name in self._objects.children(group)]
        keys = (key[len(start) :] for key in self._documents if key.startswith(start))
        return [start + name for name in sorted({key.split("/")[0] for key in keys if "/" in key})]

    def _walk(self, group: str) -> Iterator[str]:
        pending, seen = [group], 0
        while pending:
            for path in self._below(pending.pop()):
                seen += 1
                if seen > MAX_MEMBERS:
                    raise SceneError(
                        f"has more than {MAX_MEMBERS} groups and arrays; name one of its groups"
                    )
                if self._array_document(path) is not None:
                    yield path
                else:
                    pending.append(path)


def zarr_fingerprint(root: str, access: Access) -> str:
    """A digest that is another one whenever the store changed; SceneError if it cannot be read.

    In a folder it covers name, size and modification time of every file, behind a URL only the
    metadata documents at the root: chunks rewritten there under the same metadata are not noticed.
    """
    check_allowed(root, access)
    digest = hashlib.sha256()
    if not is_url(root):
        for line in _tree(root):
            digest.update(line.encode())
        return digest.hexdigest()
    objects = RemoteObjects(root, access)
    for name in DOCUMENTS:
        content = objects.read(name, 0, None, _MAX_DOCUMENT_BYTES)
        digest.update(name.encode() + (b"" if content is None else content))
    return digest.hexdigest()


def _tree(root: str) -> Iterator[str]:
    """One line per file below a folder, in an order that depends on names only; links are not followed."""
    pending = [root]
    try:
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    status = entry.stat(follow_symlinks=not _is_broken(entry))
                    name = os.path.relpath(entry.path, root)
                    yield f"{name} {status.st_size} {status.st_mtime_ns}\n"
    except OSError as error:
        raise SceneError(f"cannot be listed ({reason(error)})") from None


def _object(given: Any) -> Document:
    """A JSON object inside a metadata document; empty for null, SceneError for anything else."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise SceneError(f"its metadata holds {given!r:.40}; expected a JSON object")
    return given


def _is_broken(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110 (many of them)


def _parsed(key: str, content: bytes) -> Document:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SceneError(f"its metadata document {key} is no JSON ({reason(error)})") from None
    if not isinstance(document, dict):
        raise SceneError(f"its metadata document {key} holds no JSON object")
    return document
