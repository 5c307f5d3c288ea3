"""Pictures of a tile: its image with the quadtree drawn over it, beside its score maps."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.storage.tiles import Tile

# Percentiles of the valid pixels that become black and white.
_STRETCH = (2, 98)
_NATURAL_COLOUR = ("B04", "B03", "B02")
_INVALID_COLOUR = (1.0, 0.0, 1.0)
_PNG_DPI = 110


def draw_tile(tile: Tile, bands: tuple[str, ...], file: Path, frame: int = 0) -> None:
    """Write a PNG of one frame: image, image with leaves, and one score map per patch size.

    Missing leaves are crossed out; invalid pixels are magenta.
    """
    sizes = tile.grid.patch_sizes
    # The Agg canvas needs no display and leaves the caller's backend alone.
    with mpl.rc_context({"font.size": 9}):
        # Label rasters have no leaves, uniform patches no scores.
        leaves, maps = int(bool(tile.scales)), len(tile.score_maps)
        panels = 1 + leaves + maps
        figure = Figure(figsize=(4 * panels, 4.6), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        shown = display_bands(bands)
        image = stretched(tile.pixels[frame][list(shown)], tile.valid[frame])
        for panel in axes[: 1 + leaves]:
            panel.imshow(image, interpolation="nearest")
        axes[0].set_title(" ".join(bands[band] for band in shown))
        if leaves:
            _draw_leaves(axes[1], tile, frame)
        for panel, size, scores in zip(axes[1 + leaves :], sizes, tile.score_maps, strict=False):
            drawn = panel.imshow(scores[frame], cmap="viridis", vmin=0, interpolation="nearest")
            panel.set_title(f"score, {size} px patches")
            figure.colorbar(drawn, ax=panel, shrink=0.75)
        for panel in axes:
            panel.set_axis_off()
        when = tile.datetimes[int(tile.timesteps[frame])]
        figure.suptitle(tile.id if when is None else f"{tile.id}  {when:%Y-%m-%d}")
        figure.savefig(file, dpi=_PNG_DPI)


def display_bands(bands: tuple[str, ...]) -> tuple[int, ...]:
    """Red, green and blue where the names say so, else the first three bands, or the only one."""
    if set(_NATURAL_COLOUR) <= set(bands):
        return tuple(bands.index(name) for name in _NATURAL_COLOUR)
    return (0, 1, 2) if len(bands) >= 3 else (0,)


def stretched(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[y, x, rgb] in [0, 1] from [band, y, x] with one or three bands; invalid pixels magenta."""
    pixels = image.astype(np.float64)
    picture = np.empty((*valid.shape, 3))
    picture[...] = _INVALID_COLOUR
    if valid.any():
        low, high = np.percentile(pixels[:, valid], _STRETCH)
        unit = np.clip((pixels - low) / max(high - low, 1e-12), 0, 1)
        picture[valid] = np.broadcast_to(unit, (3, *valid.shape))[:, valid].T
    return picture


def _draw_leaves(panel: Axes, tile: Tile, frame: int) -> None:
    leaves = tile.descriptors()
    leaves = leaves[leaves["timestep"] == tile.timesteps[frame]]
    present = leaves[~leaves["missing"]]
    p = tile.grid.base_patch_size
    for group, colour in ((present, "yellow"), (leaves[leaves["missing"]], "red")):
        boxes = [
            Rectangle((leaf["x"] * p - 0.5, leaf["y"] * p - 0.5), leaf["size"], leaf["size"])
            for leaf in group
        ]
        panel.add_collection(
            PatchCollection(boxes, facecolor="none", edgecolor=colour, linewidth=0.5, alpha=0.9)
        )
    for leaf in leaves[leaves["missing"]]:
        y, x, size = leaf["y"] * p - 0.5, leaf["x"] * p - 0.5, leaf["size"]
        panel.plot([x, x + size], [y, y + size], color="red", linewidth=0.5)
    uniform = int((4.0 ** present["scale"]).sum())
    if tile.score_maps:
        uniform = int(np.count_nonzero(~np.isnan(tile.score_maps[0][frame])))
    share = f" ({len(present) / uniform:.0%})" if uniform else ""
    panel.set_title(f"{len(present)} tokens of {uniform}{share}")
