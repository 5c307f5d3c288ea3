"""What tests share: scenes made on the spot and the command line in this process."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

from workflows.cli import app, run


def aptile(*arguments: object) -> int:
    """Run the command line in this process; its exit code."""
    tokens = [str(argument) for argument in arguments]
    return run(lambda: app(tokens, exit_on_error=False, print_error=False))


def save_scene(
    path: Path, pixels: np.ndarray, *, crs: str | None = "EPSG:32632", **options
) -> Path:
    """A GeoTIFF of these pixels; without `crs` it gets no georeference at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    georeference = (
        {"crs": crs, "transform": Affine(10, 0, 500_000, 0, -10, 5_000_000)} if crs else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=pixels.shape[0],
            height=pixels.shape[1],
            width=pixels.shape[2],
            dtype=pixels.dtype,
            **georeference,
            **options,
        ) as raster:
            raster.write(pixels)
    return path


def textured(shape: tuple[int, int, int], seed: int = 0, dtype: str = "uint16") -> np.ndarray:
    """Pixels [band, y, x] in 1 ... 9999 with flat and busy parts, never 0."""
    rng = np.random.default_rng(seed)
    bands, height, width = shape
    coarse = rng.integers(500, 9000, (bands, height // 16 + 1, width // 16 + 1))
    image = np.kron(coarse, np.ones((16, 16)))[:, :height, :width]
    busy = rng.normal(0, 400, shape) * (np.arange(width) > width // 2)
    return np.clip(image + busy, 1, 9999).astype(dtype)
