"""The how-to pages as tests use them: their commands run, and their archives read without aptile."""

import copy
import io
import json
import re
import shlex
import warnings
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
import yaml
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

from pipeline import Store, open_store
from support import aptile, save_scene

HOW_TO = Path(__file__).parent.parent / "docs" / "how-to"
# Pages without an archive of their own.
OTHER = ("README", "train-with-your-own-loop", "use-the-encoder")
PAGES = sorted(page.stem for page in HOW_TO.glob("*.md") if page.stem not in OTHER)
FOLDERS = {"eurosat": "eurosat_rgb", "stac": "satclip", "s2-native": "satclip"}
# The example's places, of which the catalogue page prints one item and describes the others.
OLDER, NEWER = ("patch_502692", "patch_511198"), ("patch_445", "patch_57755")
GRIDS = {
    "10m": ("B02", "B03", "B04", "B08"),
    "20m": ("B05", "B06", "B07", "B8A", "B11", "B12"),
    "60m": ("B01", "B09"),
}
L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")

# Pixels [band, y, x] and validity [y, x] of a scene, by the name of the band set.
Planes = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    words: tuple[str, ...]
    code: int
    expected_code: int
    out: str
    err: tuple[str, ...]

    @property
    def inspected(self) -> str | None:
        """The store whose whole token table it prints."""
        return self.words[2] if self.words[1] == "inspect" and len(self.words) == 3 else None


@dataclass
class Page:
    """A page and the folder in which its commands run."""

    name: str
    data: Path
    folder: Path
    stores: dict[str, Store] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        return (HOW_TO / f"{self.name}.md").read_text()

    @cached_property
    def words(self) -> str:
        """The text without line breaks, to look for phrases in."""
        return " ".join(self.text.split())

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        return re.findall(r"^```(\w+)\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    @cached_property
    def config(self) -> dict:
        return yaml.safe_load((HOW_TO / f"{self.name}.yaml").read_text())

    @cached_property
    def archive(self) -> Path:
        return (self.folder / "archive").resolve()

    @cached_property
    def done(self) -> list[list[Done]]:
        """The commands of every block, run."""
        lay_out(self)
        with chdir(self.folder):
            return [
                [self._run(line) for line in text.splitlines()]
                for language, text in self.blocks
                if language == "bash"
            ]

    def store(self, name: str = "store") -> Store:
        assert self.done
        if name not in self.stores:
            self.stores[name] = open_store(self.folder / name)
        return self.stores[name]

    def tables(self, first: str) -> list[list[dict[str, str]]]:
        """The rows of the tables whose first column is so called, without empty cells."""
        found = []
        for lines in re.findall(rf"^\| {first} \|.*\n(?:\|.*\n)*", self.text, re.MULTILINE):
            header, _, *rows = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()
            ]
            found.append([{k: v for k, v in zip(header, row, strict=True) if v} for row in rows])
        return found

    def _run(self, line: str) -> Done:
        command, _, remark = line.partition(" # exit code ")
        words = shlex.split(command)
        assert words[0] == "aptile"
        out, err = io.StringIO(), io.StringIO()
        workers = ("--workers", "1") if words[1] == "preprocess" else ()
        with redirect_stdout(out), redirect_stderr(err):
            code = aptile(*words[1:], *workers)
        shown = err.getvalue().replace(str(self.archive), "/disk/archive")
        shown = shown.replace(str(self.folder.resolve()), "/home/me")
        lines = tuple(line for line in shown.splitlines() if not line.startswith("drew "))
        return Done(tuple(words), code, int(remark or 0), out.getvalue(), lines)


