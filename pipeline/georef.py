"""Coordinate reference systems: canonical names, lengths, corners in longitude and latitude."""

import math
import re
from functools import lru_cache

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.errors import CRSError

from pipeline.errors import SceneError
from pipeline.scenes import Grid

# Authority code, WKT, PROJ string or PROJJSON.
_CRS_TEXT = re.compile(r"\s*([A-Za-z]+:[A-Za-z0-9_.]+\s*$|[A-Z_0-9]+\s*[\[(]|\+proj=|\{)")


@lru_cache(maxsize=4096)
def canonical_crs(text: str) -> str:
    """A CRS given as authority code, WKT, PROJ string or PROJJSON, in one form per system.

    An authority code where there is one, else WKT. Raises SceneError for text that names no CRS; file
    names and addresses, which GDAL would open, are such text.
    """
    try:
        if _CRS_TEXT.match(text) is None:
            raise ValueError
        with rasterio.Env():
            return str(CRS.from_user_input(text).to_string())
    except (CRSError, ValueError, TypeError, RecursionError):
        raise SceneError(
            f"its CRS {text!r:.80} is not known; expected a code such as EPSG:32632 or WKT"
        ) from None


def ground_sample_distance(grid: Grid) -> float | None:
    """Metres of one step along a row, also on rotated grids; None where the CRS has no unit of length."""
    if grid.crs is None or grid.transform is None:
        return None
    metres = _metres_per_unit(grid.crs)
    return None if metres is None else math.hypot(grid.transform[0], grid.transform[3]) * metres


@lru_cache(maxsize=4096)
def _metres_per_unit(crs: str) -> float | None:
    system = CRS.from_user_input(crs)
    return float(system.linear_units_factor[1]) if system.is_projected else None


def native_corners(grid: Grid, pixel_corners: np.ndarray) -> np.ndarray:
    """Coordinates [n, (x, y)], in the units of the CRS, of pixel corners float64 [n, (col, row)]."""
    assert grid.transform is not None
    a, b, c, d, e, f = grid.transform
    x, y = pixel_corners.T
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)
