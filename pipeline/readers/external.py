"""Scores from outside: one raster per scene, in a folder beside the archive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.errors import SceneError
from pipeline.locations import as_root, file_fingerprint
from pipeline.readers.rasters import open_raster, read_header
from pipeline.scenes import Access, Scene, Window, asset_of, own_name
from pipeline.scorers.config import ExternalConfig
from pipeline.settings.config import ModalitySettings

_SUFFIXES = (".tif", ".tiff")


def score_file(scene: Scene, scoring: ExternalConfig) -> Path | None:
    """The raster in the configured folder that holds a scene's scores, if there is one."""
    assert scoring.folder is not None
    candidates = (Path(scoring.folder, f"{own_name(scene)}{suffix}") for suffix in _SUFFIXES)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def score_files(settings: ModalitySettings) -> dict[str, str]:
    """Fingerprints of all rasters in the scores' folder, by path; none if scores are computed."""
    scoring = settings.scoring
    if not isinstance(scoring, ExternalConfig):
        return {}
    assert scoring.folder is not None
    found = sorted(p for p in Path(scoring.folder).rglob("*") if p.suffix.lower() in _SUFFIXES)
    return {
        f"scores/{p.relative_to(scoring.folder).as_posix()}": file_fingerprint(str(p))
        for p in found
    }


def check_scores(scene: Scene, settings: ModalitySettings, access: Access) -> None:
    """Raise SceneError unless a scene's score raster is one band of the size of its scored bands."""
    scoring = settings.scoring
    if not isinstance(scoring, ExternalConfig):
        return
    grid = asset_of(scene, scene.assets[0].planes[0].band)[0].shown_grid
    file = _required(scene, scoring)
    try:
        header = read_header(str(file), _with_folder(access, scoring))
    except SceneError as error:
        raise SceneError(f"its score raster {file}: {error}") from None
    found = (header.num_bands, header.grid.height, header.grid.width)
    if found != (1, grid.height, grid.width):
        raise SceneError(
            f"its score raster {file} has {found[0]} bands of {found[1]} x {found[2]} px; expected 1 of "
            f"{grid.height} x {grid.width}"
        )


@contextmanager
def open_scores(
    scene: Scene, scoring: ExternalConfig, access: Access
) -> Iterator[Callable[[Window], np.ndarray]]:
    """A function from a window to scores float64 [1, y, x]; NaN where the raster says nodata."""
    file = _required(scene, scoring)
    with open_raster(str(file), _with_folder(access, scoring)) as raster:

        def read(window: Window) -> np.ndarray:
            box = (
                (window.top, window.top + window.height),
                (window.left, window.left + window.width),
            )
            scores = raster.read(window=box).astype(np.float64)
            scores[0, raster.read_masks(1, window=box) == 0] = np.nan
            return scores

        yield read


def _required(scene: Scene, scoring: ExternalConfig) -> Path:
    file = score_file(scene, scoring)
    if file is None:
        name = own_name(scene)
        raise SceneError(f"has no score raster {name}.tif in scoring.folder {scoring.folder}")
    return file


def _with_folder(access: Access, scoring: ExternalConfig) -> Access:
    assert scoring.folder is not None
    return replace(access, roots=(*access.roots, as_root(scoring.folder)))
