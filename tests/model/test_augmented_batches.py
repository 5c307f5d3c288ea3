"""Augmented batches of stores: held against the tiles as they are stored, turned by hand."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from affine import Affine

from model import APTEncoder, Augmentation, EncoderConfig, TileDataset, TokenBatch, scatter_to_grid
from model.data.symmetry import IDENTITY, turned
from model.objectives import MaskedPrediction, random_masking
from pipeline.errors import ConfigError
from pipeline.overlay import draw_tile
from pipeline.quadtree import partition_image
from pipeline.store import open_store
from support import aptile, save_scene, textured

DRAW = (11, 4)
CONFIG = """
modalities:
  s2:
    source: s2
    pattern: "{tile}_{date}_{band}.tif"
    bands: [B02, B03, B05]
    band_sets: {10m: [B02, B03], 20m: [B05]}
    value_range: [0, 10000]
    scoring: {bands: [B02, B03]}
  s1:
    source: s1
    pattern: "{tile}_{date}.tif"
    bands: [VV, VH]
    value_range: [0, 10000]
  dem:
    source: dem
    pattern: "{tile}.tif"
    static: true
    value_range: [0, 10000]
  classes: {source: classes, pattern: "{tile}.tif", kind: label, ignore_index: 255, bands: [class]}
store: {tile_size_px: 64, shard_tiles: 4}
partition: {base_patch_size: 4, num_scales: 3, thresholds: [1.5, 2.5]}
"""
DATES = ("20200101", "20200106", "20200111", "20200116")
SIDE = 160


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Nine tiles, partly invalid at the edges: Sentinel-2 on four dates, Sentinel-1 on two of them."""
    folder = tmp_path_factory.mktemp("augmented")
    archive = folder / "archive"

    def save(name, shape, seed, metres, **options):
        pixels = textured(shape, seed)
        pixels[:, : 200 // metres, : 300 // metres] = 0
        place = Affine(metres, 0, 500_000, 0, -metres, 5_000_000)
        save_scene(archive / name, pixels, transform=place, nodata=0, **options)

    for index, date in enumerate(DATES):
        for band, metres in (("B02", 10), ("B03", 10), ("B05", 20)):
            side = SIDE * 10 // metres
            save(f"s2/a_{date}_{band}.tif", (1, side, side), index + metres, metres)
        if index % 2:
            save(f"s1/a_{date}.tif", (2, SIDE, SIDE), 40 + index, 10)
    save("dem/a.tif", (1, SIDE // 2, SIDE // 2), 50, 20)
    classes = (textured((1, SIDE, SIDE), 60) % 5).astype(np.uint8)
    save_scene(archive / "classes" / "a.tif", classes, nodata=255)
    (folder / "config.yaml").write_text(CONFIG)
    path = folder / "store"
    assert (
        aptile("preprocess", archive, path, "--config", folder / "config.yaml", "--workers", 1) == 0
    )
    return path


def frames_of(batch: TokenBatch) -> dict[tuple[str, str, int, int], list[np.ndarray]]:
    """Pixels and validity of every frame by modality, band set, tile of the dataset and timestep."""
    every = [(m, s.name, s.pixels, s.valid) for m in batch.modalities for s in m.band_sets]
    every += [(label, "", label.pixels, label.valid) for label in batch.labels.values()]
    return {
        (of.name, name, int(batch.tile_indices[tile]), timestep): [
            pixels[f].numpy(),
            valid[f].numpy(),
        ]
        for of, name, pixels, valid in every
        for f, (tile, timestep) in enumerate(
            zip(of.tile.tolist(), of.timestep.tolist(), strict=True)
        )
    }


def turns_of(dataset: TileDataset, draw=DRAW) -> np.ndarray:
    """int64 [tile]."""
    assert dataset._augmenter is not None
    return dataset._augmenter._turns(draw, dataset._rows)


def cells_on_grid(batch: TokenBatch, modality: int, band_set: int) -> np.ndarray:
    """[F, C, y, x]: what the tokens' cells hold, put where they lie; -1 where no token is."""
    frames = batch.modalities[modality]
    cells, _ = batch.cells(modality, band_set)
    grid, (count, bands, p, _) = frames.grid, cells.shape
    frame, position = np.divmod(batch.cell_index(modality).numpy(), grid.num_cells)
    y, x = grid.cell_yx[position].T
    on_grid = np.full((frames.num_frames, grid.rows, grid.cols, bands, p, p), -1)
    on_grid[frame, y, x] = cells.numpy()
    assert count == frame.size
    return on_grid.transpose(0, 3, 1, 4, 2, 5).reshape(
        frames.num_frames, bands, grid.rows * p, grid.cols * p
    )


def test_all_frames_and_labels_of_a_tile_are_turned_alike(store):
    settings = {"labels": "classes"}
    plain = TileDataset(store, **settings)
    dataset = TileDataset(store, augment=Augmentation(flips=True, rotations=True), **settings)
    tiles = np.arange(len(dataset))
    turns = turns_of(dataset)
    assert len(set(turns.tolist())) >= 4
    before, after = frames_of(plain.batch(tiles)), frames_of(dataset.batch(tiles, DRAW))
    assert before.keys() == after.keys()
    assert {key[:2] for key in before} == {
        ("s2", ""), ("s2", "20m"), ("s1", ""), ("dem", ""), ("classes", ""),
    }  # fmt: skip
    for key, rasters in before.items():
        for was, now in zip(rasters, after[key], strict=True):
            np.testing.assert_array_equal(now, turned(was, turns[key[2]]), err_msg=str(key))


def test_tokens_lie_on_the_turned_pixels_and_there_are_as_many(store):
    plain = TileDataset(store)
    dataset = TileDataset(store, augment=Augmentation(flips=True, rotations=True))
    tiles = np.arange(len(dataset))[::-1].copy()
    before, after = plain.batch(tiles), dataset.batch(tiles, DRAW)
    np.testing.assert_array_equal(after.cu_seqlens, before.cu_seqlens)
    np.testing.assert_array_equal(np.diff(after.cu_seqlens), dataset.token_counts[tiles])
    turns = turns_of(dataset)[tiles]
    for m, (was, now) in enumerate(zip(before.modalities, after.modalities, strict=True)):
        assert was.tokens_per_scale == now.tokens_per_scale
        turn_of_frame = turns[now.tile.numpy()]
        for b in range(len(now.band_sets)):
            old, new = cells_on_grid(before, m, b), cells_on_grid(after, m, b)
            expected = [turned(o, turn) for o, turn in zip(old, turn_of_frame, strict=True)]
            np.testing.assert_array_equal(new, expected)
            covered = new >= 0
            pixels = now.band_sets[b].pixels.numpy()
            np.testing.assert_array_equal(new[covered], pixels[covered])


def test_scattered_tokens_are_those_of_the_turned_grid(chip_store):
    plain = TileDataset(chip_store)
    dataset = TileDataset(chip_store, augment=Augmentation(flips=True, rotations=True))
    tiles = np.arange(len(dataset))
    scattered = []
    for batch in (plain.batch(tiles), dataset.batch(tiles, DRAW)):
        on_grid, covered = scatter_to_grid(batch.scales[:, None].float() + 1, batch)
        np.testing.assert_array_equal(on_grid[..., 0] > 0, covered)
        scattered.append(on_grid[..., 0].numpy())
    for was, now, turn in zip(*scattered, turns_of(dataset), strict=True):
        np.testing.assert_array_equal(now, turned(was, turn))


def test_the_partition_of_a_turned_real_tile_is_the_one_its_pixels_give(chip_store):
    """Cut anew from its turned pixels, with the store's own thresholds."""
    opened = open_store(chip_store)
    layout, name = opened.layout_of(), opened.modalities[0]
    entry, in_manifest = opened.header["modalities"][name], opened.manifest[name].to_pylist()
    dataset = TileDataset(opened, augment=Augmentation(flips=True, rotations=True))
    compared = set()
    for epoch in range(3):
        batch = dataset.batch(np.arange(len(dataset)), (0, epoch))
        frames = batch.modalities[0]
        compared |= set(turns_of(dataset, (0, epoch)).tolist())
        for f, (pixels, valid) in enumerate(
            zip(frames.band_sets[0].pixels, frames.band_sets[0].valid, strict=True)
        ):
            again = partition_image(
                pixels.numpy(),
                valid=valid.numpy(),
                base_patch_size=layout.grid.base_patch_size,
                num_scales=layout.grid.num_scales,
                thresholds=in_manifest[f]["thresholds"][0],
                value_range=tuple(map(tuple, entry["value_range"])),
            )
            found = batch.positions[batch.frame == f].numpy()
            present = again.descriptors[~again.descriptors["missing"]]
            for column, name in enumerate(("y", "x", "scale")):
                np.testing.assert_array_equal(found[:, column], present[name])
    print(f"{3 * len(dataset)} tiles cut anew, under turns {sorted(compared)}")
    assert len(compared) == 8


def test_crops_are_windows_of_all_modalities_at_the_same_place(store):
    settings = {"labels": "classes"}
    plain = TileDataset(store, **settings)
    dataset = TileDataset(store, augment=Augmentation(crop_px=32, rotations=True), **settings)
    tiles, turns = np.arange(len(dataset)), turns_of(dataset)
    corners = dataset._augmenter._corners(DRAW, tiles)
    assert set(corners.ravel().tolist()) == {0, 1}
    before, batch = frames_of(plain.batch(tiles)), dataset.batch(tiles, DRAW)
    for key, rasters in frames_of(batch).items():
        for was, now in zip(before[key], rasters, strict=True):
            side = was.shape[-1] // 2
            y, x = corners[key[2]] * side
            expected = turned(was[..., y : y + side, x : x + side], turns[key[2]])
            np.testing.assert_array_equal(now, expected, err_msg=str(key))
    assert [m.grid.rows for m in batch.modalities] == [8, 8, 4]
    for m, frames in enumerate(batch.modalities):
        for b, band_set in enumerate(frames.band_sets):
            found = cells_on_grid(batch, m, b)
            np.testing.assert_array_equal(found[found >= 0], band_set.pixels.numpy()[found >= 0])
            assert not band_set.valid.numpy()[found[:, 0] < 0].any()
    # The plan counts whole tiles.
    assert (np.diff(batch.cu_seqlens) <= dataset.token_counts).all()
    np.testing.assert_array_equal(dataset.token_counts, plain.token_counts)


def test_dates_left_out_are_not_read_and_gone_from_all_modalities(store, monkeypatch):
    plain = TileDataset(store, labels="classes")
    dataset = TileDataset(store, augment=Augmentation(drop_dates=0.6), labels="classes")
    tiles = np.arange(len(dataset))
    before = frames_of(plain.batch(tiles))
    slots = []
    read_into = type(dataset.store).read_into
    monkeypatch.setattr(
        type(dataset.store),
        "read_into",
        lambda self, name, frames, out: (
            slots.append(len(frames)) or read_into(self, name, frames, out)
        ),
    )
    batch = dataset.batch(tiles, DRAW)
    after = frames_of(batch)
    assert sum(slots) == 2 * len(after)
    dates = {(tile, at) for name, _, tile, at in after if name == "s2"}
    assert {tile for tile, _ in dates} == set(tiles.tolist())
    assert 9 < len(dates) < 36
    expected = {key for key in before if key[0] in ("dem", "classes") or (key[2], key[3]) in dates}
    assert after.keys() == expected
    for key, rasters in after.items():
        for was, now in zip(before[key], rasters, strict=True):
            np.testing.assert_array_equal(now, was)
    assert (np.diff(batch.cu_seqlens) <= dataset.token_counts).all()


@pytest.mark.parametrize("format_asked", [{}, {"normalize": "value_range", "dtype": "float16"}])
def test_bands_left_out_are_zero_in_every_format(store, format_asked):
    plain = TileDataset(store, **format_asked)
    dataset = TileDataset(store, augment=Augmentation(drop_bands=0.5), **format_asked)
    tiles = np.arange(len(dataset))
    before, after = plain.batch(tiles), dataset.batch(tiles, DRAW)
    dropped = 0
    for was, now in zip(before.modalities, after.modalities, strict=True):
        for old, new in zip(was.band_sets, now.band_sets, strict=True):
            there = new.band_present[:, :, None, None]
            expected = torch.where(there, old.pixels.float(), 0)
            np.testing.assert_array_equal(new.pixels.float(), expected)
            assert new.band_present.any(1).all()
            dropped += int((~new.band_present).sum())
    assert dropped > 10


def test_a_tile_is_the_same_in_any_batch_and_process(store):
    settings = Augmentation(flips=True, rotations=True, crop_px=32, drop_dates=0.3, drop_bands=0.3)
    dataset = TileDataset(store, augment=settings)
    whole = frames_of(dataset.batch(np.arange(9), DRAW))
    for tiles in ([4], [8, 2, 5], [3, 3]):
        part = frames_of(dataset.batch(tiles, DRAW))
        assert part.keys() == {key for key in whole if key[2] in tiles}
        for key, rasters in part.items():
            for was, now in zip(whole[key], rasters, strict=True):
                np.testing.assert_array_equal(now, was)
    again = frames_of(pickle.loads(pickle.dumps(dataset)).batch([4], DRAW))  # noqa: S301
    assert all((again[key][0] == whole[key][0]).all() for key in again)


@pytest.mark.parametrize("limit", [10, 150])
def test_no_tile_has_more_tokens_than_were_planned(store, limit):
    settings = Augmentation(rotations=True, crop_px=32, drop_dates=0.5)
    dataset = TileDataset(store, augment=settings, max_tokens_per_tile=limit)
    batch = dataset.batch(np.arange(9), DRAW)
    tokens = np.diff(batch.cu_seqlens)
    assert tokens.sum() > 0
    assert (tokens <= dataset.token_counts).all()
    assert dataset.token_counts.max() <= limit


def test_without_a_draw_a_batch_is_as_stored_but_for_the_window(store):
    tiles = np.arange(9)
    before = frames_of(TileDataset(store).batch(tiles))
    turning = Augmentation(flips=True, rotations=True, drop_dates=0.9, drop_bands=0.9)
    after = frames_of(TileDataset(store, augment=turning).batch(tiles))
    assert after.keys() == before.keys()
    assert all((after[key][0] == before[key][0]).all() for key in before)
    only_s2 = TileDataset(store, modalities="s2", augment=Augmentation(crop_px=32))
    for key, (pixels, _) in frames_of(only_s2.batch(tiles)).items():
        whole = before[key][0]
        quarter = whole.shape[-1] // 4
        middle = slice(quarter, 3 * quarter)
        np.testing.assert_array_equal(pixels, whole[:, middle, middle])


def test_the_fingerprint_holds_the_augmentation(store):
    choices = [None, Augmentation(flips=True), Augmentation(flips=True, crop_px=32)]
    found = {TileDataset(store, augment=choice).fingerprint for choice in choices}
    assert len(found) == 3


def test_an_encoder_takes_augmented_batches(chip_store):
    settings = Augmentation(flips=True, rotations=True, crop_px=64, drop_bands=0.4)
    dataset = TileDataset(chip_store, augment=settings)
    encoder = APTEncoder(EncoderConfig.for_store(dataset.store, dataset.modalities))
    batch = dataset.batch(np.arange(len(dataset)), DRAW)
    tokens = encoder(batch).tokens
    assert tokens.shape[0] == batch.num_tokens > 0
    assert torch.isfinite(tokens).all()
    loss = MaskedPrediction(encoder)(random_masking(batch, 0.5, DRAW))
    loss.backward()
    assert torch.isfinite(loss)


def test_pictures_of_a_real_tile_show_its_leaves_on_the_turned_image(chip_store, tmp_path):
    dataset = TileDataset(chip_store, augment=Augmentation(flips=True, rotations=True))
    tile = dataset[4]
    turn = turns_of(dataset)[4]
    assert turn != IDENTITY
    batch = dataset.batch([4], DRAW)
    after = replace(
        tile,
        pixels=batch.modalities[0].band_sets[0].pixels.numpy(),
        valid=batch.modalities[0].band_sets[0].valid.numpy(),
        scales=[batch.scales.numpy()],
        score_maps=[turned(scores, turn) for scores in tile.score_maps],
    )
    # Scores are read at the leaves: each has the same as before.
    was, now = tile.descriptors(), after.descriptors()
    assert sorted(was["score"][~was["missing"]]) == sorted(now["score"])
    bands = dataset.store.layout_of().bands
    draw_tile(tile, bands, tmp_path / "before.png")
    draw_tile(after, bands, tmp_path / "after.png")
    assert (tmp_path / "after.png").read_bytes() != (tmp_path / "before.png").read_bytes()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"augment": Augmentation(crop_px=48)},
            "multiple of 32 px, the roots of s2 and s1 and dem",
        ),
        ({"augment": {"flips": True}}, "give an Augmentation"),
        (
            {"augment": Augmentation(drop_dates=0.5), "modalities": "dem"},
            "no tile has more than one date",
        ),
        ({"augment": Augmentation(drop_bands=0.5), "modalities": "dem"}, "one band only"),
        (
            {"augment": Augmentation(flips=True), "labels": {"masks": np.zeros((9, 64, 64))}},
            "labels\\['masks'\\] has axes \\(9, 64, 64\\), which would not turn",
        ),
    ],
)
def test_what_cannot_be_done_with_a_store_is_refused_in_words(store, settings, named):
    with pytest.raises(ConfigError, match=named):
        TileDataset(store, **settings)
