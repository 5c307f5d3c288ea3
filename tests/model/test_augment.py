"""Augmentation by counter-based draws: which turn, window, dates and bands a tile gets, and that all of
its frames, modalities and labels get the same."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model.data import symmetry
from model.data.augment import Augmentation, Augmenter, Crop, check_effect, crop_of
from model.data.frames import ChosenFrames, NewMemory
from model.packing import BandSetArrays, FrameArrays, LabelArrays, TileArrays
from pipeline import segments
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.storage.layout import BandSet, StoreLayout

EVERYTHING = Augmentation(flips=True, rotations=True, crop_px=16, drop_dates=0.4, drop_bands=0.3)
DRAW = (7, 3)


def layout(modality="s2", sets=(("", 4, 32),), base=2, num_scales=3) -> StoreLayout:
    """The layout of a modality; `sets` are name, number of bands and tile size in px of each band set."""
    band_sets = tuple(
        BandSet(name, tuple(f"b{n}" for n in range(bands)), "uint16", px)
        for name, bands, px in sets
    )
    cells = sets[0][2] // base
    grid = BaseGrid(cells, cells, base, num_scales)
    return StoreLayout(modality, band_sets, grid, 1, 8, "lz4")


S2 = layout(sets=(("", 4, 32), ("20m", 3, 16)))
# Roots of 16 px where those of S2 have 8.
DEM = layout("dem", sets=(("", 1, 32),), base=4)
LAND_COVER = layout("lc", sets=(("", 1, 64),), base=1, num_scales=1)


def paint(side: int, tile_keys: np.ndarray) -> np.ndarray:
    """[F, 1, y, x]: where each pixel is, and whose, as one number; parts of 1/32 of a tile's side."""
    at = np.arange(side) * 32 // side
    return tile_keys[:, None, None, None] % 60 * 1024 + at[:, None] * 32 + at


def leaves_of(rng: np.random.Generator, scale: int) -> list[int]:
    if scale and rng.random() < 0.5:
        return [leaf for _ in range(4) for leaf in leaves_of(rng, scale - 1)]
    return [scale | (0x80 if rng.random() < 0.2 else 0)]


def made(settings: Augmentation, *images: StoreLayout) -> Augmenter:
    return Augmenter(settings, crop_of(settings.crop_px, images, ()), {"s2": True, "labels": False})


