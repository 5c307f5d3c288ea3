"""Class labels of tiles: from folders and tables by scene, from GeoParquet points and polygons by tile."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from rasterio._err import CPLE_NotSupportedError
from rasterio.crs import CRS

from pipeline.errors import ArchiveError, SceneError
from pipeline.fetch.files import open_file
from pipeline.georef import canonical_crs
from pipeline.planning.footprints import LONLAT, transformed
from pipeline.planning.splits import values_by_scene
from pipeline.readers.gates import refuse_wide_rows
from pipeline.scenes import Access, Scene
from pipeline.settings.config import LabelsConfig

_BINARY = (pa.binary(), pa.large_binary(), pa.binary_view())


@dataclass(frozen=True)
class VectorLabels:
    """The class of every tile, None for none; `num_ambiguous` tiles have none because they have several."""

    labels: list[str | None]
    num_ambiguous: int


@dataclass(frozen=True)
class _Shapes:
    """Single points and polygons [shape] in a CRS; `classes` are positions in the sorted `names`."""

    shapes: np.ndarray
    classes: np.ndarray
    names: list[str]
    crs: str

    def of_type(self, kind: shapely.GeometryType) -> tuple[np.ndarray, np.ndarray]:
        chosen = shapely.get_type_id(self.shapes) == kind
        return self.shapes[chosen], self.classes[chosen]


def scene_labels(
    config: LabelsConfig | None, scenes: Sequence[Scene], table: Mapping[str, str] | None
) -> dict[str, str]:
    """Class by scene id; scenes without one are absent.

    A class comes from a pattern's `{label}`, from `table` (by scene id, with or without the suffix of the
    file), and with `config.folder` from the folder that the scene lies in. Raises ArchiveError where these
    disagree on a scene, the table names no scene, or no scene lies in a folder.
    """
    if config is not None and config.folder:
        folders = {scene.id: PurePosixPath(scene.id).parent.name for scene in scenes}
        table = {scene: folder for scene, folder in folders.items() if folder}
        if scenes and not table:
            raise ArchiveError(
                f"labels.folder: {scenes[0].id} and all other scenes lie in no folder below the source; "
                "give the folder that holds one folder per class"
            )
    return values_by_scene(scenes, table, "label")


def vector_labels(
    config: LabelsConfig, file: str, access: Access, geometries: Sequence[bytes | None]
) -> VectorLabels:
    """Classes of tiles by the GeoParquet file `file`, an absolute path or URL below the roots.

    `geometries` are the tiles' footprints (WKB in longitude and latitude, None if unknown). A tile has the
    class of the points inside it or on its edge, and of the polygons that cover its centre (a
    representative point of its footprint); a tile with several classes has none and is counted. Edges of
    polygons are straight in the file's CRS. Rows without geometry or class do not count.

    Raises ArchiveError for a file that cannot be read as GeoParquet in WKB, or that labels no tile.
    """
    tiles = shapely.from_wkb(np.array([*geometries, None], dtype=object)[:-1])
    if not any(geometries):
        raise ArchiveError(
            "labels.vector: no tile has a longitude and latitude, as the scenes have no CRS; give "
            "labels.folder or labels.csv"
        )
    given = _read(file, access, config.column)
    try:
        pairs = [_points_in(tiles, given), _polygons_over(tiles, given)]
    except shapely.errors.ShapelyError as error:
        raise ArchiveError(f"{file}: has geometry that cannot be used: {error}") from None
    except CPLE_NotSupportedError:
        raise ArchiveError(
            f"{file}: its CRS {given.crs!r:.80} has no longitude and latitude on the Earth; write it "
            "again in another"
        ) from None
    tile, label = np.concatenate(pairs, axis=1)
    if not tile.size:
        raise ArchiveError(_no_tile(file, given, tiles))
    least, most = np.full(len(tiles), len(given.names)), np.full(len(tiles), -1)
    np.minimum.at(least, tile, label)
    np.maximum.at(most, tile, label)
    names = [
        given.names[one] if one == other else None for one, other in zip(least, most, strict=True)
    ]
    return VectorLabels(names, int(np.count_nonzero(least < most)))


def class_names(labels: Iterable[str | None]) -> list[str]:
    """All classes that occur, sorted; a class's number is its position."""
    return sorted({label for label in labels if label is not None})


def _points_in(tiles: np.ndarray, given: _Shapes) -> np.ndarray:
    """int64 [2, pair]: tiles and the classes of points in them."""
    points, classes = given.of_type(shapely.GeometryType.POINT)
    at = transformed(given.crs, LONLAT, shapely.get_coordinates(points)[:, None])[:, 0]
    at[:, 0] = np.where(np.abs(at[:, 0]) > 180, (at[:, 0] + 180) % 360 - 180, at[:, 0])
    known = np.isfinite(at).all(1)
    point, tile = shapely.STRtree(tiles).query(shapely.points(at[known]), predicate="intersects")
    return np.stack([tile, classes[known][point]])


