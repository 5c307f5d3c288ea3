"""aptile's training side: packed batches from a store, and the APT encoder.

Never imports dask, rasterio or numba: a training environment can lack them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.batch import TokenBatch
from model.config import EncoderConfig, EncoderOptions
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
from model.encoded import Encoded
from model.masks import with_cell_masks, with_token_masks
from model.pooling import AttentionPool, class_pool, mean_pool
from model.upsample import scatter_to_grid, to_grid, tokens_at

if TYPE_CHECKING:
    from model.cost import TokenCounts, count_flops, count_parameters
    from model.encoder import APTEncoder

__all__ = [
    "APTEncoder",
    "AttentionPool",
    "Augmentation",
    "BatchStream",
    "Encoded",
    "EncoderConfig",
    "EncoderOptions",
    "Sampling",
    "TileDataset",
    "TokenBatch",
    "TokenBatches",
    "TokenCounts",
    "class_balanced",
    "class_pool",
    "class_weights",
    "count_flops",
    "count_parameters",
    "mean_pool",
    "mix",
    "scatter_to_grid",
    "to_grid",
    "tokens_at",
    "with_cell_masks",
    "with_token_masks",
]

# They load torch's compiler: a second that processes which only read batches need not spend.
_WHEN_ASKED_FOR = {
    "APTEncoder": "model.encoder",
    "TokenCounts": "model.cost",
    "count_flops": "model.cost",
    "count_parameters": "model.cost",
}


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHEN_ASKED_FOR[name]), name)