def read(of: StoreLayout, tile_keys: np.ndarray, frames_per_tile: int = 2) -> FrameArrays:
    """Frames of some tiles; what they hold depends on the tile's key and the timestep alone."""
    tile = np.repeat(np.arange(tile_keys.size), frames_per_tile)
    roots = (of.grid.rows // of.grid.root_cells) ** 2
    scales = [
        np.array(
            [leaf for _ in range(roots) for leaf in leaves_of(rng, of.grid.num_scales - 1)],
            np.uint8,
        )
        for key in tile_keys.tolist()
        for timestep in range(frames_per_tile)
        for rng in [np.random.default_rng([key, timestep])]
    ]
    sets = []
    for band_set in of.band_sets:
        num_bands, side = len(band_set.bands), band_set.tile_size_px
        pixels = paint(side, tile_keys[tile]) + np.arange(1, num_bands + 1)[:, None, None]
        valid = pixels[:, 0] % 3 > 0
        present = np.ones((tile.size, num_bands), bool)
        sets.append(
            BandSetArrays(band_set.name, band_set.bands, pixels.astype(np.uint16), valid, present)
        )
    counts = np.array([leaves.size for leaves in scales], np.int64)
    flat = np.concatenate([np.empty(0, np.uint8), *scales])
    timestep = np.tile(np.arange(frames_per_tile), tile_keys.size)
    timestamps = np.full((tile.size, 3), -1, np.int32)
    return FrameArrays(of.modality, of.grid, sets, flat, counts, tile, timestep, timestamps)


def augmented(
    augmenter: Augmenter, draw: tuple[int, int] | None, tile_keys: np.ndarray, *read: FrameArrays
) -> FrameArrays:
    """The first of some modalities, changed as all are."""
    tiles = TileArrays(np.arange(tile_keys.size), list(read))
    augmenter.apply(draw, tile_keys, tiles, NewMemory())
    return tiles.modalities[0]


def split(frames: FrameArrays) -> list[np.ndarray]:
    return np.split(frames.scales, np.cumsum(frames.counts)[:-1])


def assert_same(one: FrameArrays, other: FrameArrays) -> None:
    assert (one.name, one.grid) == (other.name, other.grid)
    for name in ("scales", "counts", "tile", "timestep"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for mine, yours in zip(one.band_sets, other.band_sets, strict=True):
        for name in ("pixels", "valid", "band_present"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(yours, name))


keys = st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True).map(np.array)
draws_made = st.tuples(st.integers(0, 2**32), st.integers(0, 100))
settings_made = st.builds(
    Augmentation,
    flips=st.booleans(),
    rotations=st.booleans(),
    crop_px=st.sampled_from([None, 16]),
    drop_dates=st.just(0.5),
    drop_bands=st.sampled_from([0.0, 0.5]),
)


@given(settings=settings_made, draw=draws_made, tile_keys=keys, data=st.data())
def test_a_tile_gets_the_same_in_whatever_batch_it_comes(settings, draw, tile_keys, data):
    augmenter = made(settings, S2, DEM)
    whole = augmented(augmenter, draw, tile_keys, read(S2, tile_keys))
    chosen = np.array(data.draw(st.permutations(range(tile_keys.size))))[
        : data.draw(st.integers(1, tile_keys.size))
    ]
    part = augmented(augmenter, draw, tile_keys[chosen], read(S2, tile_keys[chosen]))
    frames = np.concatenate([np.flatnonzero(whole.tile == tile) for tile in chosen])
    expected = replace(
        whole,
        scales=np.concatenate([split(whole)[frame] for frame in frames]),
        counts=whole.counts[frames],
        tile=part.tile,
        timestep=whole.timestep[frames],
        band_sets=[
            replace(
                s,
                pixels=s.pixels[frames],
                valid=s.valid[frames],
                band_present=s.band_present[frames],
            )
            for s in whole.band_sets
        ],
    )
    assert_same(part, expected)


@given(settings=settings_made, draw=draws_made, tile_keys=keys)
def test_everything_of_a_tile_turns_and_is_cropped_together(settings, draw, tile_keys):
    """Band sets, modalities and labels of other pixel sizes show the same places afterwards."""
    s2, dem = read(S2, tile_keys), read(DEM, tile_keys, 1)
    each, per_tile = np.arange(tile_keys.size), np.random.default_rng(0).random(tile_keys.size)
    painted = paint(64, tile_keys)
    rasters = LabelArrays("lc", painted, painted[:, 0] % 7 > 0, each, 0 * each, None)
    tiles = TileArrays(each, [s2, dem], {"lc": rasters, "yield": per_tile.copy()})
    augmenter = made(settings, S2, DEM)
    augmenter.apply(draw, tile_keys, tiles, NewMemory())
    labels = rasters.pixels
    np.testing.assert_array_equal(rasters.valid, labels[:, 0] % 7 > 0)
    np.testing.assert_array_equal(tiles.labels["yield"], per_tile)
    first = s2.band_sets[0]
    # Painted numbers of the 32 px band set, on the finer and the coarser pixels.
    reference = np.where(
        first.band_present[:, 0, None, None], first.pixels[:, 0].astype(int) - 1, -1
    )[::2]
    for other in (labels[:, 0, ::2, ::2], dem.band_sets[0].pixels[:, 0].astype(int) - 1):
        np.testing.assert_array_equal(np.where(reference >= 0, reference, other), other)
    half = s2.band_sets[1].pixels[::2, 0].astype(int) - 1
    corners = np.min([reference[:, y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=0)
    known = (corners >= 0) & s2.band_sets[1].band_present[::2, 0, None, None]
    np.testing.assert_array_equal(corners[known], half[known])
    side = 32 if settings.crop_px is None else 16
    assert labels.shape[-1] == 2 * side
    assert (s2.grid.shape_px, dem.grid.shape_px) == ((side, side), (side, side))
    assert half.shape[-1] == side // 2
    for frames in (s2, dem):
        for number, leaves in enumerate(split(frames)):
            segments.check(leaves, frames.grid, f"frame {number}")


@given(draw=draws_made, tile_keys=keys)
def test_scales_follow_the_pixels(draw, tile_keys):
    """Leaves painted onto the pixels before: afterwards they are the leaves of the pixels."""
    augmenter = made(EVERYTHING.model_copy(update={"drop_bands": 0.0}), S2)
    frames = read(S2, tile_keys)
    colours = _painted(frames)
    one_band = np.ones((colours.shape[0], 1), bool)
    painted = BandSetArrays("", ("colour",), colours[:, None].copy(), colours > 0, one_band)
    after = augmented(augmenter, draw, tile_keys, replace(frames, band_sets=[painted]))
    np.testing.assert_array_equal(after.band_sets[0].pixels[:, 0], _painted(after))


def _painted(frames: FrameArrays) -> np.ndarray:
    """[F, y, x]: every pixel in the colour of its leaf."""
    grid, p = frames.grid, frames.grid.base_patch_size
    cells = np.repeat(frames.scales, segments.run_lengths(frames.scales))
    on_grid = np.empty((frames.counts.size, grid.num_cells), np.uint8)
    on_grid[:, grid.storage_order] = cells.reshape(frames.counts.size, -1)
    return on_grid.reshape(-1, grid.rows, grid.cols).repeat(p, axis=1).repeat(p, axis=2)


@given(draw=draws_made, tile_keys=keys)
def test_turns_leave_the_number_of_tokens_as_it_was(draw, tile_keys):
    frames = read(S2, tile_keys)
    before = [np.sort(leaves) for leaves in split(frames)]
    augmenter = made(Augmentation(flips=True, rotations=True), S2)
    turned = augmented(augmenter, draw, tile_keys, frames)
    for one, other in zip(before, split(turned), strict=True):
        np.testing.assert_array_equal(one, np.sort(other))


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        (Augmentation(flips=True), symmetry.FLIPS),
        (Augmentation(rotations=True), symmetry.ROTATIONS),
        (Augmentation(flips=True, rotations=True), tuple(range(8))),
    ],
)
def test_every_turn_is_as_likely_as_any_other(settings, turns):
    tiles = np.arange(80_000)
    found = np.concatenate([made(settings, S2)._turns((1, epoch), tiles) for epoch in range(2)])
    counts = np.bincount(found, minlength=8)
    assert counts[[turn for turn in range(8) if turn not in turns]].sum() == 0
    expected = found.size / len(turns)
    chi_square = float(((counts[list(turns)] - expected) ** 2 / expected).sum())
    print(f"{settings.flips=} {settings.rotations=}: chi-square {chi_square:.1f}")
    # 99.9 % of fair draws lie below, with 3 and with 7 degrees of freedom.
    assert chi_square < (16.3 if len(turns) == 4 else 24.3)


def test_every_window_is_as_likely_as_any_other_and_no_turns_go_with_it():
    tiles = np.arange(90_000)
    augmenter = made(Augmentation(flips=True, rotations=True, crop_px=16), S2)
    corners = augmenter._corners(DRAW, tiles)
    both = np.bincount(corners @ [3, 1] * 8 + augmenter._turns(DRAW, tiles), minlength=72)
    assert both.size == 72
    expected = tiles.size / 72
    chi_square = float(((both - expected) ** 2 / expected).sum())
    print(f"windows x turns: chi-square {chi_square:.1f} with 71 degrees of freedom")
    assert chi_square < 112.3


@given(
    share=st.floats(0.01, 0.99),
    draw=draws_made,
    entries=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 6), st.booleans()), min_size=1, max_size=60
    ),
)
def test_timesteps_stay_or_go_as_a_whole_and_one_of_each_tile_stays(share, draw, entries):
    tile, timestep, counts = (np.array(column) for column in zip(*entries, strict=True))
    counts = counts.astype(bool)
    keep = made(Augmentation(drop_dates=share), S2)._dates_kept(draw, tile, timestep, counts)
    decisions = {}
    for pair, kept in zip(zip(tile, timestep, strict=True), keep, strict=True):
        assert decisions.setdefault(pair, kept) == kept
    assert set(tile[keep & counts]) == set(tile[counts])


