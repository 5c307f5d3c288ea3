"""What tokens are told of band set, time, season, place and size, against numbers worked out by hand."""

import math
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import gelu, interpolate
from torch.testing import assert_close

from model.cells import cell_tables
from model.config import BandSetConfig, EncoderConfig, ModalityConfig
from model.encodings import (
    CompositeEncodings,
    LocationToken,
    SizePosition,
    apply_rotary,
    day_of_year,
    rotary_tables,
    season_encoding,
    sincos,
)
from model.packing import TileArrays, pack
from model.places import node_centres, node_of_token, per_modality, sample_grid, select_once
from pipeline.grid import BaseGrid

WIDTH = 64
UNKNOWN = (-1, -1, -1)
DATES = [(15, 6, 2020), (1, 0, 2021), (29, 1, 2024), UNKNOWN, (31, 11, 2023), (3, 9, 1999)]


def config(distances, **options):
    """Of modalities by name, with their pixel size in metres or None, each of two band sets."""
    bands = tuple(f"B{band}" for band in range(3))
    sets = tuple(
        BandSetConfig(name=name, bands=bands, value_range=((0.0, 1000.0),) * 3)
        for name in ("", "again")
    )
    return EncoderConfig(
        width=WIDTH,
        modalities=tuple(
            ModalityConfig(name=name, band_sets=sets, ground_sample_distance_m=metres)
            for name, metres in distances.items()
        ),
        **options,
    )


def packed(*tilesets, names=("image", "other"), second_set=True):
    """A batch whose modalities are the frames of some tilesets, dated, the first in two band sets."""
    modalities = []
    for tiles, name in zip(tilesets, names, strict=False):
        frames = tiles.arrays()
        frames.name = name
        frames.timestamps = np.array(
            [DATES[f % len(DATES)] for f in range(len(frames.tile))], np.int32
        )
        modalities.append(frames)
    if second_set:
        modalities[0].band_sets.append(replace(modalities[0].band_sets[0], name="again"))
    return pack(TileArrays(np.arange(tilesets[0].num_tiles), modalities))


