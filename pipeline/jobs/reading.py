"""Reading whole tiles of a scene: pixels, validity, and the planes that are scored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.io import DatasetReader
from rasterio.windows import Window

from pipeline.archive import SUFFIXES, Scene, fingerprint, open_raster, read_header, read_window
from pipeline.config import DataConfig
from pipeline.errors import SceneError
from pipeline.rules import sampled_tiles
from pipeline.scorers.config import ExternalConfig, ScorerConfig

Span = tuple[int, int]


@dataclass(frozen=True)
class TilePixels:
    """`pixels` [band, y, x] in the archive's own numbers, `valid` bool [y, x], and the planes that are
    scored, `scored` [plane, y, x]: bands of the scene, or scores from outside."""

    pixels: np.ndarray
    valid: np.ndarray
    scored: np.ndarray

    def cut(self, y: int, x: int, size_px: int) -> "TilePixels":
        """A square part, from its top left."""
        part = np.s_[..., y : y + size_px, x : x + size_px]
        return TilePixels(self.pixels[part], self.valid[part], self.scored[part])


@contextmanager
def scene_reader(
    scene: Scene, config: DataConfig, scored_bands: tuple[int, ...]
) -> Iterator[Callable[[Span, Span], TilePixels]]:
    """A function from tile rows and columns (half-open) to the pixels of those whole tiles.

    What lies beyond the scene is zero and invalid. Every failure inside becomes a SceneError.
    """
    scores = (
        open_raster(str(score_file(scene, config.scoring)))
        if isinstance(config.scoring, ExternalConfig)
        else nullcontext()
    )
    with open_raster(scene.path) as raster, scores as score_raster:

        def read(rows: Span, cols: Span) -> TilePixels:
            window, pad = _window(scene, config.store.tile_size_px, rows, cols)
            pixels, valid = read_window(raster, scene, config.modality.nodata, window)
            padded = np.pad(pixels, [(0, 0), *pad])
            if score_raster is None:
                scored = padded[list(scored_bands)]
            else:
                scored = np.pad(_scores(score_raster, window), [(0, 0), *pad])
            return TilePixels(padded, np.pad(valid, pad), scored)

        yield read


def sample_tiles(
    scene: Scene, config: DataConfig, scored_bands: tuple[int, ...], num_tiles: int
) -> Iterator[TilePixels]:
    """Up to `num_tiles` tiles of a scene; see `pipeline.rules.sampled_tiles`."""
    tile_px = config.store.tile_size_px
    rows, cols = -(-scene.height // tile_px), -(-scene.width // tile_px)
    chosen = sampled_tiles(rows, cols, num_tiles)
    with scene_reader(scene, config, scored_bands) as read:
        for row, col in zip(*(part.tolist() for part in np.divmod(chosen, cols)), strict=True):
            yield read((row, row + 1), (col, col + 1))


def score_file(scene: Scene, scoring: ExternalConfig) -> Path:
    """The raster in the configured folder that holds a scene's scores; SceneError without one."""
    file = _find_scores(Path(scene.path), scene.id, scoring)
    if file is None:
        raise SceneError(f"has no score raster {scene.id}.tif in scoring.folder {scoring.folder}")
    return file


def input_fingerprint(file: Path, scene_id: str, scoring: ScorerConfig) -> str:
    """Fingerprint of a scene's file and, where its scores come from outside, of those too."""
    own = fingerprint(file)
    if not isinstance(scoring, ExternalConfig):
        return own
    scores = _find_scores(file, scene_id, scoring)
    return f"{own} {fingerprint(scores) if scores else 'without scores'}"


def _find_scores(file: Path, scene_id: str, scoring: ExternalConfig) -> Path | None:
    assert scoring.folder is not None
    candidates = (Path(scoring.folder, f"{scene_id}{s}") for s in (file.suffix, *SUFFIXES))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def check_score_file(scene: Scene, scoring: ExternalConfig, max_block_bytes: int) -> None:
    """Raise SceneError unless a scene's score raster is one band of the scene's own size."""
    assert scoring.folder is not None
    file = score_file(scene, scoring)
    try:
        header = read_header(file, Path(scoring.folder), max_block_bytes)
    except SceneError as error:
        raise SceneError(f"its score raster {file}: {error}") from None
    found = (header.num_bands, header.height, header.width)
    if found != (1, scene.height, scene.width):
        raise SceneError(
            f"its score raster {file} has {found[0]} bands of {found[1]} x {found[2]} px; expected 1 of "
            f"{scene.height} x {scene.width}"
        )


def _window(scene: Scene, tile_px: int, rows: Span, cols: Span) -> tuple[Window, tuple[Span, Span]]:
    """The part of whole tiles inside the scene, and by how much it falls short at the far edges."""
    top, left = rows[0] * tile_px, cols[0] * tile_px
    height = min(rows[1] * tile_px, scene.height) - top
    width = min(cols[1] * tile_px, scene.width) - left
    short = (rows[1] - rows[0]) * tile_px - height, (cols[1] - cols[0]) * tile_px - width
    return Window(left, top, width, height), ((0, short[0]), (0, short[1]))


def _scores(raster: DatasetReader, window: Window) -> np.ndarray:
    """float64 [1, y, x]; NaN where the raster says nodata."""
    scores = raster.read(window=window).astype(np.float64)
    scores[0, raster.read_masks(1, window=window) == 0] = np.nan
    return scores
