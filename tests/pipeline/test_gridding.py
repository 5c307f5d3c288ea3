from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.gridding import (
    boxes_overlap,
    corner_key,
    grid_key,
    lonlat_box,
    named_grid,
    ratio_between,
    scaled,
)
from pipeline.scenes import Grid
from pipeline.settings.config import GridConfig

UTM = "EPSG:32632"


def utm(height=120, width=180, size=10.0, x=500_000.0, y=5_000_000.0, crs=UTM):
    return Grid(height, width, crs, (size, 0, x, 0, -size, y))


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 12), st.booleans())
def test_a_scaled_grid_is_related_by_its_factor(height, width, factor, rotated):
    turned = (6.0, 8.0, 7e5, 8.0, -6.0, 1e6) if rotated else (10.0, 0, 7e5, 0, -10.0, 1e6)
    grid = Grid(height, width, UTM, turned)
    assert ratio_between(grid, scaled(grid, Fraction(factor))) == factor
    engineering = Grid(height * factor, width * factor, None, None)
    assert ratio_between(engineering, Grid(height, width, None, None)) == factor


def test_the_three_resolutions_of_a_sentinel_2_tile_belong_together():
    fine, middle, coarse = utm(10_980, 10_980), utm(5490, 5490, 20), utm(1830, 1830, 60)
    assert ratio_between(fine, middle) == 2
    assert ratio_between(fine, coarse) == 6
    assert ratio_between(middle, coarse) == 3
    assert ratio_between(coarse, fine) == Fraction(1, 6)
    assert corner_key(fine) == corner_key(coarse)
    assert grid_key(fine) != grid_key(middle)


@pytest.mark.parametrize(
    "other",
    [
        utm(x=500_001.0),
        utm(size=10.001),
        utm(crs="EPSG:32633"),
        utm(height=121),
        utm(60, 80, 20),
        Grid(120, 180, UTM, (10, 0.1, 500_000, 0, -10, 5_000_000)),
        Grid(120, 180, UTM, (10, 0, 500_000, 0, 10, 5_000_000)),
        Grid(120, 180, None, None),
    ],
    ids=["shifted", "stretched", "zone", "taller", "shorter", "sheared", "upside down", "no CRS"],
)
def test_other_grids_are_not_the_same(other):
    assert ratio_between(utm(), other) is None


def test_rounding_of_a_transform_is_no_difference():
    noisy = utm(x=500_000.0000001)
    assert ratio_between(utm(), noisy) == 1
    assert grid_key(utm()) == grid_key(noisy)


def test_a_named_grid_is_what_was_named():
    config = GridConfig(crs="epsg:32632", origin=(5e5, 5e6), pixel_size=20, shape=(30, 40))
    assert named_grid(config) == Grid(30, 40, UTM, (20, 0, 5e5, 0, -20, 5e6))
    assert named_grid(GridConfig()) is None


def test_a_box_covers_the_grid_also_across_the_antimeridian():
    box = lonlat_box(utm())
    assert box == pytest.approx([9, 45.14, 9.02, 45.15], abs=0.01)
    fiji = lonlat_box(utm(1000, 8000, 100, 400_000, 8_100_000, "EPSG:32760"))
    west, south, east, north = fiji
    assert 170 < west < 180
    assert -180 < east < -170
    assert south < north < 0
    assert lonlat_box(Grid(5, 5, None, None)) is None


longitude = st.floats(-180, 180)


@given(longitude, st.floats(0.1, 90), longitude, st.floats(0.1, 90), st.floats(-80, 70))
def test_boxes_overlap_where_a_point_lies_in_both(west, width, other_west, other_width, south):
    def box(start, extent):
        return np.array([start, south, (start + extent + 180) % 360 - 180, south + 10])

    first, second = box(west, width), box(other_west, other_width)
    ahead = (other_west - west) % 360
    # Boxes that only touch are neither here nor there.
    if min(abs(ahead - width), abs((west - other_west) % 360 - other_width), ahead) < 1e-9:
        return
    expected = ahead < width or (west - other_west) % 360 < other_width
    assert boxes_overlap(first, second[None])[0] == expected
    assert boxes_overlap(second, first[None])[0] == expected
    assert not boxes_overlap(first, second[None] + [0, 20, 0, 20])[0]
