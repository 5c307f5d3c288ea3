"""Tiles of a store as torch data: what is read, in which order, and the stream of batches."""

from model.data.dataset import BatchOrder, BatchStream, TileDataset

__all__ = ["BatchOrder", "BatchStream", "TileDataset"]