def test_timesteps_are_left_out_as_often_as_asked():
    tile, timestep = np.repeat(np.arange(20_000), 5), np.tile(np.arange(5), 20_000)
    every = np.ones(tile.size, bool)
    augmenter = made(Augmentation(drop_dates=0.3), S2)
    keep = augmenter._dates_kept(DRAW, tile, timestep, every)
    # One timestep stays of the tiles that would lose all five.
    lost = 1 - keep.mean()
    assert lost == pytest.approx(0.3 - 0.3**5 / 5, abs=0.006)
    later = augmenter._dates_kept((7, 4), tile, timestep, every)
    assert 0.4 < (keep == later).mean() < 0.7


def test_dates_go_from_all_modalities_and_labels_but_not_from_static_ones():
    tile = np.repeat(np.arange(200), 3)
    every = ChosenFrames(np.arange(600), tile, np.tile(np.arange(3), 200))
    some = every.where(every.timestep > 0)
    chosen = {"s2": every, "labels": some, "dem": every.where(every.timestep == 0)}
    made(Augmentation(drop_dates=0.6), S2).leave_out_dates(DRAW, np.arange(200) * 7, chosen)
    kept = {(t, at) for t, at in zip(chosen["s2"].tile, chosen["s2"].timestep, strict=True)}
    assert {t for t, _ in kept} == set(range(200))
    assert 200 < len(kept) < 400
    labelled = set(zip(chosen["labels"].tile, chosen["labels"].timestep, strict=True))
    assert labelled == {(t, at) for t, at in kept if at > 0}
    assert chosen["dem"].slots.size == 200
    np.testing.assert_array_equal(chosen["s2"].slots, 3 * chosen["s2"].tile + chosen["s2"].timestep)


