"""aptile's offline side: archives in, scored and partitioned tiles out. Never imports torch.

Names are loaded at first use, so that reading a store needs neither numba nor dask nor rasterio.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.quadtree import Partition, partition_image
    from pipeline.scores import score_maps
    from pipeline.store import Store, open_store

_HOME = {
    "Partition": "pipeline.quadtree",
    "Store": "pipeline.store",
    "open_store": "pipeline.store",
    "partition_image": "pipeline.quadtree",
    "score_maps": "pipeline.scores",
}
__all__ = ["Partition", "Store", "open_store", "partition_image", "score_maps"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
