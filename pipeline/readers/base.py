"""What every reader of an asset offers."""

from typing import Protocol

import numpy as np

from pipeline.scenes import Window


class AssetReader(Protocol):
    """An open asset. Windows lie inside `asset.shown_grid`."""

    def read(self, window: Window) -> np.ndarray:
        """Numbers [plane, y, x] in the asset's own type, planes in the asset's order."""

    def readable(self, window: Window) -> np.ndarray | None:
        """bool [y, x]: where the file's own mask, alpha band or warp has data; None if it has none."""