@given(share=st.floats(0.01, 0.99), draw=draws_made, tile_keys=keys)
def test_left_out_bands_are_zero_in_all_frames_of_a_tile_and_one_stays(share, draw, tile_keys):
    before = read(S2, tile_keys)
    augmenter = made(Augmentation(drop_bands=share), S2)
    after = augmented(augmenter, draw, tile_keys, read(S2, tile_keys))
    for old, new in zip(before.band_sets, after.band_sets, strict=True):
        assert new.band_present.any(axis=1).all()
        np.testing.assert_array_equal(new.band_present[::2], new.band_present[1::2])
        kept = new.band_present[:, :, None, None]
        np.testing.assert_array_equal(new.pixels, np.where(kept, old.pixels, 0))
        np.testing.assert_array_equal(new.valid, old.valid)
    np.testing.assert_array_equal(after.scales, before.scales)


def test_bands_are_left_out_as_often_as_asked_and_each_set_on_its_own():
    tiles = np.arange(30_000)
    augmenter = made(Augmentation(drop_bands=0.3), S2)
    first, second = (augmenter._bands(DRAW, tiles, 4, name) for name in ("s2/", "s2/20m"))
    for present in (first, second):
        assert 1 - present.mean() == pytest.approx(0.3 - 0.3**4 / 4, abs=0.006)
    assert (first == second).all(axis=1).mean() < 0.25


