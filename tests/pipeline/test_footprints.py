"""Footprints: laws over grids all around the Earth, and tables by hand where it is awkward."""

import numpy as np
import pytest
import rasterio.warp
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SceneError
from pipeline.planning.footprints import footprints, many_footprints
from pipeline.scenes import Grid

# Where grids of a CRS may begin (x and y, in its units), and the size of a pixel.
ZONES = {
    "EPSG:32632": ((2e5, 8e5), (-2e6, 9e6), (0.3, 100)),
    "EPSG:32601": ((1e5, 3e5), (0, 9e6), (0.3, 100)),
    "EPSG:32760": ((7e5, 9e5), (1e6, 9e6), (0.3, 100)),
    "EPSG:3857": ((-2e7, 2e7), (-1e7, 1e7), (1, 2000)),
    "EPSG:3832": ((3e6, 3.5e6), (-5e6, 5e6), (1, 2000)),
    "EPSG:3035": ((2e6, 6e6), (2e6, 5e6), (1, 2000)),
    "EPSG:4326": ((-180, 350), (-50, 50), (1e-5, 0.02)),
    "OGC:CRS84": ((-180, 350), (-50, 50), (1e-5, 0.02)),
    "EPSG:4269": ((-180, -60), (20, 80), (1e-5, 0.01)),
}
POLAR = {
    "EPSG:3031": ((-3e6, 3e6), (-3e6, 3e6), (1, 3000)),
    "EPSG:3413": ((-3e6, 3e6), (-3e6, 3e6), (1, 3000)),
    "EPSG:5041": ((-1e6, 5e6), (-1e6, 5e6), (1, 3000)),
    "EPSG:32661": ((1.9e6, 2.1e6), (1.9e6, 2.1e6), (1, 3000)),
    # Coordinates of this projection are inverted to no better than 0.1 m at the pole.
    "EPSG:6931": ((-1e5, 1e5), (-1e5, 1e5), (20, 3000)),
}


@st.composite
def grids(draw, zones):
    """A grid of up to 3 x 3 tiles in one of these zones, some of them rotated or with south up."""
    crs = draw(st.sampled_from(sorted(zones)))
    (x, y, size) = zones[crs]
    tile_px = draw(st.sampled_from([16, 128, 512]))
    pixel = draw(st.floats(*size))
    angle = draw(st.sampled_from([0, 0, 0, 30, 75, 180])) / 180 * np.pi
    up = draw(st.sampled_from([-1, -1, 1]))
    cos, sin = pixel * np.cos(angle), pixel * np.sin(angle)
    transform = (cos, sin * up, draw(st.floats(*x)), sin, cos * -up, draw(st.floats(*y)))
    sides = st.integers(4, tile_px).flatmap(
        lambda cut: st.sampled_from([cut, cut + tile_px, cut + 2 * tile_px])
    )
    height, width = draw(sides), draw(sides)
    return Grid(height, width, crs, transform), tile_px


