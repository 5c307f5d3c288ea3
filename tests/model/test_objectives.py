"""Masking, targets and the loss of masked prediction."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.batch import DECODER, ONLINE, cumulative_lengths
from model.objectives import (
    TARGET_WIDTH,
    MaskedPrediction,
    hidden_tokens,
    patch_discrimination,
    random_masking,
)
from model.upsample import scatter_to_grid


@pytest.fixture
def batch(make_tiles):
    return make_tiles().pack()


@pytest.fixture
def objective(make_encoder):
    torch.manual_seed(2)
    return MaskedPrediction(make_encoder())


def with_lengths(batch, lengths):
    """A batch of which masking sees the tiles' token counts only."""
    zeros = torch.zeros(sum(lengths), dtype=torch.uint8)
    return replace(
        batch,
        cu_seqlens=cumulative_lengths(torch.tensor(lengths)),
        tile_indices=torch.arange(len(lengths)),
        scales=zeros,
        mask=zeros,
    )


def hidden_pixels(batch):
    """bool [F, y, x]: pixels below hidden tokens."""
    hidden = torch.zeros(batch.num_tokens, 1)
    hidden[hidden_tokens(batch)] = 1
    on_grid, _ = scatter_to_grid(hidden, batch)
    p = batch.modalities[0].grid.base_patch_size
    return on_grid[..., 0].bool().repeat_interleave(p, 1).repeat_interleave(p, 2)


def predictions(objective, batch):
    return objective.predict(batch, hidden_tokens(batch))


def targets_alike(n, seed=0):
    return torch.randn(n, TARGET_WIDTH, generator=torch.Generator().manual_seed(seed))


def hidden_per_tile(batch):
    return torch.bincount(batch.tile_of_token[hidden_tokens(batch)], minlength=batch.num_tiles)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_masking_hides_its_share_of_every_tile_but_never_all_and_never_none(
    batch, lengths, share, seed
):
    masked = random_masking(with_lengths(batch, lengths), share, (seed, 0))
    assert masked.masked
    for length, hidden in zip(lengths, hidden_per_tile(masked).tolist(), strict=True):
        if length < 2:
            assert hidden == 0
        else:
            assert hidden == min(max(round(length * share), 1), length - 1)
    assert set(masked.mask.unique().tolist()) <= {ONLINE, DECODER}


@given(seed=st.integers(0, 2**32), share=st.floats(0.01, 0.99))
def test_only_visible_tokens_are_hidden_and_other_marks_stay(batch, seed, share):
    before = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(seed))
    marked = with_lengths(batch, [20, 30]).with_mask(before.to(torch.uint8))
    masked = random_masking(marked, share, (seed,))
    changed = masked.mask != marked.mask
    assert (marked.mask[changed] == ONLINE).all()
    assert (masked.mask[changed] == DECODER).all()
    visible = torch.bincount(marked.tile_of_token[marked.mask == ONLINE], minlength=2)
    left = torch.bincount(masked.tile_of_token[masked.mask == ONLINE], minlength=2)
    assert (visible - left).tolist() == [
        min(max(round(n * share), min(1, n - 1)), max(n - 1, 0)) for n in visible.tolist()
    ]


