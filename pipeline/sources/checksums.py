"""Checksums of an archive's files, in a list as `sha256sum` writes it.

A damaged file that can still be read looks like any other; only a known checksum tells. Files are compared
with it in the worker, before the first pixel is taken (`pipeline.readers.assets`).
"""

import re
from dataclasses import replace

from pipeline.errors import ArchiveError, SceneError
from pipeline.locations import check_allowed, is_url, join
from pipeline.readers.gates import read_regular
from pipeline.scenes import Access, Asset, Listing, Scene
from pipeline.sources.files import fingerprint_of, relative

# Multihash prefixes by the number of hex digits of the digest: md5, sha1, sha256, sha512.
_PREFIXES = {32: "d50110", 40: "1114", 64: "1220", 128: "1340"}
_LINE = re.compile(r"([0-9a-fA-F]+) [ *](.+)")


def with_checksums(listing: Listing, root: str, access: Access) -> Listing:
    """The listing with the checksum of every raster file; scenes with one that is not listed are refused.

    Raises ArchiveError for a list that cannot be read, or an archive of arrays, which are no single files.
    """
    location = _location(root, access)
    known = _read(location, access)
    scenes, refused = [], dict(listing.refused)
    for scene in listing.scenes:
        try:
            scenes.append(_with_known(scene, known, location))
        except SceneError as error:
            refused[scene.id] = str(error)
    return replace(
        listing,
        scenes=tuple(scenes),
        refused=dict(sorted(refused.items())),
        files={**listing.files, **checksum_file(root, access)},
    )


def checksum_file(root: str, access: Access) -> dict[str, str]:
    """Name below the archive and fingerprint of the list; none where no list is given."""
    if access.checksums is None:
        return {}
    location = _location(root, access)
    return {relative(location, root): fingerprint_of(location, access)}


def _location(root: str, access: Access) -> str:
    assert access.checksums is not None
    location = join(root, access.checksums)
    try:
        if is_url(location):
            raise SceneError("is a URL; give a local file")
        check_allowed(location, access)
    except SceneError as error:
        raise ArchiveError(f"run.checksums {access.checksums} {error}") from None
    return location


def _read(location: str, access: Access) -> dict[str, str]:
    """Multihashes in hex, by absolute path; names in a list count from its folder."""
    try:
        content = read_regular(
            location, access.max_block_bytes // 4, "a quarter of run.max_block_bytes,"
        )
        lines = content.decode().splitlines()
    except SceneError as error:
        raise ArchiveError(f"{location}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ArchiveError(
            f"{location}: cannot be read: {reason}; give a file of sha256sum"
        ) from None
    folder, known = location.rpartition("/")[0], {}
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        prefix = _PREFIXES.get(len(found[1])) if found else None
        if found is None or prefix is None:
            raise ArchiveError(
                f"{location}, line {number}: {line!r:.80} is no checksum with a name; expected lines as "
                "sha256sum, sha512sum, sha1sum or md5sum write them"
            )
        known[join(folder, found[2].removeprefix("./"))] = prefix + found[1].lower()
    return known


def _with_known(scene: Scene, known: dict[str, str], location: str) -> Scene:
    def changed(asset: Asset) -> Asset:
        if asset.kind != "raster":
            raise SceneError(
                "is an array, whose many objects run.checksums cannot list; leave it out"
            )
        checksum = known.get(asset.href)
        if checksum is None:
            raise SceneError(f"its file {asset.href} is not in {location}; add its checksum")
        if asset.checksum not in (None, checksum):
            # A catalogue's own checksum may be of another kind; it is at least as near to the file.
            return asset
        return replace(asset, checksum=checksum)

    mask = None if scene.mask is None else changed(scene.mask)
    return replace(scene, assets=tuple(map(changed, scene.assets)), mask=mask)