def test_other_epochs_and_seeds_give_other_results():
    turns = [made(EVERYTHING, S2)._turns(d, np.arange(1000)) for d in ((0, 0), (0, 1), (1, 0))]
    assert all(0.05 < (turns[0] == other).mean() < 0.2 for other in turns[1:])


def test_without_a_draw_nothing_is_random_and_crops_are_in_the_middle():
    tile_keys = np.arange(5)
    augmenter = made(EVERYTHING, S2)
    after = augmented(augmenter, None, tile_keys, read(S2, tile_keys))
    before = read(S2, tile_keys)
    for old, new, start in zip(before.band_sets, after.band_sets, (8, 4), strict=True):
        window = slice(start, 3 * start)
        np.testing.assert_array_equal(new.pixels, old.pixels[..., window, window])
        np.testing.assert_array_equal(new.valid, old.valid[..., window, window])
        assert new.band_present.all()
    every = ChosenFrames(np.arange(10), before.tile, before.timestep)
    chosen = {"s2": every}
    augmenter.leave_out_dates(None, tile_keys, chosen)
    assert chosen == {"s2": every}
    whole = made(Augmentation(flips=True, drop_bands=0.5), S2)
    assert_same(augmented(whole, None, tile_keys, read(S2, tile_keys)), before)


def test_a_batch_without_frames_stays_one():
    none = np.empty(0, np.int64)
    after = augmented(made(EVERYTHING, S2), DRAW, none, read(S2, none))
    assert after.scales.size == after.counts.size == 0
    assert [s.pixels.shape for s in after.band_sets] == [(0, 4, 16, 16), (0, 3, 8, 8)]
    chosen = {"s2": ChosenFrames(none, none, none)}
    made(EVERYTHING, S2).leave_out_dates(DRAW, none, chosen)
    assert chosen["s2"].slots.size == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"flips": False},
        {"drop_dates": 1.0},
        {"drop_dates": -0.1},
        {"drop_bands": float("nan")},
        {"crop_px": 0},
        {"mirror": True},
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Augmentation(**wrong)


def test_windows_lie_on_the_roots_of_every_modality():
    assert crop_of(None, [S2], []) is None
    assert crop_of(8, [S2], []) == Crop(parts=4, size=1)
    assert crop_of(16, [S2, DEM], []) == Crop(parts=2, size=1)


@pytest.mark.parametrize(
    ("crop_px", "images", "labels", "named"),
    [
        (12, [S2], [], "multiple of 8 px, the roots of s2, and below 32 px"),
        (32, [S2], [], "below 32 px"),
        (8, [S2, DEM], [], "multiple of 16 px, the roots of s2 and dem"),
        (
            8,
            [layout(sets=(("", 1, 32), ("60m", 1, 5)))],
            [],
            "s2, band set 60m, have 5 px, which 4 roots",
        ),
        (8, [S2], [layout("lc", sets=(("", 1, 33),), base=1, num_scales=1)], "lc have 33 px"),
    ],
)
def test_windows_that_cannot_be_are_refused_in_words(crop_px, images, labels, named):
    with pytest.raises(ConfigError, match=f"crop_px is {crop_px}.*{named}"):
        crop_of(crop_px, images, labels)


def test_leaving_out_bands_where_every_set_has_one_is_refused():
    with pytest.raises(
        ConfigError, match="drop_bands is 0.5, and every band set has one band only"
    ):
        check_effect(Augmentation(drop_bands=0.5), [DEM, DEM], most_dates=3)


def test_leaving_out_dates_where_no_tile_has_two_is_refused():
    check_effect(Augmentation(drop_dates=0.5), [S2], most_dates=2)
    with pytest.raises(ConfigError, match="drop_dates is 0.5, and no tile has more than one date"):
        check_effect(Augmentation(drop_dates=0.5), [S2], most_dates=1)
