"""Tiles of a store as torch data, and the order in which they are trained on."""

from model.data.augment import Augmentation
from model.data.dataset import TileDataset
from model.data.stream import BatchOrder, BatchStream

__all__ = ["Augmentation", "BatchOrder", "BatchStream", "TileDataset"]
