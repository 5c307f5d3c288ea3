"""Archives of GeoTIFF/COG scenes: finding them, checking their headers, reading windows.

Files are untrusted. Only the GeoTIFF driver may open them, nothing outside the folder the user named
is followed, and the header is checked before any pixel is read.
"""

import glob
import itertools
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.warp
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from pipeline.errors import ArchiveError, SceneError

DRIVER = "GTiff"
SUFFIXES = (".tif", ".tiff")
# GDAL's own cache holds the blocks that neighbouring windows share; its default is 5 % of the host.
GDAL_OPTIONS = {"GDAL_CACHEMAX": 128 * 2**20, "GDAL_NUM_THREADS": "1"}

logging.getLogger("rasterio").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Source:
    """A folder or glob as the user gave it, and the files found, sorted by id.

    `root` bounds what may be opened: the folder, or the part of the glob before its first wildcard.
    """

    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Scene:
    """Header facts of one scene; pixels are read later, by window.

    `transform` holds the six affine coefficients (a, b, c, d, e, f). `crs` and `transform` are
    None for a scene without georeference; the ground sample distance is None as well where the CRS does
    not measure in a unit of length. `nodata` has one entry per band.
    """

    id: str
    path: str
    fingerprint: str
    height: int
    width: int
    num_bands: int
    dtype: str
    nodata: tuple[float | None, ...]
    block_shape: tuple[int, int]
    crs: str | None
    transform: tuple[float, float, float, float, float, float] | None
    ground_sample_distance_m: float | None


def find_scenes(source: str) -> Source:
    """The GeoTIFF files of a folder (and its subfolders) or of a glob.

    Raises ArchiveError if there is no such folder, or nothing in it.
    """
    path = Path(source)
    if path.is_dir():
        root = path
        found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()]
    elif glob.has_magic(source):
        root = _fixed_part(path)
        matches = glob.glob(source, recursive=True)  # noqa: PTH207 (absolute patterns)
        found = [Path(match) for match in matches if not Path(match).is_dir()]
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        raise ArchiveError(
            f"{source}: no such folder; give a folder of GeoTIFF scenes or a quoted glob such as "
            "'scenes/*.tif'"
        )
    if not found:
        raise ArchiveError(
            f"{source}: no scene found; expected files ending in {' or '.join(SUFFIXES)}"
        )
    files = tuple(sorted(found, key=lambda file: scene_id(file, root)))
    _refuse_equal_ids(files, root)
    return Source(root, files)


def scene_id(file: Path, root: Path) -> str:
    """Path below the root without its suffix, with forward slashes."""
    return file.relative_to(root).with_suffix("").as_posix()


def fingerprint(file: Path) -> str:
    """Size and modification time: cheap, and different whenever a file was rewritten."""
    status = file.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def read_header(file: Path, root: Path, max_block_bytes: int) -> Scene:
    """Header facts of a scene; SceneError if it cannot be opened or must not be read."""
    if not file.resolve().is_relative_to(root.resolve()):
        raise SceneError(
            f"links to {file.resolve()}, outside {root}; name that folder as the source"
        )
    with open_raster(str(file)) as raster:
        types = set(raster.dtypes)
        if len(types) != 1:
            raise SceneError(f"its bands have several types {sorted(types)}; expected one")
        (dtype,) = types
        if np.dtype(dtype).kind not in "iuf":
            raise SceneError(f"its pixels are {dtype}; expected real numbers")
        _refuse_large_blocks(raster, np.dtype(dtype).itemsize, max_block_bytes)
        georeferenced = raster.crs is not None
        return Scene(
            id=scene_id(file, root),
            path=str(file),
            fingerprint=fingerprint(file),
            height=raster.height,
            width=raster.width,
            num_bands=raster.count,
            dtype=dtype,
            nodata=tuple(raster.nodatavals),
            block_shape=(raster.block_shapes[0][0], raster.block_shapes[0][1]),
            crs=raster.crs.to_string() if georeferenced else None,
            transform=tuple(raster.transform)[:6] if georeferenced else None,
            ground_sample_distance_m=_ground_sample_distance(raster),
        )


@contextmanager
def open_raster(path: str) -> Iterator[DatasetReader]:
    """A raster, by an allowed driver only; every failure inside becomes a SceneError."""
    try:
        with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
            # A scene without georeference is legitimate; its header says so.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, driver=DRIVER) as raster:
                yield raster
    except (RasterioError, OSError) as error:
        raise SceneError(_reason(error)) from None


def read_window(
    raster: DatasetReader, scene: Scene, nodata: float | None, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [band, y, x] in the file's own type and validity bool [y, x] of a window.

    A pixel is valid if no band holds nodata, NaN or infinity there and the file's mask or alpha
    band, if any, lets it through. `nodata` overrides the tag of the file unless it is None.
    """
    pixels = raster.read(window=window)
    valid = np.ones(pixels.shape[1:], np.bool_)
    for plane, tag in zip(pixels, scene.nodata, strict=True):
        value = tag if nodata is None else nodata
        if value is not None and not np.isnan(value):
            valid &= plane != value
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(pixels).all(axis=0)
    flags = {flag for band in raster.mask_flag_enums for flag in band}
    if flags & {MaskFlags.per_dataset, MaskFlags.alpha}:
        valid &= raster.dataset_mask(window=window) != 0
    return pixels, valid


def lonlat_corners(scene: Scene, pixel_corners: np.ndarray) -> np.ndarray | None:
    """Longitude and latitude in degrees of pixel corners float64 [n, (x, y)]; None without a CRS."""
    if scene.crs is None:
        return None
    xs, ys = native_corners(scene, pixel_corners).T
    lons, lats = rasterio.warp.transform(scene.crs, "OGC:CRS84", xs, ys)
    return np.stack([lons, lats], axis=1)


def native_corners(scene: Scene, pixel_corners: np.ndarray) -> np.ndarray:
    """Coordinates [n, (x, y)] of pixel corners in the units of the scene's CRS."""
    assert scene.transform is not None
    a, b, c, d, e, f = scene.transform
    x, y = pixel_corners.T
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def _ground_sample_distance(raster: DatasetReader) -> float | None:
    if raster.crs is None or not raster.crs.is_projected:
        return None
    _, metres_per_unit = raster.crs.linear_units_factor
    # The length of one step along a row, also where the grid is rotated.
    return float(math.hypot(raster.transform.a, raster.transform.d) * metres_per_unit)


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = []
    for part in pattern.parent.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _refuse_equal_ids(files: tuple[Path, ...], root: Path) -> None:
    for first, second in itertools.pairwise(files):
        if scene_id(first, root) == scene_id(second, root):
            raise ArchiveError(
                f"{first} and {second} have the same name but for the suffix; rename one, scenes are "
                "told apart by it"
            )


def _refuse_large_blocks(raster: DatasetReader, itemsize: int, max_block_bytes: int) -> None:
    """A few kB of file can hold one block that decodes to gigabytes."""
    interleaved = raster.count if raster.profile.get("interleave") == "pixel" else 1
    rows, cols = raster.block_shapes[0]
    block_bytes = rows * cols * interleaved * itemsize
    if block_bytes > max_block_bytes:
        raise SceneError(
            f"one block of it decodes to {block_bytes} bytes ({rows} x {cols} px), more than "
            f"run.max_block_bytes {max_block_bytes}; raise that, or rewrite the scene in smaller blocks"
        )


def _reason(error: Exception) -> str:
    """The innermost message of a raster error, on one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = " ".join(str(error).split())
    return text or type(error).__name__