def slow_sincos(position, width):
    angles = [position / 10_000 ** (2 * i / width) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def slow_encoding(band_set_vector, timestep, stamp, y, x):
    """Quarters of band set, timestep, month, and y and x in units of 10 m."""
    quarter = WIDTH // 4
    angle = 2 * math.pi * stamp[1] / 12
    month = [math.sin(angle)] * (quarter // 2) + [math.cos(angle)] * (quarter // 2)
    if stamp[1] < 0:
        month = [0.0] * quarter
    place = slow_sincos(y, quarter // 2) + slow_sincos(x, quarter // 2)
    return [*band_set_vector, *slow_sincos(timestep, quarter), *month, *place]


@settings(max_examples=30)
@given(data=st.data(), metres=st.sampled_from([None, 10.0, 20.0, 0.6]))
def test_every_base_row_is_encoded_by_its_cells_centre(data, metres, tilesets):
    tiles = data.draw(tilesets)
    batch = packed(tiles)
    encodings = CompositeEncodings(config({"image": metres}))
    found = encodings.base_rows(batch, 0) + encodings.band_set_vector("image", "again")
    units = tiles.grid.base_patch_size * (metres or 10) / 10
    vector = encodings.band_sets["image/again"].tolist()
    expected = []
    for index in batch.cell_index(0).tolist():
        frame, cell = divmod(index, tiles.grid.num_cells)
        y, x = ((tiles.grid.cell_yx[cell] + 0.5) * units).tolist()
        step = batch.modalities[0].timestep[frame].item()
        expected.append(slow_encoding(vector, step, DATES[frame % len(DATES)], y, x))
    assert_close(found, torch.tensor(expected).view(-1, WIDTH), rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(data=st.data())
def test_every_token_is_encoded_by_its_leafs_centre(data, tilesets):
    first, second = data.draw(tilesets), data.draw(tilesets)
    second = second.select([0] * first.num_tiles)
    distances = {"image": 10.0, "other": 30.0}
    batch = packed(first, second)
    encodings = CompositeEncodings(config(distances))
    expected = []
    rows = zip(
        batch.modality.tolist(), batch.band_set.tolist(), batch.frame.tolist(),
        batch.positions.tolist(), strict=True,
    )  # fmt: skip
    for m, b, frame, (y, x, scale, timestep) in rows:
        frames = batch.modalities[m]
        vector = encodings.band_set_vector(frames.name, frames.band_sets[b].name)
        units = frames.grid.base_patch_size * distances[frames.name] / 10
        place = [(at + 2**scale / 2) * units for at in (y, x)]
        stamp = DATES[frame % len(DATES)]
        expected.append(slow_encoding(vector[: WIDTH // 4].tolist(), timestep, stamp, *place))
    found = encodings.tokens(batch)
    assert_close(found, torch.tensor(expected).view(-1, WIDTH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"season": "day_of_year"}, {"position": "rotary"},
    {"position": "learned", "position_cells": (8, 4)},
    {"position": "learned", "position_cells": (3, 5)},
], ids=str)  # fmt: skip
def test_a_base_token_is_encoded_as_its_base_row(make_tiles, options):
    batch = packed(make_tiles(split_share=1.0))
    encodings = CompositeEncodings(config({"image": 10.0}, **options))
    for band_set, name in enumerate(("", "again")):
        at = batch.token_index(0, band_set)
        rows = encodings.base_rows(batch, 0) + encodings.band_set_vector("image", name)
        assert_close(encodings.tokens(batch)[at], rows, rtol=0, atol=1e-6)


def test_patches_on_the_same_ground_have_the_same_position(make_tiles):
    """Of 2 px of 10 m at scale 1, and of 4 px of 10 m or 2 px of 20 m at scale 0."""
    fine = make_tiles(
        tiles=[(1, 0.0)], num_roots=(2, 2), base_patch_size=2, num_scales=2, split_share=0.0
    )
    quarter = slice(3 * WIDTH // 4, None)
    places = []
    for tiles, metres in (
        (fine, 10.0),
        (make_tiles(tiles=[(1, 0.0)], num_roots=(2, 2), base_patch_size=4, num_scales=1), 10.0),
        (make_tiles(tiles=[(1, 0.0)], num_roots=(2, 2), base_patch_size=2, num_scales=1), 20.0),
    ):
        encodings = CompositeEncodings(config({"image": metres}))
        places.append(encodings.tokens(packed(tiles, second_set=False))[:, quarter])
    assert torch.equal(places[0], places[1])
    assert torch.equal(places[0], places[2])


@settings(max_examples=30)
@given(data=st.data())
def test_nodes_are_found_by_scale_and_place(data, tilesets):
    tiles, other = data.draw(tilesets), data.draw(tilesets)
    batch = packed(tiles, other.select([0] * tiles.num_tiles))
    centres = torch.cat([node_centres(m.grid, batch.device) for m in batch.modalities])
    y, x, scale, _ = batch.positions.unbind(1)
    expected = torch.stack([y + 2.0**scale / 2, x + 2.0**scale / 2], dim=1)
    assert torch.equal(centres[node_of_token(batch)].float(), expected)


@pytest.mark.parametrize("first", [0, 1])
def test_tables_of_equal_numbers_do_not_get_in_each_others_way(make_tiles, first):
    """Four columns of cells, each four units wide."""
    tiles = make_tiles(tiles=[(1, 0.0)], num_roots=(1, 1), base_patch_size=4, num_scales=3)
    batch, settings = packed(tiles, second_set=False), config({"image": 10.0})
    per_modality.cache_clear()
    asked = (lambda: node_of_token(batch), lambda: rotary_tables(batch, settings)[0])
    found = {number: asked[number]() for number in (first, 1 - first)}
    assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.float32)


def test_another_place_time_season_or_band_set_is_told(make_tiles):
    batch = packed(make_tiles(tiles=[(3, 0.0)], split_share=1.0))
    found = CompositeEncodings(config({"image": 10.0})).tokens(batch)
    assert len(found.unique(dim=0)) == batch.num_tokens


@given(at=st.dates(date(1, 1, 1), date(9999, 12, 31)))
def test_the_day_of_the_year_is_the_calendars(at):
    found = day_of_year(*(torch.tensor([n]) for n in (at.day, at.month - 1, at.year)))
    assert found.item() == at.timetuple().tm_yday - 1


@pytest.mark.parametrize(
    ("stamp", "day"),
    [((1, 0, 2023), 0), ((31, 11, 2023), 364), ((31, 11, 2024), 365), ((1, 2, 1900), 59),
     ((1, 2, 2000), 60), ((29, 1, 2024), 59)],
)  # fmt: skip
def test_days_of_known_dates(stamp, day):
    found = season_encoding(torch.tensor([stamp], dtype=torch.int32), 6, "day_of_year")
    angle = 2 * math.pi * day / 365.25
    expected = [[math.sin(angle)] * 3 + [math.cos(angle)] * 3]
    assert_close(found, torch.tensor(expected))


def test_months_go_round():
    stamps = torch.tensor([[1, month, 2020] for month in range(12)], dtype=torch.int32)
    found = season_encoding(stamps, 2, "month")
    assert_close(found[0], torch.tensor([0.0, 1.0]))
    assert_close(found[3], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)
    steps = (found - found.roll(1, 0)).norm(dim=1)
    assert_close(steps, steps[:1].expand(12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("season", ["month", "day_of_year"])
def test_unknown_dates_are_zeros(season):
    stamps = torch.tensor([UNKNOWN, (15, 6, 2020)], dtype=torch.int32)
    found = season_encoding(stamps, 8, season)
    assert not found[0].any()
    assert found[1].any()


def test_sines_and_cosines_by_hand():
    positions = [0.0, 1.0, 2.5, 400.0]
    expected = torch.tensor([slow_sincos(p, 16) for p in positions])
    assert_close(sincos(torch.tensor(positions), 16), expected, rtol=0, atol=1e-5)


def learned(rows, cols, seed=0):
    return torch.randn(WIDTH, rows, cols, generator=torch.Generator().manual_seed(seed))


@given(
    roots=st.tuples(st.integers(1, 3), st.integers(1, 3)), num_scales=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)  # fmt: skip
def test_a_learned_grid_is_sampled_bilinearly(roots, num_scales, size):
    side = 2 ** (num_scales - 1)
    base, table = BaseGrid(roots[0] * side, roots[1] * side, 2, num_scales), learned(*size)
    centres = node_centres(base, torch.device("cpu"))
    found = torch.cat([sample_grid(table, base, scale) for scale in range(num_scales)])
    ends = np.cumsum([base.num_cells >> 2 * s for s in range(num_scales)])
    for scale, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows, cols = base.level_shape(scale)
        image = interpolate(table[None], (rows, cols), mode="bilinear", align_corners=False)[0]
        y, x = (centres[begin:end] / 2**scale).long().unbind(1)
        assert_close(found[begin:end], image[:, y, x].T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_a_learned_grid_of_the_tiles_own_size_is_exact(num_scales):
    for rows, cols in ((4, 8), (12, 20), (56, 28)):
        base, table = BaseGrid(rows, cols, 2, num_scales), learned(rows, cols)
        y, x = torch.tensor(base.cell_yx).long().unbind(1)
        assert torch.equal(sample_grid(table, base, 0), table[:, y, x].T)
        at_level = BaseGrid(4 * rows, 4 * cols, 2, 3)
        centres = node_centres(at_level, torch.device("cpu"))[-rows * cols :]
        y, x = (centres / 4).long().unbind(1)
        assert torch.equal(sample_grid(table, at_level, 2), table[:, y, x].T)


@pytest.mark.parametrize("cells", [(4, 4), (3, 5)])
def test_gradients_of_a_learned_grid_are_those_of_finite_differences(make_tiles, cells):
    batch = packed(make_tiles(num_roots=(1, 1), tiles=[(2, 0.3)]), second_set=False)
    options = {"position": "learned", "position_cells": cells}
    encodings = CompositeEncodings(config({"image": 10.0}, **options)).double()
    weights = torch.randn(WIDTH, dtype=torch.float64)

    def rows(grid):
        both = functional_call(encodings, {"grid": grid}, (batch,))
        return torch.cat([of_rows @ weights for of_rows in both])

    encodings.forward = lambda batch: (encodings.base_rows(batch, 0), encodings.tokens(batch))
    grid = torch.randn(WIDTH, *cells, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows, grid)


@pytest.mark.parametrize("options", [
    {}, {"position": "rotary"}, {"position": "learned", "position_cells": (5, 4)},
], ids=str)  # fmt: skip
def test_an_encoder_first_used_in_inference_mode_can_be_trained(make_tiles, make_encoder, options):
    """Tables kept from one batch to the next are not those of inference mode."""
    for kept in (cell_tables, node_centres, per_modality):
        kept.cache_clear()
    encoder, tiles = make_encoder(size_position=True, location_token=True, **options), make_tiles()
    with torch.inference_mode():
        encoder(tiles.pack())
        encoder.token_encoding(tiles.pack())
    batch = tiles.pack()
    (encoder(batch).tokens + encoder.token_encoding(batch)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.encoding.parameters())


def test_rows_selected_once_have_the_gradient_of_a_look_up():
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 6, 1])
    assert torch.equal(select_once(rows, index), rows[index])
    assert torch.autograd.gradcheck(lambda r: select_once(r, index), rows)


def test_only_band_sets_are_learned_without_a_grid(make_tiles):
    batch = packed(make_tiles())
    encodings = CompositeEncodings(config({"image": 10.0, "absent": 10.0}))
    assert not encodings.base_rows(batch, 0).requires_grad
    encodings.tokens(batch).sum().backward()
    used = {name for name, p in encodings.named_parameters() if p.grad is not None}
    assert used == {"band_sets.image/first", "band_sets.image/again"}


@pytest.mark.parametrize("position", ["sincos", "rotary", "learned"])
def test_a_modality_without_frames_has_no_rows(make_tiles, position):
    batch = packed(make_tiles(), make_tiles().select([0, 1, 2]), second_set=False)
    (_, other), none = batch.modalities, slice(0, 0)
    empty = replace(
        other,
        band_sets=tuple(
            replace(
                s, pixels=s.pixels[none], valid=s.valid[none], band_present=s.band_present[none]
            )
            for s in other.band_sets
        ),
        tile=other.tile[none],
        timestep=other.timestep[none],
        timestamps=other.timestamps[none],
        tokens_per_scale=(0,) * len(other.tokens_per_scale),
    )
    alone = packed(make_tiles(), second_set=False)
    both = replace(alone, modalities=(*alone.modalities, empty))
    cells = (4, 4) if position == "learned" else None
    settings = config({"image": 10.0, "other": 10.0}, position=position, position_cells=cells)
    encodings = CompositeEncodings(settings)
    assert encodings.base_rows(both, 1).shape == (0, WIDTH)
    assert torch.equal(encodings.tokens(both), encodings.tokens(alone))


# Rotary


def rotary_scores(batch, settings, seed=0):
    """Products of one query with one key, turned by the places of every pair of tokens."""
    torch.manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 64).expand(2, batch.num_tokens, 2, 64).unbind(0)
    tables = rotary_tables(batch, settings)
    return torch.einsum("nhk,mhk->nm", apply_rotary(query, *tables), apply_rotary(key, *tables))


def test_turned_products_depend_on_differences_of_place_and_time_only(make_tiles):
    batch = packed(make_tiles(tiles=[(3, 0.0)]), second_set=False)
    settings = config({"image": 10.0}, position="rotary")
    moved = replace(
        batch, positions=batch.positions + torch.tensor([5, 17, 0, 2], dtype=torch.int32)
    )
    scores = rotary_scores(batch, settings)
    assert_close(rotary_scores(moved, settings), scores, rtol=0, atol=2e-4)
    assert len(scores.round(decimals=3).unique()) > batch.num_tokens


def test_patches_on_the_same_ground_turn_alike(make_tiles):
    fine = make_tiles(
        tiles=[(1, 0.0)], num_roots=(2, 2), base_patch_size=2, num_scales=2, split_share=0.0
    )
    coarse = make_tiles(tiles=[(1, 0.0)], num_roots=(2, 2), base_patch_size=2, num_scales=1)
    tables = [
        rotary_tables(packed(tiles, second_set=False), config({"image": metres}))
        for tiles, metres in ((fine, 10.0), (coarse, 20.0))
    ]
    assert_close(tables[0], tables[1], rtol=0, atol=1e-6)


def test_angles_by_hand(make_tiles):
    batch = packed(make_tiles(), second_set=False)
    cos, sin = rotary_tables(batch, config({"image": 20.0}))
    assert cos.shape == sin.shape == (batch.num_tokens, 32)
    for row, (y, x, scale, timestep) in enumerate(batch.positions.tolist()):
        place = [(at + 2**scale / 2) * 2 * 20.0 / 10 for at in (y, x)]
        angles = [place[0] / 1000 ** (i / 12) for i in range(12)]
        angles += [place[1] / 1000 ** (i / 12) for i in range(12)]
        angles += [timestep / 100 ** (i / 8) for i in range(8)]
        assert_close(cos[row], torch.tensor(angles).cos(), rtol=0, atol=1e-5)
        assert_close(sin[row], torch.tensor(angles).sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_without_a_place_is_not_turned(dtype):
    heads = torch.randn(5, 2, 64).to(dtype)
    turned = apply_rotary(heads, torch.ones(5, 32), torch.zeros(5, 32))
    assert turned.dtype == dtype
    assert torch.equal(turned, heads)


def test_turning_keeps_lengths():
    heads, angles = torch.randn(9, 3, 64), torch.randn(9, 32)
    turned = apply_rotary(heads, angles.cos(), angles.sin())
    assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    assert not torch.allclose(turned, heads)


# Size and position, place on Earth


def test_size_and_position_add_nothing_at_first(make_tiles):
    batch = packed(make_tiles())
    assert not SizePosition(WIDTH)(batch).any()


def test_size_and_position_are_those_of_the_tile(make_tiles):
    batch = packed(make_tiles(), make_tiles(num_roots=(1, 3), base_patch_size=1).select([0, 1, 2]))
    module = SizePosition(WIDTH)
    torch.nn.init.normal_(module.out.weight)
    features = []
    for m, (y, x, scale, _) in zip(batch.modality.tolist(), batch.positions.tolist(), strict=True):
        grid, side = batch.modalities[m].grid, 2**scale
        features.append([(y + side / 2) / grid.rows, (x + side / 2) / grid.cols, side / grid.rows])
    expected = module.out(gelu(module.hidden(torch.tensor(features))))
    assert_close(module(batch), expected, rtol=0, atol=1e-5)
    module(batch).sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def location_token(seed=0):
    torch.manual_seed(seed)
    return LocationToken(WIDTH)


def test_unknown_places_have_a_token_of_their_own_and_no_nan_anywhere():
    module = location_token()
    places = torch.tensor(
        [[47.0, 8.0], [math.nan, math.nan], [math.nan, 8.0], [47.0, math.inf]], requires_grad=True
    )
    tokens = module(places)
    assert not torch.equal(tokens[0], module.unknown)
    for row in (1, 2, 3):
        assert torch.equal(tokens[row], module.unknown)
    tokens.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert torch.equal(module.unknown.grad, torch.full((WIDTH,), 3.0))
    assert torch.equal(module.projection.bias.grad, torch.ones(WIDTH))
    assert places.grad.isfinite().all()


def test_there_is_no_edge_at_the_date_line_nor_at_the_poles():
    module = location_token()
    pairs = torch.tensor([
        [[10.0, 180.0], [10.0, -180.0]], [[90.0, 0.0], [90.0, 77.0]], [[-90.0, -5.0], [-90.0, 60.0]],
    ])  # fmt: skip
    for one, other in pairs:
        assert_close(module(one[None]), module(other[None]), rtol=0, atol=1e-4)


def test_places_a_hundred_km_apart_differ():
    module = location_token()
    here, there = module(torch.tensor([[47.0, 8.0], [47.9, 8.0]]))
    assert (here - there).abs().max() > 0.1


def test_the_location_token_by_hand():
    module = location_token()
    lat, lon = math.radians(47.0), math.radians(8.0)
    point = [math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)]
    angles = [value * 2**i for value in point for i in range(10)]
    features = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    expected = module.projection(torch.tensor(features))
    assert_close(module(torch.tensor([[47.0, 8.0]]))[0], expected, rtol=0, atol=1e-4)
