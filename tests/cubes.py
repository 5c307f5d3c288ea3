"""Zarr and netCDF stores for tests, written by other people's libraries."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.errors import UnstableSpecificationWarning

from pipeline.readers.arrays import open_array_asset
from pipeline.scenes import Access, Asset, Grid, Listing, Plane, Window
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.cube import list_cube

UTM = 'PROJCS["WGS 84 / UTM zone 32N",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433],AUTHORITY["EPSG","4326"]],PROJECTION["Transverse_Mercator"],PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",9],PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH],AUTHORITY["EPSG","32632"]]'  # noqa: E501
WEST, NORTH, PIXEL = 500_000.0, 5_000_000.0, 10.0
TRANSFORM = (PIXEL, 0.0, WEST, 0.0, -PIXEL, NORTH)
DATES = ("2020-11-01", "2020-12-01", "2021-01-15T10:20:30")


def numbers(shape: tuple[int, ...], dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Numbers over the whole range of a type; 0 is rare."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1000, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def cube(
    bands: tuple[str, ...] = ("B02", "B03"),
    num_steps: int | None = 3,
    size: tuple[int, int] = (20, 30),
    dtype: str = "uint16",
    crs: str | None = UTM,
) -> xr.Dataset:
    """A dataset of one variable per band, on a UTM grid of 10 m with its north western corner up."""
    rows, cols = size
    dims = ("y", "x") if num_steps is None else ("time", "y", "x")
    shape = size if num_steps is None else (num_steps, *size)
    coords: dict[str, Any] = {
        "y": ("y", NORTH - PIXEL * (np.arange(rows) + 0.5), {"units": "m"}),
        "x": ("x", WEST + PIXEL * (np.arange(cols) + 0.5), {"units": "m"}),
    }
    if num_steps is not None:
        coords["time"] = ("time", np.array(DATES[:num_steps], "M8[ns]"))
    if crs is not None:
        coords["spatial_ref"] = ((), 0, {"crs_wkt": crs})
    attrs = {"grid_mapping": "spatial_ref"} if crs is not None else {}
    variables = {
        band: (dims, numbers(shape, dtype, seed), attrs) for seed, band in enumerate(bands)
    }
    return xr.Dataset(variables, coords=coords)


def save(dataset: xr.Dataset, path: Path, zarr_format: int = 3, **encoding: Any) -> Path:
    """Written as Zarr or netCDF by its suffix; `encoding` holds for all variables with rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    each = {name: encoding for name in dataset.data_vars if "y" in dataset[name].dims}
    if path.suffix == ".zarr":
        with warnings.catch_warnings():
            # Texts in Zarr 3 are no standard yet; people have them all the same.
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            dataset.to_zarr(
                path, zarr_format=zarr_format, consolidated=zarr_format == 2, encoding=each or None
            )
    else:
        dataset.to_netcdf(path, engine="h5netcdf", encoding=each)
    return path


def listed(path: Path, archive: Path | None = None, **modality: Any) -> Listing:
    """What `list_cube` makes of a store whose archive is its folder."""
    root = str(archive or path.parent)
    return list_cube(str(path), root, ModalityConfig(**modality), Access((root,)))


def pixels(
    asset: Asset, window: Window | None = None, roots: tuple[str, ...] = ("/",)
) -> np.ndarray:
    """Numbers [plane, y, x] of a window, or of all of an asset."""
    window = window or Window(0, 0, asset.grid.height, asset.grid.width)
    with open_array_asset(asset, Access(roots)) as reader:
        return reader.read(window)


def readable(asset: Asset, window: Window | None = None) -> np.ndarray | None:
    window = window or Window(0, 0, asset.grid.height, asset.grid.width)
    with open_array_asset(asset, Access(("/",))) as reader:
        return reader.readable(window)


def plain_asset(store: Path, path: str, size: tuple[int, int], dtype: str, **facts: Any) -> Asset:
    """An asset of one array without georeference."""
    return Asset(
        href=str(store),
        kind="array",
        grid=Grid(*size, None, None),
        dtype=dtype,
        planes=facts.pop("planes", (Plane("band_1", path),)),
        block_shape=size,
        fingerprint="",
        header_seen=False,
        **facts,
    )


def save_array(
    store: Path, values: np.ndarray, dims: tuple[str, ...], zarr_format: int = 3, **options: Any
) -> Path:
    """A Zarr group with the single array `image`."""
    if store.exists():
        shutil.rmtree(store)
    group = zarr.create_group(store, zarr_format=zarr_format)
    names = (
        {"dimension_names": dims}
        if zarr_format == 3
        else {"attributes": {"_ARRAY_DIMENSIONS": dims}}
    )
    array = group.create_array(
        "image", shape=values.shape, dtype=values.dtype, **{**names, **options}
    )
    array[...] = values
    return store
