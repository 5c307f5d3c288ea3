"""What tests share: scenes made on the spot or on paper and the command line in this process."""

import filecmp
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.errors import NotGeoreferencedWarning

from pipeline.errors import StoreError
from pipeline.grid import BaseGrid
from pipeline.jobs.measures import Measures
from pipeline.jobs.observer import Observer
from pipeline.scenes import Asset, Grid, Plane, Scene
from pipeline.storage.commit import COMMIT, read_commit
from pipeline.storage.objects import LocalObjects
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
    here = options.pop("transform", Affine(10, 0, 500_000, 0, -10, 5_000_000))
    georeference = {"crs": crs, "transform": here} if crs else {}
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


@st.composite
def grids_and_maps(draw, num_frames=None, levels=8):
    """A grid and score maps [frame, cell_y, cell_x] of few different scores, so ties abound.

    NaN in any base cell; a coarser node is NaN where all its cells are. Without `num_frames` the maps
    are of one frame and have no such axis.
    """
    num_scales = draw(st.integers(1, 4))
    side = 2 ** (num_scales - 1)
    grid = BaseGrid(side * draw(st.integers(1, 3)), side * draw(st.integers(1, 3)), 2, num_scales)
    frames = num_frames or 1
    score = st.integers(0, levels).map(lambda step: step / levels)
    base = draw(hnp.arrays(np.float32, (frames, grid.rows, grid.cols), elements=score))
    base[draw(hnp.arrays(np.bool_, base.shape, elements=st.booleans()))] = np.nan
    maps = [base]
    for scale in range(1, num_scales):
        rows, cols = grid.level_shape(scale)
        level = draw(hnp.arrays(np.float32, (frames, rows, cols), elements=score))
        blocks = base.reshape(frames, rows, 2**scale, cols, 2**scale)
        level[np.isnan(blocks).all((2, 4))] = np.nan
        maps.append(level)
    return grid, maps if num_frames else [m[0] for m in maps]


class Watching(Observer):
    """An observer that keeps what it hears, and can interrupt the job after some shards."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.done, self.tiles, self.interrupt_after = 0, 0, interrupt_after
        self.happenings: list[tuple[str, str]] = []
        self.measures: list[Measures] = []

    def planned(self, plan, done_tiles):
        self.tiles = done_tiles

    def shard_done(self, tiles):
        self.done += 1
        self.tiles += tiles
        if self.done == self.interrupt_after:
            raise KeyboardInterrupt

    def measured(self, measures):
        self.measures.append(measures)

    def happened(self, what, text):
        self.happenings.append((what, text))


def counted(number: int) -> dict[str, int]:
    """A task that does nothing."""
    return {"shard": number}


def hungry(number: int) -> dict[str, int]:
    """A task that runs out of memory, unless it is an even one."""
    if number % 2:
        raise MemoryError
    return counted(number)


def refused() -> None:
    raise StoreError("so not")


def files(store: Path) -> list[str]:
    return sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())


def assert_same_bytes(first: Path, second: Path) -> None:
    assert files(first) == files(second)
    _, differing, unreadable = filecmp.cmpfiles(first, second, files(first), shallow=False)
    assert differing == unreadable == []


def reseal(store: Path, **changes) -> None:
    """Give a store another newest commit, as somebody would who knows how commits are written."""
    objects = LocalObjects(store)
    commit = read_commit(objects)
    objects.write(COMMIT, replace(commit, **changes).encode())


def header(
    name: str,
    *,
    modality: str = "image",
    bands: tuple[str, ...] = ("band_1",),
    grid: Grid | None = None,
    dtype: str = "uint16",
    block: tuple[int, int] = (256, 256),
    **facts,
) -> Scene:
    """A scene of one file that exists on paper only."""
    grid = grid or Grid(300, 500, None, None)
    planes = tuple(Plane(band, number) for number, band in enumerate(bands))
    asset = Asset(f"/{name}.tif", "raster", grid, dtype, planes, block, "1-1")
    return Scene(name, modality, (asset,), **facts)


def flip(path: Path, at: int, bits: int) -> None:
    """Change bits of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)
