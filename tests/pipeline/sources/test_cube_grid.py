"""Where the pixels of a data cube lie: coordinates, stated transforms, and all places a CRS may stand."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from cubes import NORTH, PIXEL, TRANSFORM, UTM, WEST, cube, listed, pixels, save
from pipeline.errors import ArchiveError
from pipeline.georef import canonical_crs
from pipeline.scenes import Grid

ROWS = NORTH - PIXEL * (np.arange(20) + 0.5)
COLS = WEST + PIXEL * (np.arange(30) + 0.5)


def grid(dataset, tmp_path, name="a.nc"):
    path = tmp_path / name
    path.unlink(missing_ok=True)
    return listed(save(dataset, path), bands=("B02",)).scenes[0].assets[0].grid


def image(y=ROWS, x=COLS, dims=("y", "x"), attrs=None, mapping=None, **more):
    """A dataset of one image with coordinates as they are given: values, or values and attributes."""
    rows, cols = ((given if isinstance(given, tuple) else (given, {})) for given in (y, x))
    coords = {dims[0]: (dims[0], *rows), dims[1]: (dims[1], *cols)}
    values = np.ones((len(rows[0]), len(cols[0])), np.uint16)
    dataset = xr.Dataset({"B02": (dims, values, attrs or {})}, coords=coords, **more)
    if mapping is not None:
        dataset["crs"] = ((), 0, mapping)
        dataset["B02"].attrs["grid_mapping"] = "crs"
    return dataset


@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    origin=st.tuples(st.integers(-(10**7), 10**7), st.integers(-(10**7), 10**7)),
    step=st.sampled_from([0.1, 1 / 3, 1.0, 10.0, 30.0, 0.00026949458523585647]),
    signs=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
)
def test_centres_of_pixels_give_the_corner_and_the_step(tmp_path, size, origin, step, signs):
    (rows, cols), (c, f) = size, origin
    a, e = step * signs[0], step * signs[1]
    y, x = f + e * (np.arange(rows) + 0.5), c + a * (np.arange(cols) + 0.5)
    if np.abs([c, f]).max() / step > 1e9:
        return
    found = grid(image(y, x, mapping={"crs_wkt": UTM}), tmp_path)
    assert (found.height, found.width, found.crs) == (rows, cols, "EPSG:32632")
    np.testing.assert_allclose(found.transform, (a, 0, c, 0, e, f), rtol=1e-9, atol=1e-6 * step)


def test_rows_may_ascend_and_pixels_keep_their_order(tmp_path):
    dataset = cube(num_steps=None).isel(y=slice(None, None, -1))
    (scene,) = listed(save(dataset, tmp_path / "a.zarr")).scenes
    (asset,) = scene.assets
    assert asset.grid.transform == (10.0, 0.0, WEST, 0.0, 10.0, NORTH - 200)
    np.testing.assert_array_equal(pixels(asset)[0], dataset["B02"].values)


def test_columns_may_come_before_rows(tmp_path):
    dataset = cube().transpose("time", "x", "y")
    scene = listed(save(dataset, tmp_path / "a.zarr")).scenes[1]
    assert scene.assets[0].grid == Grid(20, 30, "EPSG:32632", TRANSFORM)
    np.testing.assert_array_equal(pixels(scene.assets[0])[0], dataset["B02"].values[1].T)


@pytest.mark.parametrize(
    ("dims", "attrs"),
    [
        (("lat", "lon"), ({}, {})),
        (("Latitude", "Longitude"), ({}, {})),
        (("Y", "X"), ({}, {})),
        (("northing", "easting"), ({}, {})),
        (("u", "v"), ({"axis": "Y"}, {"axis": "X"})),
        (("u", "v"), ({"standard_name": "latitude"}, {"standard_name": "longitude"})),
        (("x", "y"), ({}, {})),
    ],
)  # fmt: skip
def test_rows_and_columns_by_name_or_cf_attributes(tmp_path, dims, attrs):
    swapped = dims == ("x", "y")
    y, x = (COLS, ROWS) if swapped else (ROWS, COLS)
    dataset = image((y, attrs[0]), (x, attrs[1]), dims, mapping={"crs_wkt": UTM})
    assert grid(dataset, tmp_path) == Grid(20, 30, "EPSG:32632", TRANSFORM)


def test_dimensions_that_are_no_rows_and_columns_are_refused(tmp_path):
    dataset = image(dims=("p", "q"))
    with pytest.raises(
        ArchiveError, match="dimensions p, q; expected rows and columns such as y and x"
    ):
        grid(dataset, tmp_path)
    further = dataset.rename(p="y", q="x").expand_dims(level=3)
    with pytest.raises(ArchiveError, match="a further dimension level of length 3"):
        grid(further, tmp_path)
    assert grid(further.isel(level=[1]), tmp_path).height == 20


@pytest.mark.parametrize(
    ("attrs", "mapping", "group"),
    [
        ({}, {"crs_wkt": UTM}, {}),
        ({}, {"spatial_ref": UTM, "GeoTransform": "500000 10 0 5000000 0 -10"}, {}),
        ({"proj:epsg": 32632}, None, {}),
        ({"proj:code": "EPSG:32632", "proj:transform": [10, 0, 5e5, 0, -10, 5e6, 0, 0, 1]}, None, {}),
        ({"crs": "+init=epsg:32632"}, None, {}),
        ({"crs": "32632"}, None, {}),
        ({}, None, {"epsg": 32632}),
        ({}, None, {"stac_discovery": {"properties": {"proj:code": "EPSG:32632"}}}),
        ({}, None, {"other_metadata": {"horizontal_CRS_code": "EPSG:32632"}}),
    ],
)  # fmt: skip
def test_the_crs_may_stand_in_many_places(tmp_path, attrs, mapping, group):
    dataset = image(attrs=attrs, mapping=mapping)
    dataset.attrs = group
    found = grid(dataset, tmp_path, "a.zarr")
    assert found == Grid(20, 30, "EPSG:32632", TRANSFORM)


def test_degrees_mean_longitude_and_latitude_only_where_units_say_so(tmp_path):
    y, x = 50 - 0.1 * np.arange(4), 5 + 0.1 * np.arange(5)
    units = {"units": "degrees_north"}, {"units": "degrees_east"}
    stated = image((y, units[0]), (x, units[1]), ("lat", "lon"))
    found = grid(stated, tmp_path)
    assert found.crs == canonical_crs("EPSG:4326")
    np.testing.assert_allclose(found.transform, (0.1, 0, 4.95, 0, -0.1, 50.05), atol=1e-12)
    assert grid(image(y, x, ("lat", "lon")), tmp_path) == Grid(4, 5, None, None)


def test_kilometres_become_metres(tmp_path):
    y, x = (ROWS / 1000, {"units": "km"}), (COLS / 1000, {"units": "km"})
    dataset = image(y, x, mapping={"crs_wkt": UTM})
    assert grid(dataset, tmp_path) == Grid(20, 30, "EPSG:32632", TRANSFORM)
    wrong = image((ROWS, {"units": "degrees"}), mapping={"crs_wkt": UTM})
    with pytest.raises(ArchiveError, match="in 'degrees', which does not fit its CRS EPSG:32632"):
        grid(wrong, tmp_path)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (ROWS + np.eye(20)[3] * 0.011, "y is not regular: it strays 0.0011 px"),
        (np.full(20, 7.0), "y is not regular"),
        (np.where(np.arange(20) == 4, np.nan, ROWS), "y is not finite everywhere"),
        (ROWS[:1], "y has a single value, so the pixel size is unknown"),
    ],
)
def test_irregular_coordinates_are_refused(tmp_path, y, message):
    with pytest.raises(ArchiveError, match=message):
        grid(image(y, mapping={"crs_wkt": UTM}), tmp_path)


def test_coordinates_may_stray_a_little(tmp_path):
    found = grid(image(ROWS + np.eye(20)[3] * 0.009, mapping={"crs_wkt": UTM}), tmp_path)
    assert found.transform == TRANSFORM


def stated(**coordinates):
    transform = "500000 10 0 5000000 0 -10"
    return image(**coordinates, mapping={"crs_wkt": UTM, "GeoTransform": transform})


def test_a_stated_transform_is_checked_against_coordinates(tmp_path):
    assert grid(stated(), tmp_path).transform == TRANSFORM
    # Single precision holds these to 0.25 m, more than the tolerance but no contradiction.
    assert grid(stated(y=ROWS.astype("float32")), tmp_path).transform == TRANSFORM
    assert grid(stated(y=ROWS[:1], x=COLS[:1]), tmp_path).transform == TRANSFORM
    corners = listed(save(stated(y=ROWS + 5, x=COLS - 5), tmp_path / "c.nc"), bands=("B02",))
    assert corners.scenes[0].assets[0].grid.transform == TRANSFORM
    assert "coordinates are corners of pixels" in corners.notes[0]
    for wrong in ({"y": ROWS + 10}, {"x": COLS[::-1]}, {"x": WEST + 20 * (np.arange(30) + 0.5)}):
        with pytest.raises(ArchiveError, match="contradict the transform it states"):
            grid(stated(**wrong), tmp_path)


def test_a_stated_transform_serves_without_coordinates(tmp_path):
    assert grid(stated().drop_vars(["y", "x"]), tmp_path).transform == TRANSFORM
    flat = image(mapping={"crs_wkt": UTM, "GeoTransform": "500000 0 0 5000000 0 -10"})
    with pytest.raises(ArchiveError, match="whose pixels have no size"):
        grid(flat, tmp_path)
    bad = image(mapping={"crs_wkt": UTM, "GeoTransform": "500000 10 zero"})
    with pytest.raises(
        ArchiveError, match="states GeoTransform '500000 10 zero'; expected six numbers"
    ):
        grid(bad, tmp_path)


@pytest.mark.parametrize(
    ("dataset", "note"),
    [
        (image(), "its coordinates have no CRS"),
        (image(mapping={"crs_wkt": UTM}).drop_vars(["y", "x"]), "its pixels have no coordinates"),
        (image(mapping={"grid_mapping_name": "sinusoidal"}), "'sinusoidal' has no WKT"),
    ],
)
def test_what_is_missing_makes_an_engineering_grid_and_a_note(tmp_path, dataset, note):
    listing = listed(save(dataset, tmp_path / "a.nc"), bands=("B02",))
    assert listing.scenes[0].assets[0].grid == Grid(20, 30, None, None)
    assert note in " ".join(listing.notes)


def test_an_unknown_crs_is_refused(tmp_path):
    with pytest.raises(ArchiveError, match="its CRS 'somewhere' is not known"):
        grid(image(attrs={"crs": "somewhere"}), tmp_path)
