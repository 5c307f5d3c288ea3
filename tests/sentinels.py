"""An archive of several modalities, dates and resolutions, made of small synthetic scenes."""

import numpy as np
from affine import Affine

from support import save_scene, textured

CONFIG = """
modalities:
  s2:
    source: s2
    pattern: "{tile}_{date}_{band}.tif"
    bands: [B02, B03, B05, B09]
    band_sets: {10m: [B02, B03], 20m: [B05], 60m: [B09]}
    value_range: [0, 10000]
    scoring: {bands: [B02, B03]}
  s1:
    source: s1
    pattern: "{tile}_{date}.tif"
    bands: [VV, VH]
    value_range: [-30, 0]
  dem: {source: dem, pattern: "{tile}.tif", static: true, adaptive: false, partition: {base_patch_size: 8}}
  classes: {source: classes, pattern: "{tile}.tif", kind: label, ignore_index: 255, bands: [class]}
store: {tile_size_px: 96, shard_tiles: 2}
partition: {thresholds: [1.5, 2.5]}
"""
DATES = ("20200101", "20200106", "20200111")
# Rows and columns of a place at 10 m: neither is a whole number of tiles.
PLACES = {"north": (150, 210, 5_000_000), "south": (96, 96, 4_000_000)}


def transform(top, metres):
    return Affine(metres, 0, 500_000, 0, -metres, top)


def make_archive(folder):
    """Two places. Sentinel-2 has three dates, but `north` lacks the second; Sentinel-1 has the second only;
    the elevation model is 20 m; labels exist in the south only."""
    for number, (place, (height, width, top)) in enumerate(PLACES.items()):
        for index, date in enumerate(DATES):
            seed = 10 * number + index
            if (place, index) != ("north", 1):
                for band, metres in (("B02", 10), ("B03", 10), ("B05", 20), ("B09", 60)):
                    shape = (1, -(-height * 10 // metres), -(-width * 10 // metres))
                    pixels = textured(shape, seed + metres)
                    pixels[:, :20, :30] = 0
                    path = folder / "s2" / f"{place}_{date}_{band}.tif"
                    save_scene(path, pixels, nodata=0, transform=transform(top, metres))
        backscatter = np.random.default_rng(number).normal(-15, 4, (2, height, width))
        path = folder / "s1" / f"{place}_{DATES[1]}.tif"
        save_scene(path, backscatter, transform=transform(top, 10), interleave="band")
        elevation = (
            np.arange(height * width // 4).reshape(1, height // 2, width // 2).astype("int16")
        )
        save_scene(folder / "dem" / f"{place}.tif", elevation, transform=transform(top, 20))
    classes = np.full((1, 96, 96), 255, np.uint8)
    classes[:, 10:50] = 3
    path = folder / "classes" / "south.tif"
    save_scene(path, classes, transform=transform(4_000_000, 10), nodata=255)
    return folder