def all_tiles(grid, tile_px):
    """Rows and columns of all tiles of a grid."""
    return np.indices((-(-grid.height // tile_px), -(-grid.width // tile_px))).reshape(2, -1)


def footprints_of(grid, tile_px):
    """All footprints of a grid, and their geometry as shapes."""
    found = footprints(grid, *all_tiles(grid, tile_px), tile_px)
    return found, shapely.from_wkb(np.array(found.geometry, dtype=object))


def lonlat(grid, cols, rows):
    """Longitude in [-180, 180) and latitude of pixel positions, by the definition of the transform."""
    a, b, c, d, e, f = grid.transform
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    if grid.crs in ("EPSG:4326", "OGC:CRS84"):
        y = np.clip(y, -90, 90)
    lons, lats = rasterio.warp.transform(grid.crs, "OGC:CRS84", x, y)
    return (np.array(lons) + 180) % 360 - 180, np.array(lats)


def inside_box(box, lons, lats):
    west, south, east, north = box
    width = (east - west) % 360 if east - west < 360 else 360
    # As much as numbers of this size are rounded by; within a metre of a pole, longitudes mean little.
    lons = np.where(np.abs(lats) > 90 - 1e-5, west, lons)
    return (
        ((lons - west + 1e-11) % 360 <= width + 2e-11)
        & (lats > south - 1e-11)
        & (lats < north + 1e-11)
    )


def positions(grid, tile_px, row, col, inset_px, count=60):
    """Pixel positions (cols, rows) around a tile, `inset_px` inside its part of the grid."""
    top, left = row * tile_px + inset_px, col * tile_px + inset_px
    bottom = min(row * tile_px + tile_px, grid.height) - inset_px
    right = min(col * tile_px + tile_px, grid.width) - inset_px
    # An irrational number of points: none falls where the outline has its own.
    t = np.linspace(0, 1, count) * 0.9937 + 0.0031
    ends = np.ones(count)
    cols = np.concatenate(
        [left + (right - left) * t, right * ends, left + (right - left) * t, left * ends]
    )
    rows = np.concatenate(
        [top * ends, top + (bottom - top) * t, bottom * ends, top + (bottom - top) * t]
    )
    return cols, rows


def check_laws(grid, tile_px, tolerance_px):
    found, shapes = footprints_of(grid, tile_px)
    assert shapely.is_valid(shapes).all()
    assert (shapely.area(shapes) > 0).all()
    parts = shapely.get_parts(shapes)
    assert shapely.is_ccw(shapely.get_exterior_ring(parts)).all()
    assert (np.abs(shapely.get_coordinates(shapes)) <= (180, 90)).all()
    for row, col, shape, box in zip(
        *all_tiles(grid, tile_px), shapes, found.lonlat_box, strict=True
    ):
        inner = lonlat(grid, *positions(grid, tile_px, row, col, tolerance_px))
        outer = lonlat(grid, *positions(grid, tile_px, row, col, -tolerance_px))
        assert shapely.intersects_xy(shape, *inner).all()
        assert not shapely.intersects_xy(shape, *outer).any()
        assert inside_box(box, *lonlat(grid, *positions(grid, tile_px, row, col, 0))).all()


@given(grids(ZONES))
def test_footprints_are_the_tiles_to_a_fiftieth_of_a_pixel(grid):
    check_laws(*grid, tolerance_px=0.02)


@given(grids(POLAR))
def test_footprints_near_the_poles_are_the_tiles_to_a_pixel(grid):
    check_laws(*grid, tolerance_px=1)


@given(grids(ZONES), st.randoms(use_true_random=False))
def test_a_footprint_does_not_depend_on_the_other_tiles(grid, random):
    grid, tile_px = grid
    found, _ = footprints_of(grid, tile_px)
    tile = random.randrange(len(found.geometry))
    alone = footprints(
        grid, *(index[tile : tile + 1] for index in all_tiles(grid, tile_px)), tile_px
    )
    assert alone.geometry == found.geometry[tile : tile + 1]
    assert alone.lonlat_box.tolist() == found.lonlat_box[tile : tile + 1].tolist()


@pytest.mark.parametrize("crs", ["EPSG:3031", "EPSG:3413", "EPSG:32661"])
@pytest.mark.parametrize("miss_px", [0, 1e-9, 1e-6, 1e-3, 0.1, 5])
@pytest.mark.parametrize("along_px", [0, 1, 64, 128 / 3])
def test_outlines_that_just_miss_a_pole_are_right_to_a_pixel(crs, miss_px, along_px):
    for x, y in ((along_px, miss_px), (128 - miss_px, along_px), (along_px, 128 + miss_px)):
        origin = 2e6 if crs == "EPSG:32661" else 0
        transform = (10, 0, origin - 10 * x, 0, -10, origin + 10 * y)
        check_laws(Grid(256, 256, crs, transform), 128, tolerance_px=1)


@pytest.mark.parametrize(
    ("crs", "pixel", "x", "y", "tile_px"),
    [
        ("EPSG:3031", 26.64768671057284, -3410.9038989799715, 1705.451922828975, 128),
        ("EPSG:3031", 1451.6355270400913, -185809.34745968005, 94356.30925760594, 128),
        ("EPSG:5041", 257.10429335977153, 1868362.601800054, 2032909.349807155, 512),
    ],
)
def test_sides_that_rounding_puts_beside_a_pole_are_right(crs, pixel, x, y, tile_px):
    grid = Grid(2 * tile_px, 2 * tile_px, crs, (pixel, 0, x, 0, -pixel, y))
    check_laws(grid, tile_px, tolerance_px=1)


def test_a_centre_that_rounding_puts_on_the_antimeridian_is_in_its_tile():
    side, other = 4.762422676098929, 4.762422676098928
    transform = (side, other, -1828.7703076219886, other, -side, -610.2636108144919)
    check_laws(Grid(256, 256, "EPSG:3571", transform), 128, tolerance_px=1)


def test_a_small_tile_has_four_corners_and_edge_tiles_end_with_the_grid():
    grid = Grid(200, 100, "EPSG:4326", (0.5, 0, 10, 0, -0.25, 50))
    found, shapes = footprints_of(grid, 128)
    assert shapes[0].equals_exact(shapely.box(10, 18, 60, 50), normalize=True)
    assert shapes[1].equals_exact(shapely.box(10, 0, 60, 18), normalize=True)
    assert found.bounds.tolist() == [[10, 18, 60, 50], [10, 0, 60, 18]]
    assert found.lonlat_box.tolist() == found.bounds.tolist()


def test_large_tiles_have_more_points_than_small_ones():
    small = Grid(128, 128, "EPSG:32632", (10, 0, 6e5, 0, -10, 5.3e6))
    large = Grid(128, 128, "EPSG:32632", (1000, 0, 6e5, 0, -1000, 5.3e6))
    points = [shapely.get_num_coordinates(footprints_of(g, 128)[1])[0] for g in (small, large)]
    assert points[0] == 5
    assert points[1] > 16


def test_longitudes_from_0_to_360_end_up_within_180():
    grid = Grid(10, 360, "OGC:CRS84", (1, 0, 0, 0, -1, 5))
    found, shapes = footprints_of(grid, 120)
    expected = [
        shapely.box(0, -5, 120, 5),
        shapely.union(shapely.box(120, -5, 180, 5), shapely.box(-180, -5, -120, 5)),
        shapely.box(-120, -5, 0, 5),
    ]
    assert shapely.equals(shapes, expected).all()
    assert [shape.geom_type for shape in shapes] == ["Polygon", "MultiPolygon", "Polygon"]
    assert found.lonlat_box[:, [0, 2]].tolist() == [[0, 120], [120, -120], [-120, 0]]
    assert found.bounds[1].tolist() == [120, -5, 240, 5]


def test_a_utm_tile_across_the_antimeridian_is_cut_there():
    # The border of zones 60 and 1 is at the antimeridian; 60 goes on beyond it here.
    grid = Grid(256, 256, "EPSG:32660", (1000, 0, 7e5, 0, -1000, 1.28e5))
    found, (shape,) = footprints_of(grid, 256)
    assert shape.geom_type == "MultiPolygon"
    east, west = sorted(shape.geoms, key=lambda part: -part.bounds[0])
    assert east.bounds[2] == 180
    assert west.bounds[0] == -180
    # The same tile in the zone next door, with the antimeridian in its middle.
    assert found.lonlat_box[0] == pytest.approx([178.8, -1.157, -178.9, 1.157], abs=0.02)


def test_tiles_side_by_side_at_the_antimeridian_are_not_cut():
    grid = Grid(128, 256, "EPSG:3857", (1000, 0, 20037508.342789244 - 128000, 0, -1000, 0))
    found, shapes = footprints_of(grid, 128)
    assert [shape.geom_type for shape in shapes] == ["Polygon", "Polygon"]
    assert shapes[0].bounds[2] == 180
    assert shapes[1].bounds[0] == -180
    assert (found.lonlat_box[:, 0] < found.lonlat_box[:, 2]).all()


@pytest.mark.parametrize(("crs", "latitude"), [("EPSG:3031", -90), ("EPSG:3413", 90)])
def test_a_tile_around_a_pole_reaches_all_longitudes(crs, latitude):
    grid = Grid(384, 384, crs, (100, 0, -19_000, 0, -100, 19_500))
    found, shapes = footprints_of(grid, 128)
    assert shapes[4].geom_type == "Polygon"
    assert shapes[4].covers(shapely.LineString([(-180, latitude), (180, latitude)]))
    assert found.lonlat_box[4, [0, 2]].tolist() == [-180, 180]
    assert latitude in found.lonlat_box[4]
    assert np.count_nonzero(np.abs(found.lonlat_box[:, [1, 3]]) == 90) == 1


@pytest.mark.parametrize(("crs", "west"), [("EPSG:3031", 0), ("EPSG:32661", 0), ("EPSG:5041", 0)])
def test_four_tiles_that_meet_at_a_pole_are_triangles_to_it(crs, west):
    origin = 0 if crs == "EPSG:3031" else 2e6
    grid = Grid(256, 256, crs, (100, 0, origin - 12_800, 0, -100, origin + 12_800))
    found, shapes = footprints_of(grid, 128)
    assert {shape.geom_type for shape in shapes} <= {"Polygon", "MultiPolygon"}
    # Quarters of the way around, that share no more than their sides. All longitudes meet at the pole.
    quarters = np.sort([(part.bounds[0] - west) % 360 for part in shapes])
    assert quarters == pytest.approx([0, 90, 180, 270])
    assert [part.bounds[2] - part.bounds[0] for part in shapes] == pytest.approx([90] * 4)
    assert shapely.area(shapely.union_all(shapes)) == pytest.approx(shapely.area(shapes).sum())
    assert found.lonlat_box[:, [0, 2]].tolist() == [[-180, 180]] * 4
    # Sides that end at the pole are meridians and need no further points.
    assert shapely.get_num_coordinates(shapes).max() < 600
    assert (np.abs(found.lonlat_box[:, [1, 3]]).max(1) == 90).all()


def test_tiles_with_a_pole_on_their_side_reach_it():
    # The side runs through the pole, a third of the way along.
    grid = Grid(96, 96, "EPSG:3031", (1000, 0, 0, 0, -1000, 32_000))
    found, (shape,) = footprints_of(grid, 96)
    assert shape.bounds[:3] == pytest.approx((0, -90, 180))
    assert found.lonlat_box[0, :3].tolist() == [-180, -90, 180]
    assert shape.covers(shapely.Point(90, -90))


def test_pixels_centred_on_the_poles_reach_no_further():
    grid = Grid(721, 1440, "EPSG:4326", (0.25, 0, -180.125, 0, -0.25, 90.125))
    found, shapes = footprints_of(grid, 721)
    assert shapes[1].bounds == (0.125, -90, 179.875, 90)
    assert found.lonlat_box[0].tolist() == [179.875, -90, 0.125, 90]
    assert found.bounds[0].tolist() == [-180.125, -90.125, 0.125, 90.125]


@pytest.mark.parametrize(
    ("crs", "transform", "shape"),
    [
        ("EPSG:4326", (1, 0, -180, 0, -1, 90), (180, 360)),
        ("EPSG:4326", (1, 0, 0, 0, -1, 90), (180, 360)),
        # One column twice, as some climate data have it.
        ("EPSG:4326", (1, 0, 0, 0, -1, 90), (180, 361)),
    ],
)
def test_the_whole_earth_can_be_one_tile(crs, transform, shape):
    found, (polygon,) = footprints_of(Grid(*shape, crs, transform), 512)
    assert polygon.equals(shapely.box(-180, -90, 180, 90))
    assert found.lonlat_box[0].tolist() == [-180, -90, 180, 90]


def test_the_whole_web_mercator_square_can_be_one_tile():
    pixel = 156543.03392804097
    _, (shape,) = footprints_of(
        Grid(256, 256, "EPSG:3857", (pixel, 0, -128 * pixel, 0, -pixel, 128 * pixel)), 256
    )
    assert shape.bounds == pytest.approx((-180, -85.0511288, 180, 85.0511288))
    assert shape.area == pytest.approx(360 * 170.1022576)


def test_tiles_that_see_past_the_earth_have_no_footprint():
    crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y"
    grid = Grid(3712, 3712, crs, (3000.4, 0, -5568748.3, 0, -3000.4, 5568748.3))
    found, shapes = footprints_of(grid, 464)
    unknown = shapely.is_missing(shapes).reshape(8, 8)
    assert unknown[0].all()
    assert not unknown[2:6, 2:6].any()
    assert (np.isnan(found.lonlat_box).any(1) == unknown.ravel()).all()
    assert np.isfinite(found.bounds).all()


def test_a_grid_off_its_projection_is_an_error():
    grid = Grid(128, 128, "EPSG:32632", (10, 0, 1e9, 0, -10, 1e9))
    with pytest.raises(
        SceneError, match=r"^lies outside the domain of its CRS \(128 x 128 px, EPSG:32632"
    ):
        footprints(grid, *all_tiles(grid, 128), 128)


def test_an_outline_whose_inside_is_not_the_tile_is_no_footprint():
    # Both poles are inside; the outline runs around the ground opposite.
    grid = Grid(300, 300, "+proj=aeqd +lat_0=0 +lon_0=0", (1e5, 0, -1.4e7, 0, -1e5, 1.4e7))
    with pytest.raises(SceneError, match="no tile has a longitude and latitude"):
        footprints(grid, np.array([0]), np.array([0]), 280)


def test_a_crs_that_is_not_on_the_earth_leaves_bounds_alone():
    grid = Grid(128, 128, "IAU_2015:30100", (1, 0, 0, 0, -1, 60))
    found = footprints(grid, *all_tiles(grid, 128), 128)
    assert found.geometry == [None]
    assert found.bounds.tolist() == [[0, -68, 128, 60]]
    assert np.isnan(found.lonlat_box).all()


def test_grids_without_a_crs_have_no_footprints():
    assert footprints(Grid(9, 9, None, None), *all_tiles(Grid(9, 9, None, None), 4), 4) is None


@given(st.lists(grids({**ZONES, **POLAR}), max_size=5), st.randoms(use_true_random=False))
def test_many_grids_at_once_are_as_one_by_one(drawn, random):
    places = [grid for grid, _ in drawn] + [Grid(99, 99, None, None)]
    random.shuffle(places)
    tiles = [all_tiles(grid, 64) for grid in places]
    which = np.repeat(np.arange(len(places)), [index.shape[1] for index in tiles])
    many = many_footprints(places, which, *np.concatenate(tiles, axis=1), 64)
    for number, (grid, index) in enumerate(zip(places, tiles, strict=True)):
        one = footprints(grid, *index, 64)
        mine = which == number
        if one is None:
            assert not any(np.array(many.geometry, object)[mine])
            assert np.isnan([many.bounds[mine], many.lonlat_box[mine]]).all()
        else:
            assert np.array(many.geometry, object)[mine].tolist() == one.geometry
            assert many.bounds[mine].tolist() == one.bounds.tolist()
            assert many.lonlat_box[mine].tolist() == one.lonlat_box.tolist()


def test_a_grid_off_its_projection_leaves_others_alone():
    right = Grid(128, 128, "EPSG:32632", (10, 0, 5e5, 0, -10, 5e6))
    wrong = Grid(128, 128, "EPSG:32632", (10, 0, 1e9, 0, -10, 1e9))
    found = many_footprints([wrong, right], np.array([1, 0, 1]), np.zeros(3), np.zeros(3), 128)
    assert [wkb is not None for wkb in found.geometry] == [True, False, True]


def test_no_tiles_have_no_footprints():
    grid = Grid(9, 9, "EPSG:4326", (1, 0, 0, 0, -1, 0))
    found = footprints(grid, np.array([], int), np.array([], int), 4)
    assert (found.geometry, found.bounds.shape, found.lonlat_box.shape) == ([], (0, 4), (0, 4))
