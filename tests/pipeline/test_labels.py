"""Class labels: folders and tables by scene, GeoParquet points and polygons by tile."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio.warp
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS

from pipeline.errors import ArchiveError
from pipeline.planning.footprints import footprints
from pipeline.planning.labels import class_names, scene_labels, vector_labels
from pipeline.scenes import Access, Grid, Scene
from pipeline.settings.config import LabelsConfig

FOLDER, TABLE, VECTOR = (
    LabelsConfig(folder=True),
    LabelsConfig(csv="labels.csv"),
    LabelsConfig(vector="labels.parquet"),
)
# A row of four tiles of one degree each, from (10, 50) east.
ROW = [shapely.to_wkb(shapely.box(10 + i, 50, 11 + i, 51)) for i in range(4)]


def scenes(*ids, **facts):
    return [Scene(scene_id, "s2", (), **facts) for scene_id in ids]


def test_folders_are_the_classes_of_real_imagery(real_data):
    root = real_data / "eurosat_rgb"
    ids = sorted(f.relative_to(root).with_suffix("").as_posix() for f in root.glob("*/*.jpg"))
    labels = scene_labels(FOLDER, scenes(*ids), None)
    assert len(labels) == len(ids) == 2500
    assert all(scene_id.startswith(f"{label}/{label}_") for scene_id, label in labels.items())
    assert class_names(labels.values()) == sorted(path.name for path in root.iterdir())


def test_the_innermost_folder_counts_and_scenes_outside_have_none():
    found = scene_labels(FOLDER, scenes("2019/Forest/a", "River/b", "c"), None)
    assert found == {"2019/Forest/a": "Forest", "River/b": "River"}


def test_folders_without_folders_are_an_error():
    with pytest.raises(
        ArchiveError, match="labels.folder: a and all other scenes lie in no folder"
    ):
        scene_labels(FOLDER, scenes("a", "b"), None)


def test_tables_name_scenes_with_or_without_suffix():
    table = {"a/1.tif": "Forest", "a/2": "River", "other": "Sea"}
    found = scene_labels(TABLE, scenes("a/1", "a/2", "a/3"), table)
    assert found == {"a/1": "Forest", "a/2": "River"}


def test_labels_in_names_always_count():
    assert scene_labels(None, scenes("a", label="Sea"), None) == {"a": "Sea"}
    assert scene_labels(FOLDER, scenes("Sea/a", label="Sea"), None) == {"Sea/a": "Sea"}
    with pytest.raises(ArchiveError, match="scene Sea/a: its label is both 'Lake' and 'Sea'"):
        scene_labels(FOLDER, scenes("Sea/a", label="Lake"), None)


def test_a_table_for_other_scenes_is_an_error():
    with pytest.raises(ArchiveError, match="labels.csv names none of the 2 scenes: it has 'x'"):
        scene_labels(TABLE, scenes("a", "b"), {"x.tif": "Sea"})


def test_class_names_are_sorted_and_known():
    assert class_names(["b", None, "a", "b"]) == ["a", "b"]


@pytest.fixture
def write(tmp_path):
    """`write(shapes, classes, **of the geometry column)`: a GeoParquet file, as others write it."""

    def write(shapes, classes, column="label", **facts):
        geometry = pa.array(shapely.to_wkb(np.array([*shapes, None], object))[:-1], pa.binary())
        table = pa.table({"geom": geometry, column: classes})
        geo = {"version": "1.1.0", "primary_column": "geom"}
        geo["columns"] = {"geom": {"encoding": "WKB", "geometry_types": [], **facts}}
        path = tmp_path / "labels.parquet"
        pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
        return str(path)

    return write


def labels_of(path, tiles=ROW, config=VECTOR):
    return vector_labels(config, path, Access((str(Path(path).parent),)), tiles)


def points(*places):
    return list(shapely.points(np.array(places, float)))


def projjson(code):
    return CRS.from_user_input(code).to_dict(projjson=True)


def test_points_label_the_tiles_they_lie_in(write):
    path = write(points((10.2, 50.1), (10.9, 50.9), (12.5, 50.5), (80, 0)), ["a", "a", "b", "c"])
    found = labels_of(path)
    assert found.labels == ["a", None, "b", None]
    assert found.num_ambiguous == 0


def test_points_of_two_classes_in_a_tile_are_ambiguous(write):
    path = write(
        points((10.2, 50.1), (10.9, 50.9), (12.5, 50.5), (12.5, 50.5)), ["a", "b", "b", "b"]
    )
    found = labels_of(path)
    assert found.labels == [None, None, "b", None]
    assert found.num_ambiguous == 1


def test_polygons_label_the_tiles_whose_centre_they_cover(write):
    shapes = [
        shapely.box(10.4, 50.4, 10.6, 50.6),  # Less than the first tile, around its centre.
        shapely.box(11.6, 50, 12.4, 51),  # Parts of two tiles, without a centre.
        shapely.box(12.45, 50, 14, 51),
        shapely.box(13.1, 50, 13.9, 51),
        shapely.box(9, 40, 20, 41),
    ]
    found = labels_of(write(shapes, ["a", "b", "c", "d", "e"]))
    assert found.labels == ["a", None, "c", None]
    assert found.num_ambiguous == 1


def test_collections_and_holes_count_as_what_they_hold(write):
    ring = shapely.difference(shapely.box(11, 50, 12, 51), shapely.box(11.2, 50.2, 11.8, 50.8))
    shapes = [shapely.MultiPoint([(10.5, 50.5), (13.5, 50.5)]), ring, shapely.MultiPolygon([ring])]
    assert labels_of(write(shapes, ["a", "b", "b"])).labels == ["a", None, None, "a"]


def test_rows_without_geometry_or_class_do_not_count(write):
    shapes = [*points((10.5, 50.5), (10.5, 50.5), (11.5, 50.5)), None, shapely.Point()]
    shapes.append(shapely.GeometryCollection([shapely.Point(), shapely.Point(12.5, 50.5)]))
    found = labels_of(write(shapes, ["a", None, " ", "c", "d", "e"]))
    assert found.labels == ["a", None, "e", None]
    assert found.num_ambiguous == 0


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (pa.array([3, 12], pa.uint8()), ["3", "12"]),
        (pa.array([3, 12], pa.float64()), ["3", "12"]),
        (pa.array([3, float("nan")]), ["3", None]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([True, False]), ["true", "false"]),
    ],
)
def test_classes_of_any_plain_type_become_text(write, classes, expected):
    assert labels_of(write(points((10.5, 50.5), (11.5, 50.5)), classes)).labels[:2] == expected


@given(
    st.sampled_from(["EPSG:32632", "EPSG:3035", "EPSG:3857", "EPSG:4258"]),
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 0.99), st.floats(0.01, 0.99))),
)
def test_the_crs_of_the_file_makes_no_difference(write, crs, places):
    places = [(0, 0.5, 0.5), *places]
    lonlat = np.array([(10 + tile + x, 50 + y) for tile, x, y in places])
    there = np.stack(rasterio.warp.transform("OGC:CRS84", crs, *lonlat.T), axis=1)
    shapes, classes = points(*there), [str(tile) for tile, _, _ in places]
    found = labels_of(write(shapes, classes, crs=projjson(crs)))
    assert found.labels == [str(i) if str(i) in classes else None for i in range(4)]
    around = [shapely.buffer(point, 1e-9) for point in shapes]
    over = labels_of(write(around[:1], classes[:1], crs=projjson(crs)))
    assert over.labels == ["0", None, None, None]


def test_files_may_count_longitudes_from_0_to_360(write):
    tiles = [shapely.to_wkb(shapely.box(west, -1, west + 2, 1)) for west in (-120, 0, 178)]
    assert labels_of(write(points((241, 0)), ["a"]), tiles).labels == ["a", None, None]
    both = [shapely.box(239, -9, 243, 9), shapely.box(0, -9, 5, 9)]
    assert labels_of(write(both, ["a", "b"]), tiles).labels == ["a", "b", None]


def test_tiles_across_the_antimeridian_have_labels_on_both_sides(write):
    grid = Grid(256, 256, "EPSG:32660", (1000, 0, 7e5, 0, -1000, 1.28e5))
    tiles = footprints(grid, np.array([0]), np.array([0]), 256).geometry
    for lon in (179.9, -179.9):
        assert labels_of(write(points((lon, 0)), ["a"]), tiles).labels == ["a"]


def test_tiles_far_outside_the_file_s_projection_have_no_label(write):
    tiles = [None, shapely.to_wkb(shapely.box(-90, -40, -89, -39)), ROW[0]]
    path = write([shapely.box(5e5, 5.5e6, 7e5, 5.7e6)], ["a"], crs=projjson("EPSG:32632"))
    assert labels_of(path, tiles).labels == [None, None, "a"]


def test_footprints_of_a_grid_and_labels_fit(write):
    grid = Grid(64, 64, "EPSG:32632", (10, 0, 5e5, 0, -10, 5e6))
    rows, cols = np.indices((4, 4)).reshape(2, -1)
    tiles = footprints(grid, rows, cols, 16).geometry
    centres = points(*zip(5e5 + cols * 160 + 80, 5e6 - rows * 160 - 80, strict=True))
    names = [f"r{row}c{col}" for row, col in zip(rows, cols, strict=True)]
    path = write(centres, names, crs=projjson("EPSG:32632"))
    assert labels_of(path, tiles).labels == names
    path = write([shapely.buffer(c, 20) for c in centres], names, crs=projjson("EPSG:32632"))
    assert labels_of(path, tiles).labels == names


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"encoding": "point"},
            "geometry column 'geom' is binary with encoding 'point'; expected binary",
        ),
        ({"crs": None}, r"says that the CRS of its geometry is unknown \(null\)"),
        ({"crs": {"type": "nonsense"}}, "its CRS '.*nonsense.*' is not known"),
        (
            {"crs": projjson("IAU_2015:30100")},
            "its CRS 'IAU_2015:30100' has no longitude and latitude",
        ),
    ],
)
def test_files_that_are_not_understood_are_refused(write, facts, message):
    path = write(points((10.5, 50.5)), ["a"], **facts)
    with pytest.raises(ArchiveError, match=message):
        labels_of(path)


def test_a_missing_column_lists_the_others(write):
    path = write(points((10.5, 50.5)), ["a"], column="land_cover")
    with pytest.raises(
        ArchiveError, match="has no column 'label' of classes, .* it has 'land_cover'"
    ):
        labels_of(path)
    config = LabelsConfig(vector="labels.parquet", column="land_cover")
    assert labels_of(path, config=config).labels[0] == "a"


def test_classes_that_are_no_text_are_refused(write):
    path = write(points((10.5, 50.5)), [[1, 2]])
    with pytest.raises(ArchiveError, match="column 'label', .* has type list<.*>; expected"):
        labels_of(path)


def test_lines_are_refused(write):
    path = write([shapely.LineString([(10, 50), (11, 51)])], ["a"])
    with pytest.raises(
        ArchiveError, match="has geometry of type linestring; expected points and pol"
    ):
        labels_of(path)


def test_labels_elsewhere_are_an_error(write):
    path = write(points((50.5, 10.5)), ["a"])
    message = r"none of its 1 points .* \(50.5, 10.5\) to .* the tiles \(10, 50\) to \(14, 51\)"
    with pytest.raises(ArchiveError, match=message):
        labels_of(path)


def test_tiles_without_footprints_are_an_error(write):
    with pytest.raises(ArchiveError, match="labels.vector: no tile has a longitude and latitude"):
        labels_of(write(points((0, 0)), ["a"]), [None, None])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; expected GeoParquet"),
        (b"PAR1 and more", "cannot be read: .*; expected GeoParquet"),
    ],
)
def test_files_that_cannot_be_read_are_an_error(tmp_path, content, message):
    path = tmp_path / "labels.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        labels_of(str(path))


@pytest.mark.parametrize("geo", [None, "[", "[]", '{"primary_column": "x", "columns": {}}', "null"])
def test_parquet_without_geo_metadata_is_refused(tmp_path, geo):
    path = tmp_path / "labels.parquet"
    table = pa.table({"geometry": pa.array([b""]), "label": ["a"]})
    pq.write_table(table.replace_schema_metadata({"geo": geo} if geo else None), path)
    with pytest.raises(ArchiveError, match="has no usable 'geo' metadata, so it is not GeoParquet"):
        labels_of(str(path))


def test_broken_wkb_is_an_error(tmp_path, write):
    path = write(points((10.5, 50.5)), ["a"])
    metadata = pq.read_schema(path).metadata
    table = pa.table({"geom": pa.array([b"\x01\x02"]), "label": ["a"]})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(
        ArchiveError, match="labels.parquet: cannot be read: .*; expected GeoParquet"
    ):
        labels_of(path)


def test_files_outside_the_roots_are_not_opened(write, tmp_path):
    path = write(points((10.5, 50.5)), ["a"])
    with pytest.raises(ArchiveError, match="labels.parquet points to .*, outside .*elsewhere"):
        vector_labels(VECTOR, path, Access((str(tmp_path / "elsewhere"),)), ROW)
