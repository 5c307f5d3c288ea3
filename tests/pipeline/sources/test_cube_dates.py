"""Dates and processing baselines of data cubes, from coordinates and attributes."""

import numpy as np
import pytest

from cubes import DATES, cube, listed, save
from pipeline.errors import ArchiveError


def test_the_date_of_a_store_without_time(tmp_path):
    dataset = cube(num_steps=None)
    dataset.attrs["acquired"] = "18.09.2017"
    single = dataset.assign_coords(time=np.datetime64("2018-03-01T11:00:00", "ns"))
    save(single, tmp_path / "single.nc")
    tag = {"tag": "acquired", "format": "%d.%m.%Y"}
    assert listed(tmp_path / "single.nc").scenes[0].datetime == "2018-03-01T11:00:00Z"
    tagged = listed(tmp_path / "single.nc", dates=tag).scenes[0]
    assert tagged.datetime == "2017-09-18T00:00:00Z"
    with pytest.raises(ArchiveError, match=r"no attribute sensed \(dates.tag\)"):
        listed(tmp_path / "single.nc", dates={"tag": "sensed"})


def test_processing_baselines_along_time(tmp_path):
    dataset = cube().assign_coords(
        {"s2:processing_baseline": ("time", ["02.14", "04.00", "05.11"])}
    )
    scenes = listed(save(dataset, tmp_path / "a.zarr")).scenes
    assert [scene.baseline for scene in scenes] == ["02.14", "04.00", "05.11"]


@pytest.mark.parametrize(
    ("units", "values", "found"),
    [
        ("days since 1990-01-01", [11262, 11292], ["2020-11-01T00:00:00Z", "2020-12-01T00:00:00Z"]),
        ("hours since 2020-11-01 06:00", [0.5, 30], ["2020-11-01T06:30:00Z", "2020-11-02T12:00:00Z"]),
        ("seconds since 2020-11-01T00:00:00Z", [0, 1], ["2020-11-01T00:00:00Z", "2020-11-01T00:00:01Z"]),
    ],
)  # fmt: skip
def test_dates_of_cf_units(tmp_path, units, values, found):
    dataset = cube(num_steps=2).assign_coords(time=("time", values, {"units": units}))
    scenes = listed(save(dataset, tmp_path / "a.nc")).scenes
    assert sorted(scene.datetime for scene in scenes) == found


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (("time", [1, 2, 2], {"units": "days since 2000-01-01"}), "two time steps of 2000-01-03"),
        (
            ("time", [1, 2, 3], {"units": "days since 2000-01-01", "calendar": "360_day"}),
            "no dates",
        ),
        (("time", [20200101, 20200102, 20200103], {}), "units ''; expected such as"),
        (("time", ["2020-01-01", "soon", "2020-02-01"], {}), "date 'soon' cannot be read"),
    ],
)
def test_dates_that_cannot_be_used_are_refused(tmp_path, time, message):
    path = save(cube().assign_coords(time=time), tmp_path / "a.nc")
    with pytest.raises(ArchiveError, match=message):
        listed(path)


def test_steps_without_coordinate_and_missing_dates(tmp_path):
    with pytest.raises(ArchiveError, match="3 time steps along time, but no coordinate time"):
        listed(save(cube().drop_vars("time"), tmp_path / "a.nc"))
    dates = np.array([DATES[0], "NaT", DATES[2]], "M8[ns]")
    listing = listed(save(cube().assign_coords(time=dates), tmp_path / "b.nc"))
    assert len(listing.scenes) == 2
    assert listing.refused == {"b@1": "has no date: time step 1 is missing"}


def test_groups_of_different_dates_are_refused(tmp_path):
    for group, dates in (("a", DATES), ("b", DATES[::-1])):
        part = cube().assign_coords(time=np.array(dates, "M8[ns]"))
        part.to_netcdf(tmp_path / "a.nc", group=group, mode="a", engine="h5netcdf")
    assets = {"B02": "a/B02", "B03": "b/B03"}
    with pytest.raises(ArchiveError, match="time coordinates a/time, b/time differ"):
        listed(tmp_path / "a.nc", assets=assets)
    assert len(listed(tmp_path / "a.nc", assets={"B02": "a/B02", "B03": "a/B03"}).scenes) == 3
