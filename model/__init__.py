"""aptile's training side: packed batches from a store, and the APT encoder.

Never imports dask, rasterio or numba: a training environment can lack them.
"""

from model.batch import TokenBatch
from model.data import (
    Augmentation,
    BatchStream,
    Sampling,
    TileDataset,
    TokenBatches,
    class_balanced,
    class_weights,
    mix,
)
from model.encoder import APTEncoder, EncoderConfig
from model.upsample import scatter_to_grid

__all__ = [
    "APTEncoder",
    "Augmentation",
    "BatchStream",
    "EncoderConfig",
    "Sampling",
    "TileDataset",
    "TokenBatch",
    "TokenBatches",
    "class_balanced",
    "class_weights",
    "mix",
    "scatter_to_grid",
]
