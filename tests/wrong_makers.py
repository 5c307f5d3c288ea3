"""Archives, configurations and calls that are wrong in one way each, made in the current folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from affine import Affine

from support import aptile, save_scene, textured

DEAD = "http://127.0.0.1:9"  # nobody listens at port 9
IMPATIENT = {"retries": {"attempts": 1}}
ARCHIVE = Path("ARCHIVE")
ALIASES = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{more}: &{more} [{', '.join([f'*{name}'] * 10)}]\n" for name, more in pairwise("abcdefgh")
)


@dataclass(frozen=True)
class Case:
    """What lies where, and what is called; the folder ARCHIVE is the source unless said otherwise."""

    makes: tuple[Callable[[], Any], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    source: str = "ARCHIVE"
    store: str = "STORE"
    is_finished: bool = False

    def prepare(self, finished: Path) -> None:
        """Make all of it here; with `is_finished`, beside the archive and store that are there."""
        for name in ("ARCHIVE", "STORE") if self.is_finished else ():
            shutil.copytree(finished / name, name)
        for make in self.makes:
            make()
        if self.config:
            Path("CONFIG").write_text(yaml.safe_dump(self.config, sort_keys=False))

    def run(self) -> int:
        chosen = ["--config", "CONFIG"] if Path("CONFIG").exists() else []
        return aptile("preprocess", self.source, self.store, *chosen, *self.options)


def wrong(
    *makes: Callable[[], Any],
    options: tuple[str, ...] = (),
    source: str = "ARCHIVE",
    store: str = "STORE",
    is_finished: bool = False,
    **config: Any,
) -> Case:
    """A case whose further arguments are the sections of its configuration."""
    return Case(makes, config, options, source, store, is_finished)


def at(x: float = 500_000, px: float = 10) -> Affine:
    return Affine(px, 0, x, 0, -px, 5_000_000)


def tif(
    name: str = "a.tif", bands: int = 3, size: int = 64, dtype: str = "uint16", **options: Any
) -> Callable[[], Path]:
    """A scene whose pixels follow from its name."""

    def make() -> Path:
        pixels = textured((bands, size, size), sum(name.encode()))
        return save_scene(ARCHIVE / name, pixels.astype(dtype), **options)

    return make


def empty(name: str) -> None:
    save_scene(ARCHIVE / name, np.zeros((1, 64, 64), np.uint8), nodata=0)


def torn(name: str) -> None:
    path = tif(name, compress="deflate")()
    path.write_bytes(path.read_bytes()[:3000])


def text(name: str, content: str | bytes = "") -> Callable[[], Any]:
    def make() -> None:
        path = ARCHIVE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def config_text(content: str) -> Callable[[], Any]:
    return text("../CONFIG", content)


def item(name: str = "one", href: str | None = None, day: int = 1, **stated: Any) -> dict[str, Any]:
    """A STAC item of one file of 64 x 64 px."""
    asset = {
        "href": href or f"{name}.tif",
        "proj:shape": [64, 64],
        "proj:transform": list(at())[:6],
        "raster:bands": [{"data_type": stated.pop("data_type", "uint16")}],
        **stated,
    }
    properties = {"datetime": f"2023-07-{day:02}T00:00:00Z", "proj:epsg": 32632}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "links": [],
        "properties": properties, "assets": {"B02": asset},
    }  # fmt: skip


def items(*members: dict[str, Any]) -> Callable[[], Any]:
    return text("items.json", json.dumps({"type": "FeatureCollection", "features": members}))


def netcdf(
    dims: tuple[str, str] = ("y", "x"), x: np.ndarray | None = None, dtype: str = "uint16"
) -> Callable[[], None]:
    def make() -> None:
        ARCHIVE.mkdir()
        with h5py.File(ARCHIVE / "cube.nc", "w") as file:
            image = file.create_dataset("B02", data=np.ones((64, 64), dtype))
            steps = np.arange(64) * 10.0
            for number, values in enumerate((-steps, steps if x is None else x)):
                scale = file.create_dataset(dims[number], data=values)
                scale.make_scale(dims[number])
                image.dims[number].attach_scale(scale)

    return make


def zarr(**stated: Any) -> Callable[[], Any]:
    """The metadata of one Zarr array; no chunk is needed to refuse it."""
    array = {
        "zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "<u2", "fill_value": 0,
        "order": "C", "compressor": None, "filters": None, **stated,
    }  # fmt: skip
    files = {
        ".zgroup": {"zarr_format": 2},
        "B02/.zarray": array,
        "B02/.zattrs": {"_ARRAY_DIMENSIONS": ["y", "x"]},
    }
    return lambda: [text(f"cube.zarr/{name}", json.dumps(c))() for name, c in files.items()]


def other_modality(**options: Any) -> tuple[Callable[[], Path], ...]:
    return tif("s2/a.tif"), tif("dem/a.tif", 1, dtype="float32", **options)


NATIVE = (
    tif("T_B02.tif", 1, 60), tif("T_B05.tif", 1, 30, transform=at(px=20)),
    tif("T_B01.tif", 1, 10, transform=at(px=60)),
)  # fmt: skip
NATIVE_MODALITY = {"bands": ["B02", "B05", "B01"], "pattern": "{tile}_{band}.tif"}
NATIVE_SETS = {"band_sets": {"10m": ["B02"], "20m": ["B05"], "60m": ["B01"]}}
RGB = ["red", "green", "blue"]
MASK = {"source": "img", "mask": {"source": "masks", "cloud": [3]}}
S2_DEM = {"s2": {"source": "s2"}, "dem": {"source": "dem", "static": True}}
S2_LABEL = {"s2": {"source": "s2"}, "lulc": {"source": "lulc", "kind": "label"}}
BY_TILE_AND_DATE = {"pattern": "{tile}_{date}.tif"}
DATES = {"dates": {"csv": "dates.csv"}}
BLOCKS = {"shares": {"train": 0.5, "val": 0.5}}
B02 = ("--set", "modality.bands=[B02]")
JPEG2000 = b"\0\0\0\x0cjP  \r\n\x87\n"


def dates(content: str | bytes) -> Callable[[], Any]:
    return text("dates.csv", content)


def stac(*members: dict[str, Any], options: tuple[str, ...] = B02) -> Case:
    return wrong(tif("one.tif", 1), items(*members), source="ARCHIVE/items.json", options=options)


def cube(*makes: Callable[[], Any], name: str = "cube.nc", options: tuple[str, ...] = B02) -> Case:
    return wrong(*makes, source=f"ARCHIVE/{name}", options=options)
