"""`aptile demo`: the whole main job on a real Sentinel-2 chip that comes with a Python package."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
import spyndex
from rasterio.errors import NotGeoreferencedWarning

from model.training_config import TrainConfig
from pipeline.errors import EXIT_OK
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.store import open_store
from workflows.inspect import draw, show_summary, summaries
from workflows.preprocess import preprocess_archive
from workflows.terminal import console
from workflows.train import train_store

# The chip's own band names; 10 m bands of Sentinel-2.
BANDS = ("B02", "B03", "B04", "B08")
_SETTINGS = (
    "modality.name=s2_10m",
    f"modality.bands=[{', '.join(BANDS)}]",
    "modality.value_range=[0, 10000]",
    "modality.ground_sample_distance_m=10",
    "scoring.bands=[B02, B03, B04]",
)
_STEPS = 60


def demo(folder: Path = Path("demo")) -> int:
    """Make an archive, preprocess it, inspect it and train on it, all in one folder.

    Parameters
    ----------
    folder
        Where everything goes. A second run of the same command reuses what is there.
    """
    archive, store, run = folder / "archive", folder / "store", folder / "run"
    write_archive(archive)
    preprocess_archive(str(archive), store, load_config(PreprocessConfig, None, _SETTINGS))
    opened = open_store(store)
    for content in summaries(opened):
        show_summary(content)
    pictures = []
    for tile in opened.manifest["id"].to_pylist():
        pictures.append(folder / f"{tile.replace('/', '_')}.png")
        draw(opened, tile, pictures[-1])
    settings = load_config(TrainConfig, None, [f"steps={_STEPS}", "batch_tiles=4"])
    report = train_store(store, run, settings)
    console().print(
        f"\nMade from one real 300 x 300 px Sentinel-2 chip (4 bands, 10 m):\n"
        f"  {archive}  the chip as a GeoTIFF archive\n"
        f"  {store}  pixels, score maps and quadtrees in sharded Zarr\n"
        f"  {run}  a run of {report.steps} steps: loss.csv, checkpoint, encoder\n"
        f"Open {pictures[0]} first: the quadtree over the image, beside the score maps.\n"
        f"Next: aptile inspect {store} --json; aptile preprocess YOUR_FOLDER YOUR_STORE"
    )
    return EXIT_OK


def write_archive(archive: Path) -> None:
    """The chip as a GeoTIFF, once.

    The chip has no georeference, so the file gets none. Its axes are declared band, x, y; a raster
    is band, y, x.
    """
    file = archive / "sentinel2_chip.tif"
    if file.exists():
        return
    chip = spyndex.datasets.open("sentinel").transpose("band", "y", "x")
    assert tuple(chip["band"].values) == BANDS
    pixels = chip.values.astype(np.uint16)
    archive.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            partial, "w", driver="GTiff", dtype="uint16", count=len(BANDS),
            height=pixels.shape[1], width=pixels.shape[2],
            compress="deflate", predictor=2, tiled=True, blockxsize=128, blockysize=128,
        ) as raster:  # fmt: skip
            raster.write(pixels)
            raster.descriptions = BANDS
    partial.replace(file)
