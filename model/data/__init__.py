"""Tiles of a store as torch data, and the order in which they are trained on."""

from model.data.augment import Augmentation
from model.data.dataset import TileDataset
from model.data.loader import TokenBatches
from model.data.mixing import mix
from model.data.plan import BatchPlan
from model.data.sampling import Sampling, class_balanced, class_weights
from model.data.stream import BatchStream

__all__ = [
    "Augmentation",
    "BatchPlan",
    "BatchStream",
    "Sampling",
    "TileDataset",
    "TokenBatches",
    "class_balanced",
    "class_weights",
    "mix",
]
