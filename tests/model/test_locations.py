"""Where on Earth tiles lie, from the footprints in the manifest to the batch."""

import numpy as np
import pyarrow as pa
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import Augmentation, TileDataset, mix
from model.data.locations import centres
from pipeline.errors import IntegrityError
from pipeline.georef import Grid
from pipeline.jobs.job import run_job
from pipeline.planning.footprints import LONLAT, many_footprints, transformed
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from sentinels import CONFIG, make_archive
from support import Watching


def wkb(*shapes, byte_order=1):
    return pa.array(
        [None if s is None else shapely.to_wkb(s, byte_order=byte_order) for s in shapes],
        pa.binary(),
    )


@given(
    st.floats(-170, 170), st.floats(-80, 80), st.floats(0.001, 3), st.floats(0.001, 3),
    st.floats(0, 90), st.sampled_from([0, 1]),
)  # fmt: skip
def test_the_centre_of_a_polygon_is_its_centroid(lon, lat, width, height, turn, byte_order):
    shape = shapely.box(lon, lat, lon + width, lat + height)
    shape = shapely.affinity.rotate(shapely.difference(shape, shapely.Point(lon, lat)), turn)
    (found,) = centres(wkb(shape, byte_order=byte_order))
    assert found == pytest.approx((shape.centroid.y, shape.centroid.x), abs=1e-6)


@given(st.floats(0.01, 0.99), st.floats(-80, 80), st.floats(0.001, 3), st.sampled_from([0, 1]))
def test_a_tile_cut_at_the_antimeridian_has_its_centre_near_it(share, lat, width, byte_order):
    west, east = 180 - share * width, -180 + (1 - share) * width
    cut = shapely.MultiPolygon(
        [shapely.box(west, lat, 180, lat + 1), shapely.box(-180, lat, east, lat + 1)]
    )
    ((found_lat, found_lon),) = centres(wkb(cut, byte_order=byte_order))
    assert found_lat == pytest.approx(lat + 0.5, abs=1e-6)
    assert -180 <= found_lon < 180
    assert (found_lon - west) % 360 == pytest.approx(width / 2, abs=1e-6)


def test_parts_on_one_side_are_not_moved():
    parts = shapely.MultiPolygon([shapely.box(-9, 0, -8, 1), shapely.box(8, 0, 11, 1)])
    (found,) = centres(wkb(parts))
    assert found == pytest.approx((0.5, parts.centroid.x))


def test_footprints_of_any_form_among_others():
    """Alike and not, with a hole, with other byte order, cut in two: each its own centre."""
    hole = shapely.Polygon(shapely.box(5, 5, 9, 9).exterior, [shapely.box(6, 6, 7, 7).exterior])
    shapes = [
        shapely.box(0, 0, 2, 4), hole, shapely.box(10, 20, 12, 28), shapely.Point(7, 8).buffer(1),
        shapely.MultiPolygon([shapely.box(0, 0, 2, 4), shapely.box(2, 0, 4, 4)]),
    ]  # fmt: skip
    footprints = pa.concat_arrays([wkb(*shapes), wkb(shapely.box(0, 0, 2, 4), byte_order=0)])
    expected = [[2, 1], [7, 7], [24, 11], [8, 7], [2, 2], [2, 1]]
    np.testing.assert_allclose(centres(footprints), expected, atol=1e-9)


def test_unknown_places_are_nan():
    found = centres(wkb(None, shapely.box(0, 0, 2, 4), None))
    np.testing.assert_array_equal(found, [[np.nan, np.nan], [2, 1], [np.nan, np.nan]])


def test_a_footprint_without_area_has_the_mean_of_its_points():
    flat = shapely.Polygon([(1, 1), (1, 1), (1, 1), (1, 1)])
    assert centres(wkb(flat)).tolist() == [[1, 1]]


def test_tiles_of_a_utm_grid_are_where_their_centres_are():
    grid = Grid(width=960, height=960, crs="EPSG:32632", transform=(10, 0, 4e5, 0, -10, 5.2e6))
    rows, cols = (axis.ravel() for axis in np.indices((10, 10)))
    footprints = many_footprints([grid], np.zeros(100, np.int64), rows, cols, 96)
    at = np.stack([4e5 + 960 * (cols + 0.5), 5.2e6 - 960 * (rows + 0.5)], axis=1)
    lonlat = transformed("EPSG:32632", LONLAT, at[:, None])[:, 0]
    found = centres(pa.array(footprints.geometry, pa.binary()))
    np.testing.assert_allclose(found, lonlat[:, ::-1], atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", b"\x01\x03\x00\x00\x00", shapely.to_wkb(shapely.Point(0, 0)),
     shapely.to_wkb(shapely.box(0, 0, 1, 1))[:-3], shapely.to_wkb(shapely.Polygon()),
     shapely.to_wkb(shapely.MultiPolygon()),
     shapely.to_wkb(shapely.GeometryCollection([shapely.box(0, 0, 1, 1)]))],
)  # fmt: skip
def test_what_is_no_footprint_is_refused_in_words(content):
    with pytest.raises(IntegrityError, match="no WKB polygon.*aptile verify") as refused:
        centres(pa.array([content], pa.binary()))
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locations")
    make_archive(folder / "archive")
    (folder / "config.yaml").write_text(CONFIG)
    config = load_config(PreprocessConfig, folder / "config.yaml", ["run.workers=1"])
    run_job(str(folder / "archive"), folder / "store", config, Watching())
    return folder / "store"


def centroids(dataset, tiles):
    shapes = shapely.from_wkb(dataset.manifest["geometry"].take(tiles).to_pylist())
    return torch.tensor([[s.centroid.y, s.centroid.x] for s in shapes])


def test_a_batch_says_where_its_tiles_are(path):
    dataset = TileDataset(path)
    location = dataset.batch([5, 0, 2]).location
    assert location.dtype == torch.float32
    torch.testing.assert_close(location, centroids(dataset, [5, 0, 2]), rtol=0, atol=1e-4)
    assert len(location.unique(dim=0)) == 3


def test_a_turned_and_cropped_tile_is_where_it_was(path):
    dataset = TileDataset(path, modalities=["s1"])
    augment = Augmentation(flips=True, rotations=True, crop_px=48)
    augmented = TileDataset(path, modalities=["s1"], augment=augment).batch([3, 1], (0, 0))
    assert torch.equal(augmented.location, dataset.batch([3, 1]).location)


def test_joined_batches_know_every_tile(path, chip_store):
    sentinel, chip = TileDataset(path, modalities=["s2"]), TileDataset(chip_store)
    both = mix([(sentinel, 1.0), (chip, 1.0)])
    location = both.batch([len(sentinel), 2, 0]).location
    torch.testing.assert_close(location[:2], centroids(sentinel, [2, 0]), rtol=0, atol=1e-4)
    assert location[2].isnan().all()


def test_a_store_without_georeference_says_nan(chip_store):
    assert TileDataset(chip_store).batch([0, 4]).location.isnan().tolist() == [[True, True]] * 2