def read(path: Path) -> np.ndarray:
    """All bands of a raster, with or without georeference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as raster:
            return raster.read()


def lay_out(page: Page) -> None:
    """The archive of a page and its configuration, in the folder where its commands run."""
    (page.folder / f"{page.name}.yaml").write_text((HOW_TO / f"{page.name}.yaml").read_text())
    source = page.data / FOLDERS.get(page.name, page.name)
    if page.name == "s2-native":
        write_band_files(source, page.folder / "archive")
        return
    (page.folder / "archive").symlink_to(source)
    if page.name == "stac":
        (printed,) = [text for language, text in page.blocks if language == "json"]
        (page.folder / "catalogue.json").write_text(json.dumps(catalogue(printed, source)))


def catalogue(printed: str, source: Path) -> dict:
    """The printed catalogue of one item with one for every chip."""
    whole = json.loads(printed)
    (first,) = whole["features"]
    whole["features"] = []
    for name in (*NEWER, *OLDER):
        item = copy.deepcopy(first)
        item["id"] = name
        item["assets"]["pixels"]["href"] = f"archive/{name}.tif"
        properties = item["properties"]
        with rasterio.open(source / f"{name}.tif") as raster:
            properties["proj:code"] = f"EPSG:{raster.crs.to_epsg()}"
            properties["proj:transform"] = list(raster.transform[:6])
        properties["s2:processing_baseline"] = "05.09" if name in NEWER else "03.01"
        whole["features"].append(item)
    assert first in whole["features"]
    return whole


def write_band_files(source: Path, archive: Path) -> None:
    """The older chips, a file per band: 10 m as they are, 20 and 60 m as every second or sixth pixel."""
    for name in OLDER:
        with rasterio.open(source / f"{name}.tif") as raster:
            crs, corner = raster.crs, (raster.transform.c, raster.transform.f)
        pixels = read(source / f"{name}.tif")[:, :180, :180]
        for band, grid in [(b, g) for g, bands in GRIDS.items() for b in bands] + [("B02", "20m")]:
            step = int(grid[:2]) // 10
            save_scene(
                archive / f"{name.replace('patch_', 'T')}_20230701T081609_{band}_{grid}.tif",
                pixels[[L2A.index(band)], ::step, ::step],
                crs=crs,
                transform=Affine(10 * step, 0, corner[0], 0, -10 * step, corner[1]),
            )


# What the files hold, as their own libraries read them, and which of it is valid by what the page says.


def chips(archive: Path, modality: str, scene: str) -> Planes:
    pixels = read(archive / f"{scene}.tif")
    return {"": (pixels, (pixels != 0).all(axis=0))}


def five_modalities(archive: Path, modality: str, scene: str) -> Planes:
    pixels = read(archive / f"{scene.split(':')[1]}.tif")
    return {"": (pixels, (pixels != 0).all(axis=0) | (not modality.startswith("s2")))}


def masked_scene(archive: Path, modality: str, scene: str) -> Planes:
    return {"": (read(archive / f"{scene}.tif"), read(archive / "cl_mask.tif")[0] != 1)}


def series(archive: Path, modality: str, scene: str) -> Planes:
    bands = read(archive / f"{scene}.tif")
    pixels, probability = bands[:13], bands[14]
    return {"": (pixels, (np.isfinite(pixels) & (pixels != 0)).all(axis=0) & ~(probability > 60))}


@cache
def cube(archive: Path) -> xr.Dataset:
    path = archive / "worldcereal_preprocessed_inputs.nc"
    return xr.load_dataset(path, engine="h5netcdf", mask_and_scale=False)


def months(archive: Path, modality: str, scene: str) -> Planes:
    dataset = cube(archive)
    config = yaml.safe_load((HOW_TO / "worldcereal.yaml").read_text())["modalities"][modality]
    names = [config.get("assets", {}).get(band, band) for band in config["bands"]]
    when = f"{scene.split('@')[1]}Z" if "@" in scene else "20201101T000000Z"
    step = [
        f"{np.datetime_as_string(t, 's').replace('-', '').replace(':', '')}Z"
        for t in dataset.t.values
    ]
    pixels = np.stack([dataset[name].values[step.index(when)] for name in names]).view(np.uint16)
    return {"": (pixels, (pixels != 65535).all(axis=0))}


def bordered(archive: Path, modality: str, scene: str) -> Planes:
    pixels = read(archive / f"{scene}.tif")
    return {"": (pixels, pixels[0] != 1)}


def photographs(archive: Path, modality: str, scene: str) -> Planes:
    pixels = read(archive / f"{scene}.jpg")
    return {"": (pixels, np.ones(pixels.shape[1:], np.bool_))}


def harmonised(archive: Path, modality: str, scene: str) -> Planes:
    pixels, valid = chips(archive, modality, scene)[""]
    return {"": (pixels + np.uint16(1000 * (scene in OLDER)), valid)}


def band_files(archive: Path, modality: str, scene: str) -> Planes:
    planes = {}
    for grid, bands in GRIDS.items():
        files = [read(archive / f"{scene}_{band}_{grid}.tif")[0] for band in bands]
        planes["" if grid == "10m" else grid] = np.stack(files), (np.stack(files) != 0).all(axis=0)
    return planes


FILES: dict[str, Callable[[Path, str, str], Planes]] = {
    "satclip": chips,
    "terramind": five_modalities,
    "s2cloudless": masked_scene,
    "ravaen": series,
    "worldcereal": months,
    "cog": bordered,
    "eurosat": photographs,
    "stac": harmonised,
    "s2-native": band_files,
}
