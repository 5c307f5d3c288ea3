"""Embedding patches: each by itself, whatever lies beside it and under what is not valid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.embed import PatchEmbedding, PixelNormalization, normalised_cells, zero_but
from model.kernels import resize_kernel
from model.packing import TileArrays, pack

WIDTH = 32
JUNK = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 7.0])


def embedding(num_bands=3, kernel_px=4, seed=0):
    """One whose every weight has moved away from its initial value."""
    torch.manual_seed(seed)
    made = PatchEmbedding(num_bands, kernel_px, WIDTH)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def patches(num, num_bands=3, size=4, seed=0, valid_share=0.7):
    """Normalised pixels, their validity, and absent bands."""
    rng = torch.Generator().manual_seed(seed)
    pixels = 2 * torch.rand(num, num_bands, size, size, generator=rng) - 1
    valid = torch.rand(num, size, size, generator=rng) < valid_share
    absent = torch.rand(num, num_bands, generator=rng) < 0.3
    pixels = pixels * valid[:, None] * ~absent[:, :, None, None]
    return pixels, valid, absent


def slow_rows(embed, pixels, valid, absent):
    """Number by number, by the definition."""
    weight = resize_kernel(embed.weight, pixels.shape[-1])
    rows = []
    for patch, there, lacking in zip(pixels, valid, absent, strict=True):
        row = embed.bias.clone()
        for band, of_band in enumerate(patch):
            row += (weight[:, band] * of_band).sum((1, 2))
            row += embed.band_absent[band] * lacking[band]
        rows.append(row + (weight[:, -1] * there).sum((1, 2)))
    return torch.stack(rows)


@settings(max_examples=40)
@given(
    num_bands=st.integers(1, 5),
    kernel_px=st.integers(1, 8),
    size=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_a_row_is_the_kernels_answer_to_pixels_and_validity(num_bands, kernel_px, size, seed):
    embed = embedding(num_bands, kernel_px, seed)
    given_patches = patches(5, num_bands, size, seed)
    assert_close(embed(*given_patches), slow_rows(embed, *given_patches), rtol=0, atol=2e-5)


@given(seed=st.integers(0, 99), size=st.sampled_from([1, 2, 3, 4, 8]))
def test_what_its_neighbours_show_changes_no_bit_of_a_row(seed, size):
    embed, own = embedding(seed=seed), patches(40, size=size, seed=seed)
    others = patches(40, size=size, seed=seed + 1, valid_share=0.2)
    kept = torch.arange(40) % 3 == seed % 3
    mixed = [part.clone() for part in others]
    for part, of_own in zip(mixed, own, strict=True):
        part[kept] = of_own[kept]
    onto = torch.randn(40, WIDTH)
    before, after = embed(*own, onto.clone()), embed(*mixed, onto.clone())
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[~kept], after[~kept])


def test_rows_and_a_vector_are_added():
    embed, given_patches = embedding(), patches(20)
    onto, vector = torch.randn(20, WIDTH), torch.randn(WIDTH, requires_grad=True)
    expected = embed(*given_patches) + onto + vector
    added = embed(*given_patches, onto, vector)
    assert_close(added, expected, rtol=0, atol=1e-5)
    assert added.data_ptr() == onto.data_ptr()
    weights = torch.randn(20, WIDTH)
    asked = [vector, *embed.parameters()]
    assert_close(
        torch.autograd.grad((added * weights).sum(), asked),
        torch.autograd.grad((expected * weights).sum(), asked),
        rtol=1e-4,
        atol=1e-4,
    )


def test_learned_rows_that_are_added_have_a_gradient():
    embed, given_patches = embedding(), patches(20)
    learned = torch.randn(20, WIDTH, requires_grad=True)
    embed(*given_patches, 2 * learned).sum().backward()
    assert torch.equal(learned.grad, torch.full((20, WIDTH), 2.0))


def test_under_autocast_the_product_is_in_16_bits():
    embed, given_patches, onto = embedding(), patches(20), torch.randn(20, WIDTH)
    expected = embed(*given_patches, onto.clone())
    with torch.autocast("cpu", torch.bfloat16):
        rows = embed(*given_patches, onto)
    assert rows.dtype == torch.bfloat16
    assert_close(rows.float(), expected, rtol=0.02, atol=0.1)


def test_an_absent_band_adds_nothing_at_first_and_what_it_learns_once():
    embed = PatchEmbedding(3, 4, WIDTH)
    pixels, valid, _ = patches(6)
    none, second = torch.zeros(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    second[:, 1] = True
    assert torch.equal(embed(pixels, valid, second), embed(pixels, valid, none))
    assert torch.equal(embed(pixels, valid), embed(pixels, valid, none))
    with torch.no_grad():
        embed.band_absent[1] = 1.0
    assert_close(embed(pixels, valid, second), embed(pixels, valid, none) + 1)
    embed(pixels, valid, second).sum().backward()
    assert embed.band_absent.grad.count_nonzero(1).tolist() == [0, WIDTH, 0]


def test_gradients_are_those_of_finite_differences():
    embed = embedding(2, 3).double()
    pixels, valid, absent = patches(4, 2, 2)
    pixels = pixels.double().requires_grad_()
    weights = list(embed.parameters())

    def rows(pixels, *_):
        return embed(pixels, valid, absent, torch.zeros(4, WIDTH, dtype=torch.float64))

    assert torch.autograd.gradcheck(rows, (pixels, *weights))


@given(junk=JUNK)
def test_zero_but_forgets_any_number(junk):
    where = torch.tensor([True, False, True, False])
    numbers = torch.tensor([1.5, junk, -2.0, 4.0], requires_grad=True)
    kept = zero_but(numbers * 1, where)
    assert kept.tolist() == [1.5, 0, -2.0, 0]
    kept.sum().backward()
    assert numbers.grad.tolist() == [1, 0, 1, 0]


@settings(max_examples=30)
@given(data=st.data(), junk=JUNK)
def test_pixels_not_valid_or_of_absent_bands_are_zero_and_have_no_gradient(
    data, junk, tilesets, with_pixels
):
    batch = data.draw(tilesets).pack()
    (band_set,) = batch.modalities[0].band_sets
    present = torch.rand(band_set.band_present.shape) < 0.6
    hidden = ~(band_set.valid[:, None] & present[:, :, None, None])
    values = band_set.pixels.float().masked_fill(hidden, junk).requires_grad_()
    changed = with_pixels(batch, pixels=values, band_present=present)
    normalization = PixelNormalization(((0.0, 1000.0),) * 3)
    pixels, valid, absent = normalised_cells(changed, 0, 0, normalization)
    there = valid[:, None] & ~absent[:, :, None, None]
    assert not pixels[~there].any()
    clean = with_pixels(batch, pixels=values.detach().masked_fill(hidden, 0), band_present=present)
    expected, _, _ = normalised_cells(clean, 0, 0, normalization)
    assert torch.equal(pixels, expected)
    pixels.sum().backward()
    assert not values.grad[hidden].any()
    frame = torch.arange(len(values))[:, None, None, None]
    covered = torch.isin(frame, batch.frame)
    assert not values.grad[(~covered).expand_as(values)].any()
    assert values.grad.count_nonzero() == there.expand_as(pixels).sum()


@settings(max_examples=30)
@given(data=st.data())
def test_normalised_cells_are_scaled_by_hand(data, tilesets):
    tiles = data.draw(tilesets)
    batch, p = tiles.pack(), tiles.grid.base_patch_size
    ranges = ((0.0, 1000.0), (100.0, 300.0), (-50.0, 0.0))
    pixels, valid, absent = normalised_cells(batch, 0, 0, PixelNormalization(ranges))
    index, cells = batch.cell_index(0), tiles.grid.num_cells
    for row in range(len(index)):
        frame, (y, x) = index[row] // cells, tiles.grid.cell_yx[index[row] % cells]
        window = np.s_[y * p : y * p + p, x * p : x * p + p]
        there = tiles.frames.valid[frame][window]
        assert np.array_equal(valid[row], there)
        for band, (low, high) in enumerate(ranges):
            stored = tiles.frames.pixels[frame][band][window].astype(float)
            expected = np.where(there, (stored - low) / (high - low) * 2 - 1, 0)
            assert np.allclose(pixels[row, band], expected, atol=1e-6)
    assert not absent.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_the_dataset_normalised_is_left_as_it_is(make_tiles, with_pixels, dtype):
    batch = make_tiles().pack()
    normalization = PixelNormalization(((0.0, 1000.0),) * 3)
    (band_set,) = batch.modalities[0].band_sets
    scaled = normalization(band_set.pixels, band_set.valid[:, None]).to(dtype)
    batch = replace(with_pixels(batch, pixels=scaled), normalized=True)
    pixels, _, _ = normalised_cells(batch, 0, 0, normalization)
    expected, _ = batch.cells(0, 0)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected.float())
    again, _ = batch.cells(0, 0)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("normalized", [False, True])
def test_normalising_changes_neither_the_batch_nor_its_cells(make_tiles, with_pixels, normalized):
    batch = make_tiles().pack()
    stored = batch.modalities[0].band_sets[0].pixels.float()
    batch = replace(with_pixels(batch, pixels=stored.clone()), normalized=normalized)
    cells = batch.cells(0, 0)[0].clone()
    normalised_cells(batch, 0, 0, PixelNormalization(((0.0, 1000.0),) * 3))
    assert torch.equal(batch.cells(0, 0)[0], cells)
    assert torch.equal(batch.modalities[0].band_sets[0].pixels, stored)


def test_band_sets_may_have_patches_of_different_sizes(make_tiles):
    """The cells say how many px a patch has; one kernel size serves all."""
    frames = make_tiles(base_patch_size=6).arrays()
    (fine,) = frames.band_sets
    coarse = replace(
        fine,
        name="coarse",
        pixels=fine.pixels[:, :, ::3, ::3].copy(),
        valid=fine.valid[:, ::3, ::3].copy(),
    )
    frames.band_sets.append(coarse)
    batch = pack(TileArrays(np.arange(3), [frames]))
    normalization, embed = PixelNormalization(((0.0, 1000.0),) * 3), embedding()
    for band_set, size in enumerate((6, 2)):
        cells = normalised_cells(batch, 0, band_set, normalization)
        assert cells[0].shape == (len(batch.cell_index(0)), 3, size, size)
        assert_close(embed(*cells)[:9], slow_rows(embed, *(part[:9] for part in cells)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_ranges_keep_their_bits_whatever_the_weights_have(kind):
    pixels = torch.tensor([9001, 9500, 9999], dtype=torch.int32)[:, None, None, None]
    valid = torch.ones(3, 1, 1, 1, dtype=torch.bool)
    ranges = ((9000.0, 10_000.0),)
    expected = PixelNormalization(ranges)(pixels, valid)
    assert_close(PixelNormalization(ranges).to(kind)(pixels, valid).float(), expected)


def test_ranges_are_there_after_weights_were_made_without_memory():
    """As sharded training makes models: on no device, then empty on one."""
    with torch.device("meta"):
        made = PixelNormalization(((9000.0, 10_000.0),))
    assert made.low_C.is_meta
    made.to_empty(device="cpu")
    assert made.low_C.tolist() == [9000.0]
    assert made.half_span_C.tolist() == [500.0]
