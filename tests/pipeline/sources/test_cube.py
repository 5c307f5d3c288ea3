"""Which scenes a Zarr store or netCDF file holds: bands, time steps, groups, numbers and their meaning."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from cubes import NORTH, TRANSFORM, UTM, WEST, cube, listed, numbers, pixels, save
from pipeline.errors import ArchiveError, ConfigError
from pipeline.scenes import Access, Grid, Plane
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube import files_of, list_cube

FORMS = [("a.zarr", 2), ("a.zarr", 3), ("a.nc", 0)]


@pytest.mark.parametrize(("name", "zarr_format"), FORMS)
def test_every_time_step_is_a_scene(tmp_path, name, zarr_format):
    dataset = cube()
    listing = listed(save(dataset, tmp_path / "s2" / name, zarr_format), tmp_path, name="s2")
    assert [scene.id for scene in listing.scenes] == [
        "s2/a@20201101T000000",
        "s2/a@20201201T000000",
        "s2/a@20210115T102030",
    ]
    assert [scene.datetime for scene in listing.scenes] == [
        "2020-11-01T00:00:00Z",
        "2020-12-01T00:00:00Z",
        "2021-01-15T10:20:30Z",
    ]
    assert listing.refused == listing.skipped == {}
    assert list(listing.files) == [f"s2/{name}"]
    for step, scene in enumerate(listing.scenes):
        (asset,) = scene.assets
        assert asset.grid == Grid(20, 30, "EPSG:32632", TRANSFORM)
        assert [plane.band for plane in asset.planes] == ["B02", "B03"]
        assert (asset.kind, asset.dtype, asset.select) == ("array", "uint16", (("time", step),))
        assert asset.href == str(tmp_path / "s2" / name)
        stored = np.stack([dataset[band].values[step] for band in ("B02", "B03")])
        np.testing.assert_array_equal(pixels(asset), stored)


@pytest.mark.parametrize(("name", "zarr_format"), FORMS)
def test_a_store_without_time_is_one_scene(tmp_path, name, zarr_format):
    path = save(cube(num_steps=None), tmp_path / name, zarr_format)
    (scene,) = listed(path, bands=("B03", "B02")).scenes
    assert (scene.id, scene.datetime, scene.assets[0].select) == ("a", None, ())
    assert [plane.key for plane in scene.assets[0].planes] == ["B03", "B02"]


def test_a_static_modality_takes_the_first_step(tmp_path):
    dataset = cube(bands=("elevation",))
    listing = listed(save(dataset, tmp_path / "a.nc"), name="dem", static=True)
    (scene,) = listing.scenes
    assert (scene.id, scene.datetime) == ("a", None)
    np.testing.assert_array_equal(pixels(scene.assets[0])[0], dataset["elevation"].values[0])
    assert listing.notes == (
        "a.nc: the modality is static, so the first of its 3 time steps is taken",
    )


def eopf(path: Path) -> Path:
    """A product like those of the Copernicus EOPF samples: bands of 10 and 20 m in groups, Zarr 2."""
    properties = {"datetime": "2025-06-10T10:36:41.024Z", "proj:epsg": 32632}
    root = zarr.create_group(path, zarr_format=2, attributes={
        "stac_discovery": {"properties": properties},
        "other_metadata": {"horizontal_CRS_code": "EPSG:32632"},
    })  # fmt: skip
    for name, side, bands in (("r10m", 24, ("b02", "b03")), ("r20m", 12, ("b05", "scl"))):
        group = root.require_group(f"measurements/reflectance/{name}")
        pixel = 240 / side
        for dim, values in (
            ("y", NORTH - pixel * (np.arange(side) + 0.5)),
            ("x", WEST + pixel * (np.arange(side) + 0.5)),
        ):
            attributes = {"_ARRAY_DIMENSIONS": [dim]}
            group.create_array(dim, data=values.astype("int64"), attributes=attributes)
        for band in bands:
            attributes = {"_ARRAY_DIMENSIONS": ["y", "x"], "scale_factor": 1e-4, "add_offset": -0.1}
            group.create_array(
                band, data=numbers((side, side)), chunks=(9, 9), fill_value=0, attributes=attributes
            )
    return path


def test_groups_hold_bands_of_several_resolutions(tmp_path):
    inner = "measurements/reflectance"
    assets = {"B02": f"{inner}/r10m/b02", "B05": f"{inner}/r20m/b05", "B03": f"{inner}/r10m/b03"}
    path = eopf(tmp_path / "product.zarr")
    (scene,) = listed(
        path,
        assets={**assets, "SCL": f"{inner}/r20m/scl"},
        mask={"band": "SCL", "invalid": [3]},
    ).scenes
    assert (scene.id, scene.datetime, scene.place) == ("product", "2025-06-10T10:36:41Z", None)
    fine, coarse = scene.assets
    assert fine.grid == Grid(24, 24, "EPSG:32632", TRANSFORM)
    assert coarse.grid == Grid(12, 12, "EPSG:32632", (20.0, 0.0, WEST, 0.0, -20.0, NORTH))
    assert fine.planes == (
        Plane("B02", f"{inner}/r10m/b02", 0.0, 1e-4, -0.1),
        Plane("B03", f"{inner}/r10m/b03", 0.0, 1e-4, -0.1),
    )
    assert [plane.band for plane in coarse.planes] == ["B05"]
    assert fine.block_shape == (9, 9)
    assert scene.mask.planes == (Plane("SCL", f"{inner}/r20m/scl"),)
    with xr.open_zarr(path, group=f"{inner}/r20m", mask_and_scale=False, consolidated=False) as raw:
        np.testing.assert_array_equal(pixels(coarse)[0], raw["b05"].values)
        np.testing.assert_array_equal(pixels(scene.mask)[0], raw["scl"].values)


def test_a_location_may_be_a_group_or_an_array_inside(tmp_path):
    path = eopf(tmp_path / "product.zarr")
    group = path / "measurements/reflectance/r10m"
    (scene,) = listed(group, tmp_path, bands=("b02", "b03")).scenes
    assert (scene.id, scene.assets[0].href) == ("product", str(path))
    (single,) = listed(group / "b03", tmp_path).scenes
    assert [plane.band for plane in single.assets[0].planes] == ["b03"]
    (alone,) = listed(group, group, bands=("b02",)).scenes
    assert (alone.id, alone.assets[0].href) == ("r10m", str(group))


def test_a_group_without_images_names_those_of_others(tmp_path):
    path = eopf(tmp_path / "product.zarr")
    with pytest.raises(ArchiveError, match=r"no images in group /, but .*r10m/b02"):
        listed(path, bands=("b02",))


def stack(names: object, dim: str = "band", num_bands: int = 3) -> xr.Dataset:
    dataset = cube(bands=("reflectance",))
    values = numbers((3, num_bands, 20, 30))
    coords = {dim: names} if names is not None else {}
    image = xr.DataArray(values, dims=("time", dim, "y", "x"), coords=coords)
    image.attrs = dataset["reflectance"].attrs
    return dataset.assign(reflectance=image)


@pytest.mark.parametrize(("name", "zarr_format"), FORMS)
def test_bands_along_a_dimension_by_name(tmp_path, name, zarr_format):
    dataset = stack(["blue", "green", "SCL"], dim="bands")
    listing = listed(
        save(dataset, tmp_path / name, zarr_format),
        bands=("B03", "B02"),
        assets={"B02": "blue", "B03": "green"},
        mask={"band": "SCL", "cloud": [8]},
    )
    (asset,) = listing.scenes[1].assets
    assert (asset.band_dim, asset.select) == ("bands", (("time", 1),))
    assert [plane.key for plane in asset.planes] == ["reflectance[1]", "reflectance[0]"]
    stored = dataset["reflectance"].values[1]
    np.testing.assert_array_equal(pixels(asset), stored[[1, 0]])
    np.testing.assert_array_equal(pixels(listing.scenes[1].mask), stored[[2]])


@pytest.mark.parametrize("names", [None, [1, 2, 3]])
def test_bands_along_a_dimension_by_order(tmp_path, names):
    path = save(stack(names), tmp_path / "a.zarr")
    scene = listed(path, bands=("a", "b", "c")).scenes[0]
    keys = [plane.key for plane in scene.assets[0].planes]
    assert keys == ["reflectance[0]", "reflectance[1]", "reflectance[2]"]
    unnamed = listed(path).scenes[0].assets[0].planes
    assert [plane.band for plane in unnamed] == ["band_1", "band_2", "band_3"]
    with pytest.raises(ArchiveError, match="has 3 bands without names; modality image has 2: a, b"):
        listed(path, bands=("a", "b"))


def test_characters_name_bands_in_classic_netcdf(tmp_path):
    dataset = stack(np.array(["B1", "B12", "B2"], "S3"))
    for variable in dataset.variables.values():
        if variable.dtype == np.uint16:
            variable.values = variable.values.astype("int16")
    dataset["reflectance"] = dataset["reflectance"].astype("int16")
    dataset.to_netcdf(tmp_path / "a.nc", engine="scipy", format="NETCDF3_64BIT")
    scene = listed(tmp_path / "a.nc", bands=("B12",)).scenes[0]
    stored = dataset["reflectance"].values[0, [1]]
    np.testing.assert_array_equal(pixels(scene.assets[0]), stored)


def test_all_arrays_of_one_type_are_bands(tmp_path):
    dataset = cube(bands=("S2-L2A-B02", "ndvi"))
    dataset = dataset.assign_coords(lat=(("y", "x"), np.zeros((20, 30))))
    scene = listed(save(dataset, tmp_path / "a.nc")).scenes[0]
    assert [plane.band for plane in scene.assets[0].planes] == ["S2_L2A_B02", "ndvi"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angle": "float32"}, r"does not say which arrays are bands: it has .*angle \(float32"),
        ({"B-02": "uint16", "B_02": "uint16"}, "cannot be told apart"),
        ({"1st": "uint16"}, "cannot be told apart as bands: .*1st"),
    ],
)
def test_what_leaves_a_choice_of_bands_is_refused(tmp_path, change, message):
    dataset = cube()
    for name, dtype in change.items():
        dataset[name] = (("time", "y", "x"), numbers((3, 20, 30), dtype))
    with pytest.raises(ArchiveError, match=message):
        listed(save(dataset, tmp_path / "a.nc"))


def test_bands_that_are_not_there_are_listed(tmp_path):
    path = save(cube(), tmp_path / "a.nc")
    with pytest.raises(
        ArchiveError, match=r"no array for B04; it has B02 \(uint16, 3 x 20 x 30\), B03"
    ):
        listed(path, bands=("B02", "B04"))
    with pytest.raises(ArchiveError, match="no array for the mask SCL"):
        listed(path, bands=("B02",), mask={"band": "SCL", "cloud": [8]})
    with pytest.raises(ArchiveError, match="modality.assets"):
        listed(path, assets={"B02": "b2"})


@pytest.mark.parametrize(
    ("attrs", "nodata"),
    [
        ({}, None),
        ({"_FillValue": -9999}, -9999.0),
        ({"missing_value": -1}, -1.0),
        ({"_FillValue": -1, "missing_value": -1}, -1.0),
    ],
)
def test_nodata_is_what_the_array_states(tmp_path, attrs, nodata):
    dataset = cube(dtype="int16")
    for band in ("B02", "B03"):
        dataset[band].attrs |= attrs
    path = save(dataset, tmp_path / "a.nc")
    assert {plane.nodata for plane in listed(path).scenes[0].assets[0].planes} == {nodata}
    assert listed(path, nodata=7).scenes[0].assets[0].planes[0].nodata == 7


@pytest.mark.parametrize(("name", "zarr_format"), FORMS)
def test_nodata_of_floats_may_be_nan(tmp_path, name, zarr_format):
    dataset = cube(dtype="float32")
    path = save(dataset, tmp_path / name, zarr_format, _FillValue=np.float32("nan"))
    assert np.isnan(listed(path).scenes[0].assets[0].planes[0].nodata)


def test_nodata_of_unsigned_numbers_stored_as_signed(tmp_path):
    dataset = cube(dtype="int16", bands=("B02",))
    dataset["B02"].attrs |= {"_Unsigned": "true", "_FillValue": np.int16(-1)}
    (plane,) = listed(save(dataset, tmp_path / "a.nc")).scenes[0].assets[0].planes
    assert plane.nodata == 65535


def test_two_numbers_without_data_are_refused(tmp_path):
    dataset = cube(dtype="int16")
    dataset["B02"].attrs |= {"_FillValue": np.int16(-1), "missing_value": np.int16(-2)}
    path = save(dataset, tmp_path / "a.nc")
    with pytest.raises(ArchiveError, match=r"states several numbers without data, \[-1.0, -2.0\]"):
        listed(path)
    assert listed(path, nodata=-1).scenes[0].assets[0].planes[0].nodata == -1


def test_scale_and_offset_are_facts_not_arithmetic(tmp_path):
    dataset = cube()
    dataset["B02"].attrs |= {"scale_factor": 1e-4, "add_offset": -0.1}
    dataset["B03"].attrs |= {"scale_factor": 0.5}
    (asset,) = listed(save(dataset, tmp_path / "a.zarr"), scale=3.0).scenes[0].assets
    assert [(plane.scale, plane.offset) for plane in asset.planes] == [(1e-4, -0.1), (0.5, 0.0)]
    np.testing.assert_array_equal(pixels(asset)[0], dataset["B02"].values[0])


def test_coordinates_of_another_length_are_refused(tmp_path):
    path = save(cube(), tmp_path / "a.zarr")
    longer = save(cube(size=(20, 31)), tmp_path / "b.zarr")
    shutil.rmtree(path / "x")
    shutil.copytree(longer / "x", path / "x")
    with pytest.raises(
        ArchiveError, match="coordinate x has 31 values; B02 has 30 positions along x"
    ):
        listed(path)


def test_chunks_over_several_steps_are_remarked(tmp_path):
    path = save(cube(), tmp_path / "a.zarr", chunks=(3, 10, 10))
    assert "holds 3 time steps" in listed(path).notes[0]


@pytest.mark.parametrize(("name", "zarr_format"), FORMS)
def test_fingerprints_follow_the_store(tmp_path, name, zarr_format):
    path = save(cube(), tmp_path / name, zarr_format)
    arguments = (str(path), str(tmp_path), ModalityConfig(), Access((str(tmp_path),)))
    before = list_cube(*arguments).files
    assert files_of(*arguments) == before
    file = path if path.is_file() else next(path.glob("B02/*"))
    while file.is_dir():
        file = next(file.iterdir())
    file.write_bytes(file.read_bytes())
    assert files_of(*arguments) != before


def test_a_glob_of_stores_refuses_only_the_broken_ones(tmp_path):
    save(cube(num_steps=1), tmp_path / "one.zarr")
    save(cube(num_steps=2), tmp_path / "two.zarr")
    shutil.rmtree(save(cube(), tmp_path / "bad.zarr") / "B03")
    listing = listed(tmp_path / "*.zarr", tmp_path, bands=("B02", "B03"))
    assert [scene.id for scene in listing.scenes] == [
        "one@20201101T000000",
        "two@20201101T000000",
        "two@20201201T000000",
    ]
    assert list(listing.refused) == ["bad"]
    assert sorted(listing.files) == ["bad.zarr", "one.zarr", "two.zarr"]
    with pytest.raises(ArchiveError, match="nothing matches"):
        listed(tmp_path / "*.nc", tmp_path)
    with pytest.raises(ArchiveError, match="no such file"):
        listed(tmp_path / "absent.zarr", tmp_path)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("pattern", {"pattern": "{date}.nc"}),
        ("dates.csv", {"dates": {"csv": "dates.csv"}}),
        ("mask.source", {"mask": {"source": "masks", "cloud": [8]}}),
    ],
)
def test_keys_that_mean_files_are_refused(tmp_path, key, given):
    with pytest.raises(ConfigError, match=f"{key} .* has no effect on a Zarr or netCDF dataset"):
        listed(save(cube(), tmp_path / "a.nc"), **given)


def test_a_store_can_be_the_archive_itself(tmp_path):
    path = save(cube(num_steps=None), tmp_path / "a.zarr")
    listing = listed(path, path)
    assert listing.scenes[0].id == "a"
    assert list(listing.files) == ["a.zarr"]


def test_without_a_crs_the_store_is_the_place(tmp_path):
    scenes = listed(save(cube(crs=None), tmp_path / "a.zarr")).scenes
    assert {scene.place for scene in scenes} == {"a"}
    assert scenes[0].assets[0].grid == Grid(20, 30, None, None)
    assert listed(save(cube(crs=UTM), tmp_path / "b.zarr")).scenes[0].place is None


def test_the_real_file_as_three_modalities(real_data):
    path = real_data / "worldcereal" / "worldcereal_preprocessed_inputs.nc"
    grid = Grid(100, 100, "EPSG:32631", (10.0, 0.0, 664000.0, 0.0, -10.0, 5612120.0))
    s2 = listed(path, assets={"B02": "S2-L2A-B02", "B12": "S2-L2A-B12"}, nodata=65535)
    dem = listed(path, bands=("elevation", "slope"), static=True)
    assert [scene.datetime[:7] for scene in s2.scenes] == [
        *(f"2020-{month}" for month in (11, 12)),
        *(f"2021-{month:02}" for month in range(1, 11)),
    ]
    assert {asset.grid for scene in (*s2.scenes, *dem.scenes) for asset in scene.assets} == {grid}
    assert (len(dem.scenes), dem.scenes[0].datetime) == (1, None)
    missing = [(pixels(scene.assets[0]) == 65535).all() for scene in s2.scenes]
    assert sum(missing) == 2
