"""Scenes as their headers describe them: what a source yields and the planner works with.

Pure data: nothing here opens a file. Pixels are read later, by window (`pipeline.readers`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Transform = tuple[float, float, float, float, float, float]


class Window(NamedTuple):
    """A rectangle of a grid in px; `top`, `left` count from its first row and column."""

    top: int
    left: int
    height: int
    width: int


class _Compact:
    """Is pickled as its fields' values: scenes travel with every task, by the dozen."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # The slots of a dataclass are its fields, in order.
        return type(self), tuple(map(self.__getattribute__, self.__slots__))


@dataclass(frozen=True, slots=True)
class Grid(_Compact):
    """Where pixels lie. `transform` holds the affine coefficients (a, b, c, d, e, f) of
    x = a col + b row + c, y = d col + e row + f.

    `crs` and `transform` are None for an engineering grid, one without georeference. `crs` is in the form
    of `pipeline.georef.canonical_crs`, so that equal systems have equal text.
    """

    height: int
    width: int
    crs: str | None
    transform: Transform | None

    def in_words(self) -> str:
        """Size, CRS, origin and pixel size on one line, for messages."""
        size = f"{self.height} x {self.width} px"
        if self.crs is None or self.transform is None:
            return f"{size} without a CRS"
        a, b, c, d, e, f = self.transform
        rotation = f", rotation terms ({b:g}, {d:g})" if b or d else ""
        return (
            f"{size}, {self.crs:.60}, origin ({c:.10g}, {f:.10g}), pixels ({a:g}, {e:g}){rotation}"
        )


@dataclass(frozen=True, slots=True)
class Plane(_Compact):
    """One band inside an asset.

    `key` is the band's 0-based number in a raster file, or the path of an array below its store, with the
    position along the band dimension, if there is one, in brackets ("r10m/b02", "s2[3]"). A number `n` of
    the file means `n * scale + offset` in physical units; both are None where nothing says so.
    """

    band: str
    key: int | str
    nodata: float | None = None
    scale: float | None = None
    offset: float | None = None


@dataclass(frozen=True, slots=True)
class Asset(_Compact):
    """Bands of one scene that lie in one file (or variable group) on one grid with one type.

    `href` is an absolute path or a URL. `select` fixes further dimensions of an array, such as
    `(("time", 3),)`; where the bands are a dimension, it is named in `band_dim` and planes' keys are
    positions along it. `header_seen` is False where a catalogue stated the facts and no file was opened:
    whoever opens it compares (`pipeline.readers`). `checksum` is the file's multihash, in hex, if known.
    With `warp_onto`, pixels are resampled to that grid on reading, and `grid` is still the file's own.
    """

    href: str
    kind: Literal["raster", "array"]
    grid: Grid
    dtype: str
    planes: tuple[Plane, ...]
    block_shape: tuple[int, int]
    fingerprint: str
    header_seen: bool = True
    checksum: str | None = None
    select: tuple[tuple[str, int], ...] = ()
    band_dim: str | None = None
    warp_onto: Grid | None = None
    resampling: str | None = None

    @property
    def shown_grid(self) -> Grid:
        """The grid that reading yields."""
        return self.warp_onto or self.grid


@dataclass(frozen=True, slots=True)
class Scene(_Compact):
    """One acquisition of one modality; `assets` hold each of its bands once.

    `datetime` is ISO 8601 in UTC ("2017-09-18T00:00:00Z"), None where nothing states it. `place` names
    the grid where names say so (a pattern's `{tile}`, a catalogue's tile code). `mask` is an asset of one
    plane with the modality's quality classes. `baseline` is the processing baseline as the metadata
    states it ("04.00"). `label` and `split` are those a name or table gives. `shift` is added to
    every number on reading, to bring the scene to the store's offset (`pipeline.planning.harmonize`).
    """

    id: str
    modality: str
    assets: tuple[Asset, ...]
    datetime: str | None = None
    place: str | None = None
    mask: Asset | None = None
    baseline: str | None = None
    label: str | None = None
    split: str | None = None
    shift: int = 0


def asset_of(scene: Scene, band: str) -> tuple[Asset, int]:
    """The asset that holds a band, and the band's position among its planes."""
    for asset in scene.assets:
        for position, plane in enumerate(asset.planes):
            if plane.band == band:
                return asset, position
    raise KeyError(band)


def bands_of(scene: Scene) -> tuple[str, ...]:
    """All bands of a scene, asset by asset."""
    return tuple(plane.band for asset in scene.assets for plane in asset.planes)


def own_name(scene: Scene) -> str:
    """A scene's id without its modality, which several modalities have in front."""
    return scene.id.removeprefix(f"{scene.modality}:")


@dataclass(frozen=True)
class Listing:
    """What a source holds for one modality.

    `scenes` are sorted by id. `refused` and `skipped` give reasons by scene id: what is broken or
    contradicts its catalogue, and what the configuration does not ask for. `files` are all files (or
    catalogue objects) the listing depends on with their fingerprints, so that a later run can tell
    whether it would come out the same. `notes` are one-line remarks for people.
    """

    scenes: tuple[Scene, ...]
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retries:
    """How a read that fails for a passing reason is tried again: `first_wait_s` after the first attempt,
    each further time `factor` times as long but at most `longest_wait_s`, until `attempts` were made or
    `budget_s` would be over. A server that is silent for `timeout_s` failed."""

    attempts: int = 5
    first_wait_s: float = 0.5
    factor: float = 3.0
    longest_wait_s: float = 30.0
    timeout_s: float = 30.0
    budget_s: float = 300.0


@dataclass(frozen=True)
class Access:
    """What may be opened, and how much of it at once. Small: it travels with every task.

    `roots` are absolute folders or URL prefixes; nothing outside them is opened. `drivers` are GDAL
    driver names. `max_scene_px` bounds height times width of a scene. `sign` is "package.module:function",
    called with a URL and returning the URL to use. `checksums` is a list of the files' checksums, relative
    to the archive. Servers at private addresses are refused unless a root names the address itself, or all
    are allowed.
    """

    roots: tuple[str, ...]
    drivers: tuple[str, ...] = ("GTiff", "JPEG", "PNG")
    max_block_bytes: int = 256 * 2**20
    max_scene_px: int = 2**36
    sign: str | None = None
    checksums: str | None = None
    allow_private_addresses: bool = False
    retries: Retries = Retries()
