"""STAC catalogues as a source: static files, item collections, stac-geoparquet, API searches.

Walks what a location holds, item by item; `stac_items` makes a scene of each. Files are opened only for
items whose catalogue leaves grid or type open. One bad link or item is refused by name, and the rest goes
on.
"""

import gc
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rasterio.errors import NotGeoreferencedWarning

from pipeline.errors import ArchiveError, SceneError
from pipeline.locations import is_url, join
from pipeline.readers.rasters import RasterHeader, read_header
from pipeline.scenes import Access, Listing, Scene
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.files import waiting_threads
from pipeline.sources.stac_api import is_search, search_items
from pipeline.sources.stac_choice import in_asset
from pipeline.sources.stac_facts import shown
from pipeline.sources.stac_items import Draft, Wanted, drafted, finished, item_id, wanted_of
from pipeline.sources.stac_links import Hrefs, fingerprint_of, read_json
from pipeline.sources.stac_parquet import parquet_items

MAX_DEPTH = 32
MAX_DOCUMENTS = 2_000_000
PARQUET_SUFFIXES = (".parquet", ".geoparquet")
# Opening a remote file is waiting; more at once would only bother the server.
_HEADER_THREADS = 8
_CATALOGUES = ("catalog.json", "collection.json")


class Entry(NamedTuple):
    """An item, the folder or URL its relative hrefs start from, and where it stands, for messages."""

    item: Any
    base: str
    origin: str


def list_stac(
    location: str, archive_root: str, modality: ModalityConfig, access: Access
) -> Listing:
    """The scenes of a modality in a catalogue.

    `location` is a catalogue, collection, item or item collection (JSON), a stac-geoparquet file, the
    folder of a catalogue, or a search (`stac+https://host/path?collections=...`), absolute or below
    `archive_root`. Raises ArchiveError for a location that is none of these or gives an id twice,
    ConfigError for a modality that does not name its bands, ImportError without a library that the
    location needs.
    """
    wanted, hrefs = wanted_of(modality), Hrefs(access)
    walk = _Walk(_absolute(location, archive_root), access, hrefs)
    listed = _Listed(searched=is_search(location))
    with _without_collection():
        _read_items(walk, wanted, modality.name, hrefs, listed)
    notes = listed.open_headers(access)
    return listed.listing(walk, notes)


def files_of(
    location: str, archive_root: str, modality: ModalityConfig, access: Access
) -> dict[str, str]:
    """The catalogue's files with their fingerprints, as `list_stac` gives them; opens no raster.

    A search has one entry, the digest of all ids with their dates of update.
    """
    del modality
    walk = _Walk(_absolute(location, archive_root), access, Hrefs(access))
    walk.find_files()
    return walk.files