def _polygons_over(tiles: np.ndarray, given: _Shapes) -> np.ndarray:
    """int64 [2, pair]: tiles and the classes of polygons over their centres."""
    polygons, classes = given.of_type(shapely.GeometryType.POLYGON)
    centres = shapely.get_coordinates(shapely.point_on_surface(tiles))
    known = np.flatnonzero(~shapely.is_missing(tiles))
    at = transformed(LONLAT, given.crs, centres[:, None])[:, 0]
    system = CRS.from_user_input(given.crs)
    if system.is_geographic and len(polygons):
        # Files may count longitudes from 0 to 360.
        west, turn = shapely.bounds(polygons)[:, 0].min(), 2 * np.pi / system.units_factor[1]
        at[:, 0] = np.where(at[:, 0] < west, at[:, 0] + turn, at[:, 0])
    inside = np.isfinite(at).all(1)
    found = shapely.STRtree(polygons).query(shapely.points(at[inside]), predicate="intersects")
    return np.stack([known[inside][found[0]], classes[found[1]]])


def _read(file: str, access: Access, column: str) -> _Shapes:
    try:
        with _opened(file, access) as stream:
            parquet = pq.ParquetFile(stream)
            geometry, crs = _geometry_column(file, parquet.schema_arrow)
            others = [name for name in parquet.schema_arrow.names if name != geometry]
            if column not in others:
                raise ArchiveError(
                    f"{file}: has no column {column!r} of classes, which labels.column names; beside the "
                    f"geometry it has {', '.join(map(repr, others)) or 'none'}"
                )
            own, rows = {geometry, column}, parquet.metadata.num_rows
            refuse_wide_rows(parquet.metadata, own, rows, access.max_block_bytes)
            table = parquet.read(columns=[geometry, column])
            shapes = shapely.from_wkb(
                table[geometry].combine_chunks().to_numpy(zero_copy_only=False)
            )
            return _shapes(file, shapes, _texts(file, table[column], column), crs)
    except SceneError as error:
        raise ArchiveError(f"{file} {error}") from None
    except (OSError, ImportError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ArchiveError(f"{file}: cannot be read: {reason:.200}; expected GeoParquet") from None


def _opened(file: str, access: Access) -> AbstractContextManager[Any]:
    return open_file(file, access)


def _geometry_column(file: str, schema: pa.Schema) -> tuple[str, str]:
    """Name and CRS of the primary geometry column, from the file's `geo` metadata (GeoParquet 1.1)."""
    try:
        geo = json.loads((schema.metadata or {})[b"geo"])
        name = geo["primary_column"]
        column = geo["columns"][name]
        encoding, crs = column["encoding"], column.get("crs", LONLAT)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ArchiveError(
            f"{file}: has no usable 'geo' metadata, so it is not GeoParquet; write it with a library that "
            "names its primary column, encoding and CRS"
        ) from None
    found = schema.field(name).type if schema.names.count(name) == 1 else "no column"
    if encoding != "WKB" or found not in _BINARY:
        raise ArchiveError(
            f"{file}: its geometry column {name!r:.80} is {found} with encoding {encoding!r:.80}; expected "
            "binary with encoding 'WKB': write it again with geometry_encoding WKB"
        )
    return name, _crs(file, crs)


def _crs(file: str, stated: Any) -> str:
    """The CRS that a column states as PROJJSON."""
    if stated is None:
        raise ArchiveError(
            f"{file}: says that the CRS of its geometry is unknown (null); write it again with the CRS"
        )
    code = stated.get("id") if isinstance(stated, dict) else None
    text = stated if isinstance(stated, str) else json.dumps(stated)
    if isinstance(code, dict) and {"authority", "code"} <= code.keys():
        text = f"{code['authority']}:{code['code']}"
    try:
        return canonical_crs(text)
    except SceneError as error:
        raise ArchiveError(f"{file}: {error}") from None


def _texts(file: str, column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Classes as text, null where there is none."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ArchiveError(
            f"{file}: column {name!r}, which labels.column names, has type {column.type}; expected text or "
            "whole numbers"
        ) from None
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _shapes(file: str, geometry: np.ndarray, texts: pa.ChunkedArray, crs: str) -> _Shapes:
    """Rows with geometry and class, collections taken apart."""
    kept = ~shapely.is_missing(geometry) & ~texts.is_null().to_numpy()
    text = texts.filter(pa.array(kept)).to_numpy().astype(str)
    names, classes = np.unique(text, return_inverse=True)
    parts, row = shapely.get_parts(geometry[kept], return_index=True)
    filled = ~shapely.is_empty(parts)
    parts, row = parts[filled], row[filled]
    kinds = shapely.get_type_id(parts)
    other = ~np.isin(kinds, (shapely.GeometryType.POINT, shapely.GeometryType.POLYGON))
    if other.any():
        found = shapely.GeometryType(int(kinds[other][0])).name.lower()
        raise ArchiveError(f"{file}: has geometry of type {found}; expected points and polygons")
    return _Shapes(parts, classes[row], names.tolist(), crs)


def _no_tile(file: str, given: _Shapes, tiles: np.ndarray) -> str:
    west, south, east, north = shapely.total_bounds(tiles)
    left, bottom, right, top = shapely.total_bounds(given.shapes)
    return (
        f"{file}: none of its {len(given.shapes)} points and polygons lies in a tile: they span "
        f"({left:.6g}, {bottom:.6g}) to ({right:.6g}, {top:.6g}) in {given.crs:.80}, the tiles "
        f"({west:.6g}, {south:.6g}) to ({east:.6g}, {north:.6g}) in longitude and latitude; check the "
        "region and the order of coordinates"
    )
