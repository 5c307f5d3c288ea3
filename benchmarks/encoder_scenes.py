"""Batches of real scenes for `bench_encoder.py`, at wanted shares of the base grid's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine

from common import Silent, chip, preprocess
from model import TileDataset, TokenBatch
from pipeline.calibrate import token_curve
from pipeline.jobs.repartition import repartition
from pipeline.nodes import node_scores
from pipeline.rules import FurtherRule
from pipeline.settings.run import RunConfig
from pipeline.storage.places import FrameRun
from pipeline.store import Store, open_store

SCALES = 3
UNIFORM = 1.0


@dataclass(frozen=True)
class Setting:
    """How scenes are cut. `cells`: base cells of all frames of a batch, which decides its size."""

    tile_px: int
    base_px: int
    dates: int
    cells: int

    @property
    def name(self) -> str:
        dates = "1 date" if self.dates == 1 else f"{self.dates} dates"
        return f"{self.tile_px} px, base {self.base_px} px, {dates}"

    @property
    def cells_per_frame(self) -> int:
        return (self.tile_px // self.base_px) ** 2

    @property
    def num_frames(self) -> int:
        return self.cells // self.cells_per_frame


def store_of(setting: Setting, archive: Path | None, folder: Path) -> Store:
    """The store of an archive, or of the chip that comes with spyndex, made once for every size."""
    location = folder / f"store_{setting.tile_px}_{setting.base_px}"
    if not location.exists():
        if archive is None:
            archive = folder / "archive"
            _write_chip(archive)
        preprocess(
            archive,
            location,
            f"store.tile_size_px={setting.tile_px}",
            f"partition.base_patch_size={setting.base_px}",
            f"partition.num_scales={SCALES}",
        )
        _partition(open_store(location), "uniform", FurtherRule(uniform_px=setting.base_px))
    return open_store(location)


def _write_chip(archive: Path) -> None:
    """The chip of the package spyndex as an archive of one scene, at a place made up for it."""
    pixels = chip()
    archive.mkdir(exist_ok=True)
    with rasterio.open(
        archive / "chip.tif", "w", driver="GTiff", count=len(pixels), height=pixels.shape[1],
        width=pixels.shape[2], dtype=pixels.dtype, crs="EPSG:32632",
        transform=Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        raster.write(pixels)


def batches_of(store: Store, setting: Setting, ratios: Sequence[float]) -> dict[float, TokenBatch]:
    """The same tiles at every ratio, by it, normalised; `UNIFORM` is the whole base grid.

    Tiles are spread over the store; of those at a scene's edge there are none. Thresholds are read off
    the tiles' stored score maps. An archive's scenes have one date: neighbours in the order of tiles
    stand for the dates of one.
    """
    tiles = _whole_tiles(store, setting)
    modality = store.tokenized[0]
    slots, _ = store.frame_table(modality).of(tiles)
    grid = store.layouts[modality].grid
    nodes = node_scores(store.read_score_maps(modality, slots), grid)
    curve = token_curve([(nodes, FrameRun(slots, np.arange(len(slots))))], grid)
    batches = {}
    for ratio in ratios:
        name = "uniform"
        if ratio != UNIFORM:
            name = f"share_{100 * ratio:.0f}_of_{setting.cells}"
            quantile = curve.quantile_for(ratio * setting.cells_per_frame)
            _partition(store, name, FurtherRule(thresholds=tuple(curve.thresholds(quantile))))
        dataset = TileDataset(
            str(store.location), name, {modality: [""]}, normalize="value_range", dtype="float32"
        )
        batches[ratio] = with_dates(dataset.batch(tiles), setting.dates)
    return batches


def fresh(batch: TokenBatch) -> TokenBatch:
    """The same batch, of which nothing is derived yet: a step derives it anew."""
    return replace(batch)


def _partition(store: Store, name: str, rule: FurtherRule) -> None:
    modality = store.tokenized[0]
    if name not in store.partitions(modality):
        repartition(store.location, name, rule, RunConfig(workers=1), Silent(), modality)


def _whole_tiles(store: Store, setting: Setting) -> np.ndarray:
    """int64: as many tiles as the setting has frames, none of which lacks a base cell."""
    modality = store.tokenized[0]
    table = store.frame_table(modality)
    if (table.per_tile != 1).any():
        raise ValueError(f"{store.location}: tiles of several dates; give scenes of one date each")
    tokens = store.partition("uniform", modality).tokens[table.slots].sum(1)
    whole = np.flatnonzero(tokens == setting.cells_per_frame)
    if not whole.size:
        raise ValueError(f"no whole tile of {setting.tile_px} px; give larger scenes")
    return whole[np.linspace(0, len(whole) - 1, setting.num_frames).astype(np.int64)]


def with_dates(batch: TokenBatch, dates: int) -> TokenBatch:
    """Tiles of one date as fewer tiles of several; tokens stay in their places."""
    (frames,) = batch.modalities
    number = torch.arange(batch.num_tiles, device=batch.device)
    frames = replace(frames, tile=number // dates, timestep=number % dates, num_timesteps=dates)
    positions = batch.positions.clone()
    positions[:, 3] = (number % dates)[batch.frame]
    cu_seqlens = batch.cu_seqlens[::dates].clone()
    return replace(
        batch,
        modalities=(frames,),
        positions=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        tile_indices=batch.tile_indices[::dates].clone(),
    )