class _Walk:
    """What a location holds. `files` and `refused` are complete when all items have been asked for."""

    def __init__(self, location: str, access: Access, hrefs: Hrefs) -> None:
        self.location, self._access, self._hrefs = location, access, hrefs
        self.files: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []

    def items(self) -> Iterator[Entry]:
        """Every item, in an order that depends on the catalogue alone."""
        if is_search(self.location):
            yield from self._search()
            return
        start = self._start()
        base = _folder(start)
        if start.lower().endswith(PARQUET_SUFFIXES):
            self.files[start] = fingerprint_of(start, self._access)
            for item in parquet_items(start, self._access):
                yield Entry(item, base, start)
            return
        for location, content in self._documents(start):
            yield from _entries(location, content)

    def find_files(self) -> None:
        """Fill `files` without reading items."""
        if is_search(self.location):
            for _ in self._search():
                pass
            return
        start = self._start()
        if start.lower().endswith(PARQUET_SUFFIXES):
            self.files[start] = fingerprint_of(start, self._access)
            return
        for _ in self._documents(start, read_items=False):
            pass

    def _start(self) -> str:
        """The document to begin with; ArchiveError where nothing may or can be opened."""
        try:
            location = self._hrefs.document(self.location, "/")
        except SceneError as error:
            raise ArchiveError(f"{self.location} {error}") from None
        if is_url(location) or not Path(location).is_dir():
            return location
        for name in _CATALOGUES:
            if Path(location, name).is_file():
                return str(Path(location, name))
        raise ArchiveError(
            f"{location} holds no {' or '.join(_CATALOGUES)}; name the catalogue's file in modality.source"
        )

    def _search(self) -> Iterator[Entry]:
        """Items of a search; their relative hrefs start from the item's own address."""
        marks = []
        for number, item in enumerate(search_items(self.location, self._access)):
            marks.append(_mark(item))
            yield Entry(item, _folder(_self_link(item)), f"{self.location} result {number}")
        digest = hashlib.sha256("\n".join(sorted(marks)).encode("utf-8", "backslashreplace"))
        self.files[self.location] = digest.hexdigest()

    def _documents(self, start: str, read_items: bool = True) -> Iterator[tuple[str, Any]]:
        """Every document once, items included where they are to be read, depth first in link order.

        A start that is no STAC document raises ArchiveError; a link that leads to none is refused.
        """
        seen, stack = {start}, [(start, "start", 0)]
        while stack:
            location, relation, depth = stack.pop()
            self.files[location] = fingerprint_of(location, self._access)
            if relation == "item" and not read_items:
                continue
            try:
                content = read_json(location, self._access)
                links = _links(content, location, is_item=relation == "item")
            except SceneError as error:
                if relation == "start":
                    raise ArchiveError(str(error)) from None
                self.refused[location] = str(error)
                continue
            if content["type"] == "FeatureCollection" and _has_next(content):
                self.notes.append(
                    f"{location} is one page of a search, and its next page was not asked for; give the "
                    "search itself, as stac+https://..."
                )
            yield location, content
            found = list(self._followed(links, location, depth + 1, seen))
            if len(seen) > MAX_DOCUMENTS:
                raise ArchiveError(
                    f"{start} links to more than {MAX_DOCUMENTS} files; give such a catalogue as "
                    "stac-geoparquet"
                )
            stack.extend(reversed(found))

    def _followed(
        self, links: list[tuple[str, Any]], location: str, depth: int, seen: set[str]
    ) -> Iterator[tuple[str, str, int]]:
        """Links to documents that may be opened and have not been seen."""
        for relation, href in links:
            try:
                linked = self._hrefs.document(href, _folder(location))
                if depth > MAX_DEPTH:
                    raise SceneError(
                        f"is more than {MAX_DEPTH} links away from {self.location}; name the inner "
                        "catalogue in modality.source"
                    )
            except SceneError as error:
                self.refused[f"{location} link to {str(href)[:200]!a}"] = str(error)
                continue
            if linked not in seen:
                seen.add(linked)
                yield linked, relation, depth


def _read_items(
    walk: _Walk, wanted: Wanted, modality: str, hrefs: Hrefs, listed: "_Listed"
) -> None:
    for number, entry in enumerate(walk.items(), 1):
        name = None
        try:
            name = item_id(entry.item)
            draft = drafted(entry.item, entry.base, wanted, modality, hrefs)
        except SceneError as error:
            listed.refuse(name or f"item {number} in {entry.origin}", entry.origin, str(error))
            continue
        if draft is None:
            listed.skip(name, entry.origin, f"has none of the bands {list(wanted.bands)}")
        else:
            listed.add(draft, entry.origin)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Items and scenes hold no cycles; looking for some, in millions of objects, takes as long again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class _Listed:
    """What a listing has come to so far. Every id belongs to one scene."""

    searched: bool
    origins: dict[str, str] = field(default_factory=dict)
    scenes: dict[str, Scene] = field(default_factory=dict)
    drafts: dict[str, Draft] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, draft: Draft, origin: str) -> None:
        if draft.complete:
            scene = finished(draft, {})
            # Pages of a search overlap when the catalogue grows meanwhile.
            if self.searched and self.scenes.get(draft.id) == scene:
                return
            self._claim(draft.id, origin)
            self.scenes[draft.id] = scene
        elif not (self.searched and self.drafts.get(draft.id) == draft):
            self._claim(draft.id, origin)
            self.drafts[draft.id] = draft

    def refuse(self, name: str, origin: str, reason: str) -> None:
        if not (self.searched and self.refused.get(name) == reason):
            self._claim(name, origin)
            self.refused[name] = reason

    def skip(self, name: str, origin: str, reason: str) -> None:
        self.skipped.append((name, origin, reason))

    def open_headers(self, access: Access) -> tuple[str, ...]:
        """Complete the drafts from their files' headers; a remark on how many there were."""
        if not self.drafts:
            return ()

        def opened(draft: Draft) -> Scene | str:
            try:
                return finished(draft, _headers(draft, access))
            except SceneError as error:
                return str(error)

        with warnings.catch_warnings(), waiting_threads(_HEADER_THREADS) as pool:
            # Filters belong to the process: readers in threads that each set them would undo each other's.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            results = pool.map(opened, self.drafts.values())
            for name, result in zip(self.drafts, results, strict=True):
                if isinstance(result, Scene):
                    self.scenes[name] = result
                else:
                    self.refused[name] = result
        return (
            f"the catalogue states grid or pixel type of {len(self.drafts)} scenes only in part; the "
            "headers of their files were read",
        )

    def listing(self, walk: _Walk, notes: tuple[str, ...]) -> Listing:
        """Everything, sorted; an id that was skipped in one place and not in another keeps both."""
        skipped = {}
        for name, origin, reason in self.skipped:
            taken = name in self.origins or name in skipped
            skipped[f"{name} in {origin}" if taken else name] = reason
        return Listing(
            scenes=tuple(self.scenes[name] for name in sorted(self.scenes)),
            refused=dict(sorted((self.refused | walk.refused).items())),
            skipped=dict(sorted(skipped.items())),
            files=walk.files,
            notes=(*walk.notes, *notes),
        )

    def _claim(self, name: str, origin: str) -> None:
        if name in self.origins:
            raise ArchiveError(
                f"two items have the id {name!r}: in {self.origins[name]} and in {origin}; ids must be "
                "unique, so name one catalogue or collection in modality.source"
            )
        self.origins[name] = origin


