"""What is wrong, by the words of docs/wrong-inputs.md for each."""

from functools import partial

import numpy as np

from wrong_makers import (
    ALIASES,
    B02,
    BLOCKS,
    BY_TILE_AND_DATE,
    DATES,
    DEAD,
    IMPATIENT,
    JPEG2000,
    MASK,
    NATIVE,
    NATIVE_MODALITY,
    NATIVE_SETS,
    RGB,
    S2_DEM,
    S2_LABEL,
    Case,
    at,
    config_text,
    cube,
    dates,
    empty,
    item,
    items,
    netcdf,
    other_modality,
    stac,
    text,
    tif,
    torn,
    wrong,
    zarr,
)

COMMAND_LINE = {
    "a glob without quotes": wrong(
        tif("a.tif"),
        tif("b.tif"),
        source="ARCHIVE/a.tif",
        store="ARCHIVE/b.tif",
        options=("STORE",),
    ),
    "a shell variable that is not set": wrong(source=""),
    "`--set` without a value": wrong(tif(), options=("--set", "store.codec")),
    "`--set` with a misspelt key": wrong(tif(), options=("--set", "store.tile_size=64")),
    "`--set` of text with braces": wrong(
        tif(), options=("--set", "modality.pattern={tile}_{date}.tif")
    ),
    "a folder as `--config`": wrong(tif(), options=("--config", "ARCHIVE")),
    "a configuration that is not there": wrong(tif(), options=("--config", "mine.yaml")),
    "a wrong name of a preset": wrong(tif(), options=("--preset", "sentinel2")),
    "a preset's file that is not there": wrong(tif(), options=("--preset", "mine.yaml")),
    "two presets": wrong(tif(), preset="rgb", options=("--preset", "s2_l2a")),
    "a scheme that is not known": wrong(source="ftp://server/scenes"),
    "a folder on a web server": wrong(source=f"{DEAD}/scenes/*.tif"),
    "a file on a server that does not answer": wrong(source=f"{DEAD}/a.tif", run=IMPATIENT),
    "a server at a private address": wrong(source="http://127.1/a.tif"),
    "a Dask scheduler without a port": wrong(tif(), options=("--scheduler", "login-node")),
}
CONFIGURATION = {
    "tabs in the YAML": wrong(
        tif(), config_text("store:\n\tcodec: lz4\n")
    ),
    "a key twice": wrong(
        tif(), config_text("run: {}\nstore: {}\nrun: {}\n")
    ),
    "aliases of aliases": wrong(tif(), config_text(ALIASES)),
    "a list at the top level": wrong(
        tif(), config_text("- modality\n")
    ),
    "a misspelt key three levels deep": wrong(
        tif(), modalities={"s2": {"mask": {"band": "SCL", "clouds": [3]}}}
    ),
    "a value that is not known": Case((tif(),), {"store": {"codec": "gzip"}}),
    "a band called NO, which YAML reads as false": wrong(
        tif(), config_text("modality:\n  bands: [NO, CO, O3]\n")
    ),
    "a band's number where text is expected": wrong(
        tif(), modality={"bands": RGB, "assets": {"red": 3}}
    ),
    "`modality` and `modalities`": wrong(
        tif(), modality={"bands": RGB}, modalities={"s2": {"bands": RGB}}
    ),
    "a preset for all of several modalities": wrong(
        tif(), preset="s2_l2a", modalities={"s2": {"source": "s2"}}
    ),
    "a misspelt band in `scoring.bands`": wrong(
        tif(), modality={"bands": RGB}, scoring={"bands": ["rde"]}
    ),
    "`scoring.bands` of bands without names": wrong(tif(), scoring={"bands": ["B04"]}),
    "a band in no set of `band_sets`": wrong(
        tif(), modality={"bands": RGB, "band_sets": {"10m": ["red", "green"]}}
    ),
    "a value range the wrong way round": wrong(tif(), modality={"value_range": [3000, 0]}),
    "a tile that holds no whole number of patches": Case((tif(),), {"store": {"tile_size_px": 100}}),
    "more tokens than a tile has patches": wrong(tif(), partition={"tokens_per_tile": 5000}),
    "pairing with one modality": wrong(tif(), pairing={"tolerance_days": 3}),
    "`ignore_index` for images": wrong(tif(), modality={"ignore_index": 255}),
    "`resampling` without `grid.warp`": wrong(tif(), modality={"resampling": "cubic"}),
    "labels resampled bilinearly": wrong(
        tif("s2/a.tif"), tif("lulc/a.tif", 1, dtype="float32"),
        modalities={**S2_LABEL, "lulc": {**S2_LABEL["lulc"], "resampling": "bilinear"}},
    ),
    "a label raster as the first modality": wrong(
        tif("s2/a.tif"), config_text("modalities:\n  lulc: {kind: label}\n  s2: {}\n"),
    ),
    "an empty section": wrong(tif(), modality={"dates": {}}),
    "shares in percent": wrong(tif(), splits={"shares": {"train": 80, "val": 20}, "block_km": 10}),
    "a CRS that is not known": wrong(
        tif(), grid={"crs": "EPSG:99999", "origin": [0, 0], "pixel_size": 10, "shape": [9, 9]}
    ),
}  # fmt: skip
FOLDERS = {
    "a folder of VRTs": wrong(text("a.vrt", "<VRTDataset/>")),
    "a folder of sidecars": wrong(text("a.tfw"), text("a.tif.aux.xml")),
    "scenes with different bands": wrong(tif("a.tif", 3), tif("b.tif", 4)),
    "scenes with different pixel types": wrong(tif("a.tif"), tif("b.tif", dtype="float32")),
    "a preset with more bands than the files": wrong(tif(), options=("--preset", "s2_l2a")),
    "a scene of too many pixels": wrong(tif(), run={"max_scene_px": 1000}),
    "complex SAR data": wrong(tif("slc.tif", 1, dtype="complex64")),
    "`nodata` that the pixels cannot hold": wrong(tif(), modality={"nodata": -9999}),
    "JPEG 2000 without `run.jpeg2000`": wrong(text("T32TNS_B02.jp2", JPEG2000)),
    "one file per band without a pattern": wrong(
        tif("T_B02.tif", 1), tif("T_B03.tif", 1), modality={"bands": ["B02", "B03"]}
    ),
    "a pattern that matches nothing": wrong(tif("scene1.tif"), modality=BY_TILE_AND_DATE),
    "a placeholder that is not known": wrong(tif(), modality={"pattern": "{tile}_{day}.tif"}),
    "a date that is none": wrong(tif("T_20201301.tif"), modality=BY_TILE_AND_DATE),
    "two scenes of one date": wrong(
        tif("S2A_20200101.tif"), tif("S2B_20200101.tif"), modality={"pattern": "*_{date}.tif"}
    ),
    "several dates of a static modality": wrong(
        tif("T_20200101.tif"), tif("T_20210101.tif"), modality={**BY_TILE_AND_DATE, "static": True}
    ),
    "bands of several resolutions in one set": wrong(*NATIVE, modality=NATIVE_MODALITY),
    "a tile that does not fit pixels of 60 m": wrong(
        *NATIVE, modality={**NATIVE_MODALITY, **NATIVE_SETS}, scoring={"bands": ["B02"]}
    ),
    "a mask on another grid": wrong(
        tif("img/a.tif"), tif("masks/a.tif", 1, 50, "uint8"), modality=MASK
    ),
    "a mask of another name": wrong(
        tif("img/a.tif"), tif("masks/b.tif", 1, 64, "uint8"), modality=MASK
    ),
    "a mask outside the archive": wrong(
        tif(), modality={"mask": {"source": "../masks", "cloud": [3]}}
    ),
    "a source with a scheme that is not known": wrong(tif(), modality={"source": "hdfs://a/b"}),
    "a source outside the archive": wrong(tif(), modality={"source": f"{DEAD}/a.tif"}),
    "two files of one name": wrong(tif("a.tif"), tif("a.tiff")),
    "a second modality on a shifted grid": wrong(
        *other_modality(transform=at(500_005)), modalities=S2_DEM
    ),
    "a second modality elsewhere": wrong(*other_modality(transform=at(900_000)), modalities=S2_DEM),
    "scenes without a valid pixel": wrong(partial(empty, "a.tif")),
    "more valid pixels asked for than any tile has": wrong(
        tif(), validity={"min_tile_valid_fraction": 0.9}
    ),
}  # fmt: skip
TABLES = {
    "a table without the column": wrong(tif(), dates("file,date\na,2020-01-01"), modality=DATES),
    "a table with semicolons": wrong(
        tif(), dates("scene;datetime\na;2020-01-01"), modality=DATES
    ),
    "a table that is not UTF-8": wrong(tif(), dates(b"scene,datetime\n\xe4,2020"), modality=DATES),
    "a table that is not there": wrong(tif(), modality=DATES),
    "a list of checksums that is none": wrong(
        tif(), text("SUMS", "a.tif 123"), run={"checksums": "SUMS"}
    ),
    "a scene that is not in the list of checksums": wrong(
        tif(), text("SUMS", f"{'0' * 64}  b.tif"), run={"checksums": "SUMS"}
    ),
    "a table of other scenes": wrong(tif(), dates("scene,datetime\nb,2020-01-01"), modality=DATES),
    "two dates for one scene": wrong(
        tif(), dates("scene,datetime\na,2020-01-01\na.tif,2020-01-02"), modality=DATES
    ),
    "a date as a spreadsheet writes it": wrong(
        tif(), dates("scene,datetime\na,01.02.2020"), modality=DATES
    ),
    "`labels.folder` with scenes in no folder": wrong(tif(), labels={"folder": True}),
    "labels of other scenes": wrong(
        tif(), text("labels.csv", "scene,label\nb,forest"), labels={"csv": "labels.csv"}
    ),
    "GeoJSON as `labels.vector`": wrong(
        tif(), text("a.geojson", "{}"), labels={"vector": "a.geojson"}
    ),
    "splits by blocks without a CRS": wrong(tif(crs=None), splits={**BLOCKS, "block_km": 10}),
    "blocks smaller than tiles": wrong(tif(), splits={**BLOCKS, "block_km": 0.1}),
    "splits by a pattern without `{split}`": wrong(tif(), splits={"by": "pattern"}),
}  # fmt: skip
CATALOGUES = {
    "STAC without `modality.bands`": stac(item(), options=()),
    "an asset of another name": stac(item(), options=("--set", "modality.bands=[B03]")),
    "GeoJSON that is no STAC": stac({"type": "Feature", "properties": {}, "geometry": None}),
    "an empty item collection": stac(),
    "a web page saved as JSON": wrong(
        text("items.json", "<html>"), source="ARCHIVE/items.json", options=B02
    ),
    "two items of one id": stac(item(), item()),
    "a STAC API that nobody answers": wrong(
        source=f"stac+{DEAD}?collections=a", options=B02, run=IMPATIENT
    ),
    "a search for everything": wrong(source=f"stac+{DEAD}", options=B02),
}
CUBES = {
    "an array without rows and columns": cube(netcdf(("station", "depth"))),
    "coordinates that are not regular": cube(
        netcdf(x=np.arange(64) * 10.0 + 5 * (np.arange(64) > 30))
    ),
    "complex numbers": cube(netcdf(dtype="complex64")),
    "a misspelt array": cube(netcdf(), options=("--set", "modality.bands=[B04]")),
    "a pattern for a data cube": cube(netcdf(), options=("--set", "modality.pattern='{date}.nc'")),
    "another file called .nc": cube(text("cube.nc", "CDF?")),
    "a Zarr array of pickled objects": cube(
        zarr(dtype="|O", filters=[{"id": "pickle"}]), name="cube.zarr"
    ),
    "a Zarr codec that runs code": cube(zarr(compressor={"id": "pickle"}), name="cube.zarr"),
}
STORES = {
    "the archive as the store": wrong(tif(), store="ARCHIVE"),
    "a store inside the Zarr archive": Case(
        (zarr(),), {"modality": {"bands": ["B02"], "value_range": [0, 9]}}, (),
        "ARCHIVE/cube.zarr", "ARCHIVE/cube.zarr/STORE",
    ),
    "a web server as the store": wrong(tif(), store="https://server/STORE"),
    "a store as the archive": wrong(source="STORE", store="STORE2", is_finished=True),
    "another configuration for a finished store": wrong(
        options=("--set", "store.codec=zstd"), is_finished=True
    ),
    "a new scene in the archive of a finished store": wrong(tif("b.tif"), is_finished=True),
}  # fmt: skip
SINGLE_SCENES = {
    "Single scenes of a folder": wrong(
        tif("T_20200101.tif"),
        tif("T_20200111.tif", transform=at(500_005)),
        tif("T_20200121.tif", crs="EPSG:32633"),
        tif("T_20200131.tif", crs=None),
        tif("T_20200210.tif", bands=4),
        tif("T_20200220.tif", dtype="complex64"),
        text("T_20200301.tif", "<html>404"),
        partial(torn, "T_20200311.tif"),
        tif("T_20201301.tif"),
        modality={**BY_TILE_AND_DATE, "bands": RGB, "value_range": [0, 10_000]},
    ),
    "Single scenes of a catalogue": wrong(
        tif("one.tif", 1),
        tif("two.tif", 1, size=48),
        tif("three.tif", 1, dtype="float32"),
        items(
            item("one"), item("two", day=2), item("three", day=3),
            item("four", day=4), item("five", "../five.tif"), item("six", f"{DEAD}/six.tif"),
            item("seven", "seven.jp2"), item("eight", data_type="cint16"),
        ),
        source="ARCHIVE/items.json",
        modality={"bands": ["B02"], "value_range": [0, 10_000]},
    ),
}  # fmt: skip
CASES = {
    "Command line": COMMAND_LINE,
    "Configuration": CONFIGURATION,
    "Folders of rasters": FOLDERS,
    "Tables, labels and splits": TABLES,
    "Catalogues": CATALOGUES,
    "Data cubes": CUBES,
    "Stores": STORES,
}
