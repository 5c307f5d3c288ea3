"""Sensor presets: what is known of a product before any scene is opened.

Sources: band names, order and quantification (DN = reflectance x 10000) of Sentinel-2 Level-2A are
those of the Sentinel-2 Products Specification Document; B10 is not part of Level-2A.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "s2_l2a": {
        "modality": {
            "name": "s2_l2a",
            "bands": [
                "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12",
            ],
            "value_range": [0, 10000],
            "ground_sample_distance_m": 10,
        },
        "scoring": {"bands": ["B02", "B03", "B04"]},
    },
}  # fmt: skip