def _headers(draft: Draft, access: Access) -> dict[str, tuple[RasterHeader, str]]:
    """Header and fingerprint, by href, of the files of which too little is known."""
    found = {}
    for stated in draft.files:
        if not stated.complete and stated.href not in found:
            fingerprint = fingerprint_of(stated.href, access)
            found[stated.href] = in_asset(stated.key, read_header, stated.href, access), fingerprint
    return found


def _links(content: Any, location: str, is_item: bool) -> list[tuple[str, Any]]:
    """(relation, href) of the links to follow; SceneError for what is not the document it should be."""
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "Feature":
        return []
    if kind == "FeatureCollection":
        if not isinstance(content.get("features"), list):
            raise SceneError(f"{location} has no list of features; expected an item collection")
        return []
    if kind not in ("Catalog", "Collection") or is_item:
        expected = "Feature" if is_item else "Catalog, Collection, Feature or FeatureCollection"
        raise SceneError(f"{location} is of type {shown(kind)}; expected the STAC type {expected}")
    links = content.get("links")
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise SceneError(f"{location} has no list of links; expected a STAC catalogue")
    return [
        (link["rel"], link.get("href")) for link in links if link.get("rel") in ("child", "item")
    ]


def _has_next(collection: dict[str, Any]) -> bool:
    links = collection.get("links")
    return isinstance(links, list) and any(
        isinstance(link, dict) and link.get("rel") == "next" for link in links
    )


def _entries(location: str, content: dict[str, Any]) -> Iterator[Entry]:
    items = {"Feature": [content], "FeatureCollection": content.get("features")}
    for item in items.get(content["type"]) or []:
        yield Entry(item, _folder(location), location)


def _mark(item: Any) -> str:
    """What tells an item's state in one line."""
    properties = item.get("properties") if isinstance(item, dict) else None
    dates = properties if isinstance(properties, dict) else {}
    name = item.get("id") if isinstance(item, dict) else None
    return f"{shown(name)} {shown(dates.get('updated') or dates.get('datetime'))}"


def _self_link(item: Any) -> str:
    links = item.get("links") if isinstance(item, dict) else None
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict) and link.get("rel") == "self" and is_url(str(link.get("href"))):
            return str(link["href"])
    return "/"


def _absolute(location: str, archive_root: str) -> str:
    return location if is_search(location) else join(archive_root, location)


def _folder(location: str) -> str:
    """The folder that relative hrefs in a document start from; it ends at the last slash of the path."""
    path = location.partition("?")[0] if is_url(location) else location
    return path.rpartition("/")[0] or "/"