@given(seed=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
def test_masking_is_a_function_of_the_seed_alone(batch, seed):
    many = with_lengths(batch, [30, 40])
    first, again = random_masking(many, 0.5, seed), random_masking(many, 0.5, seed)
    assert torch.equal(first.mask, again.mask)
    other = random_masking(many, 0.5, (seed[0], seed[1] + 1))
    assert not torch.equal(first.mask, other.mask)


def test_every_token_is_hidden_about_as_often_as_any_other(batch):
    tile = with_lengths(batch, [5, 20])
    times = torch.zeros(25)
    for step in range(400):
        times[hidden_tokens(random_masking(tile, 0.4, (0, step)))] += 1
    assert_close(times / 400, torch.full((25,), 0.4), rtol=0, atol=0.15)


def test_perfect_predictions_cost_next_to_nothing():
    targets = targets_alike(30)
    assert patch_discrimination(targets, targets, [10, 20]) < 0.05


def test_predictions_that_say_nothing_cost_the_log_of_the_choices():
    nothing = torch.zeros(30, TARGET_WIDTH)
    chance = (10 * math.log(10) + 20 * math.log(20)) / 30
    assert_close(patch_discrimination(nothing, targets_alike(30), [10, 20]).item(), chance)


def test_wrong_predictions_cost_more_than_chance():
    targets = targets_alike(20)
    assert patch_discrimination(targets.roll(1, 0), targets, [20]) > math.log(20) + 1


def test_the_loss_is_the_mean_over_hidden_tokens_not_tiles():
    predicted, targets = targets_alike(12, 1), targets_alike(12, 2)
    alone = [
        patch_discrimination(p, t, [len(p)])
        for p, t in zip(predicted.split([2, 10]), targets.split([2, 10]), strict=True)
    ]
    together = patch_discrimination(predicted, targets, [2, 0, 10])
    assert_close(together, (2 * alone[0] + 10 * alone[1]) / 12)


def test_only_tokens_of_the_same_tile_are_alternatives():
    predicted, targets = targets_alike(8, 1), targets_alike(8, 2)
    before = patch_discrimination(predicted, targets, [4, 4])
    # Were the other tile's targets alternatives, these copies would draw the predictions away.
    twice = torch.cat([predicted, predicted]), torch.cat([targets, targets])
    assert_close(patch_discrimination(*twice, [4, 4, 4, 4]), before)


def test_nothing_hidden_costs_nothing():
    nothing = torch.zeros(0, TARGET_WIDTH, requires_grad=True)
    loss = patch_discrimination(nothing, nothing.detach(), [0, 0])
    loss.backward()
    assert loss.item() == 0


@settings(max_examples=40)
@given(data=st.data())
def test_predictions_cannot_depend_on_the_pixels_to_predict(
    data, tilesets, make_encoder, with_pixels
):
    tiles = data.draw(tilesets)
    batch = random_masking(tiles.pack(), 0.5, (0, 0))
    torch.manual_seed(3)
    objective = MaskedPrediction(make_encoder())
    hidden = hidden_pixels(batch)
    pixels = torch.from_numpy(np.where(hidden[:, None], np.uint16(7), tiles.frames.pixels))
    valid = torch.from_numpy(tiles.frames.valid) ^ hidden
    changed = with_pixels(batch, pixels=pixels, valid=valid)
    before, after = predictions(objective, batch), predictions(objective, changed)
    assert before.shape == (len(hidden_tokens(batch)), TARGET_WIDTH)
    assert torch.equal(before, after)


def test_predictions_depend_on_visible_pixels_and_on_no_hidden_ones(batch, objective, with_pixels):
    batch = random_masking(batch, 0.5, (0, 0))
    (band_set,) = batch.modalities[0].band_sets
    pixels = band_set.pixels.float().requires_grad_()
    changed = with_pixels(batch, pixels=pixels)
    predictions(objective, changed).square().sum().backward()
    visible = band_set.valid & ~hidden_pixels(batch)
    assert torch.equal(pixels.grad.any(1), visible)


def test_targets_are_the_projected_mean_patch_centred_per_tile(make_tiles, objective):
    tiles = make_tiles()
    batch, p = tiles.pack(), tiles.grid.base_patch_size
    normalization = objective.encoder.normalization["image/first"]
    low, half_span = (
        of_band[:, None, None] for of_band in (normalization.low_C, normalization.half_span_C)
    )
    projected = []
    for frame, leaf in tiles.present():
        window = leaf.window(p)
        pixels = torch.from_numpy(tiles.frames.pixels[frame][:, *window].astype(np.float32))
        valid = torch.from_numpy(tiles.frames.valid[frame][window])
        scaled = torch.where(valid, (pixels - low) / half_span - 1, 0)
        patches = scaled.unfold(1, p, p).unfold(2, p, p).mean((1, 2))
        # The kernel's size is the patch's: it is used as it is.
        projected.append((objective.targets_of["image/first"].kernel * patches).sum((1, 2, 3)))
    parts = torch.stack(projected).split(batch.cu_seqlens.diff().tolist())
    expected = torch.cat([part - part.mean(0) for part in parts])
    assert_close(objective.targets(batch), expected, rtol=0, atol=1e-5)


def test_invalid_pixels_change_no_target(make_tiles, objective):
    tiles = make_tiles()
    pixels = tiles.frames.pixels.astype(np.float32)
    dirty = np.where(tiles.frames.valid[:, None], pixels, np.float32(np.nan))
    targets = objective.targets(tiles.with_pixels(pixels).pack())
    assert torch.equal(objective.targets(tiles.with_pixels(dirty).pack()), targets)


def test_the_gradient_reaches_all_but_the_target_projection(batch, objective):
    objective(random_masking(batch, 0.5, (0, 0))).backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None]
    assert without == ["targets_of.image/first.kernel"]
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_the_loss_of_a_fresh_model_is_about_chance(make_encoder, make_tiles):
    torch.manual_seed(4)
    batch = make_tiles(tiles=[(3, 0.0)], split_share=1.0).pack()
    masked = random_masking(batch, 0.5, (0, 0))
    loss = MaskedPrediction(make_encoder())(masked).item()
    assert loss == pytest.approx(math.log(len(hidden_tokens(masked))), abs=1)


def test_targets_give_no_loss_where_they_are_predicted(batch, objective):
    masked = random_masking(batch, 0.5, (0, 0))
    targets = objective.targets(masked)[hidden_tokens(masked)]
    per_tile = hidden_per_tile(masked).tolist()
    perfect = patch_discrimination(targets, targets, per_tile)
    shuffled = patch_discrimination(targets.roll(1, 0), targets, per_tile)
    assert perfect < 0.5
    assert shuffled > perfect + 1


@pytest.mark.parametrize("missing", [[1.0, 0.2], [0.2, 1.0, 0.2], [1.0, 1.0]])
def test_tiles_without_tokens_go_through_masking_loss_and_backward(make_tiles, objective, missing):
    batch = make_tiles(tiles=[(1, share) for share in missing]).pack()
    loss = objective(random_masking(batch, 0.5, (0, 0)))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_an_empty_tile_changes_nothing_for_the_others(make_tiles, objective):
    tiles = make_tiles(tiles=[(2, 0.2), (1, 1.0)])
    masked = random_masking(tiles.select([0]).pack(), 0.5, (0, 0))
    with_empty = tiles.pack().with_mask(masked.mask)
    assert with_empty.num_tiles == masked.num_tiles + 1
    assert torch.equal(objective(with_empty), objective(masked))
