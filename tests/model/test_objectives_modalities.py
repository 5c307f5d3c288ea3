"""Masked prediction over several modalities, band sets and dates, some absent."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.batch import DECODER, MISSING, ONLINE, TARGET_ONLY
from model.config import group_name
from model.kernels import resize_kernel
from model.objectives import MaskedPrediction, hidden_tokens, patch_discrimination, random_masking

OPTIONS = [
    {},
    {"position": "rotary", "class_token": True, "register_tokens": 2},
    {"position": "learned", "position_cells": (4, 4), "size_position": True, "qk_norm": True},
    {"sequences": "date", "merge": "per_level", "merge_levels": 2, "mlp": "swiglu"},
    {"windows": 2, "global_every": 2, "merge_init": "zero", "layer_scale": 0.5},
]


def objective_of(make_scene_encoder, **options):
    torch.manual_seed(5)
    return MaskedPrediction(make_scene_encoder(**options)).eval()


def groups_of(batch):
    return [(m, b) for m, f in enumerate(batch.modalities) for b in range(len(f.band_sets))]


def predictions(objective, batch):
    return objective.predict(batch, hidden_tokens(batch))


def changed_where(batch, tokens, with_group, value):
    """The batch with `value` in all pixels below `tokens`, bool [N], but only of their own band set."""
    for m, b in groups_of(batch):
        frames = batch.modalities[m]
        pixels = frames.band_sets[b].pixels.clone()
        rows, cols = pixels.shape[2] // frames.grid.rows, pixels.shape[3] // frames.grid.cols
        at = batch.token_index(m, b)
        for token in at[tokens[at]].tolist():
            y, x, scale, _ = batch.positions[token].tolist()
            side, frame = 2**scale, int(batch.frame[token])
            window = (slice(y * rows, (y + side) * rows), slice(x * cols, (x + side) * cols))
            pixels[frame][:, *window] = value
        batch = with_group(batch, m, b, pixels=pixels)
    return batch


@pytest.mark.parametrize("options", OPTIONS)
def test_no_prediction_depends_on_hidden_pixels(
    make_scene, make_scene_encoder, with_group, options
):
    objective = objective_of(make_scene_encoder, **options)
    batch = random_masking(make_scene().pack(), 0.5, (1,))
    before = predictions(objective, batch)
    dirty = changed_where(batch, batch.mask == DECODER, with_group, torch.nan)
    assert torch.equal(predictions(objective, dirty), before)
    seen = changed_where(batch, batch.mask == ONLINE, with_group, 7.0)
    assert not torch.equal(predictions(objective, seen), before)


@settings(max_examples=25)
@given(data=st.data())
def test_the_loss_and_its_gradient_are_finite_whatever_is_absent(data, scenes, make_scene_encoder):
    objective = objective_of(make_scene_encoder, **data.draw(st.sampled_from(OPTIONS))).train()
    batch = random_masking(data.draw(scenes).pack(), 0.5, (0,))
    loss = objective(batch)
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_marks_of_others_take_no_part_in_predictions(make_scene, make_scene_encoder, with_group):
    """Neither their pixels nor their presence as places."""
    objective = objective_of(make_scene_encoder)
    batch = make_scene().pack()
    mask = torch.randint(0, 4, (batch.num_tokens,), generator=torch.Generator().manual_seed(2))
    marked = batch.with_mask(mask.to(torch.uint8))
    before = predictions(objective, marked)
    for other in (TARGET_ONLY, MISSING):
        dirty = changed_where(marked, marked.mask == other, with_group, torch.nan)
        assert torch.equal(predictions(objective, dirty), before)
    swapped = torch.where(marked.mask == MISSING, TARGET_ONLY, marked.mask)
    assert torch.equal(predictions(objective, batch.with_mask(swapped)), before)


def test_targets_are_the_projected_mean_patch_centred_per_tile_and_band_set(
    make_scene, make_scene_encoder
):
    objective = objective_of(make_scene_encoder)
    batch = make_scene().pack()
    targets, tile = objective.targets(batch), batch.tile_of_token
    for m, b in groups_of(batch):
        frames, at = batch.modalities[m], batch.token_index(m, b)
        name = group_name(frames.name, frames.band_sets[b].name)
        pixels, _ = objective.encoder.pixels(batch, m, b)
        kernel = resize_kernel(objective.targets_of[name].kernel, pixels.shape[-1])
        rows = pixels.flatten(1) @ kernel.flatten(1).T
        in_order = batch.tokens_by_scale(m, b)
        lengths = (4 ** batch.scales[in_order].long()).tolist()
        means = torch.zeros(batch.num_tokens, rows.shape[1])
        means[in_order] = torch.stack([run.mean(0) for run in rows.split(lengths)])
        for number in range(batch.num_tiles):
            own = at[tile[at] == number]
            if len(own):
                assert_close(targets[own], means[own] - means[own].mean(0), rtol=0, atol=1e-4)


def test_alternatives_are_of_the_same_tile_and_band_set(make_scene, make_scene_encoder):
    objective = objective_of(make_scene_encoder)
    batch = random_masking(make_scene().pack(), 0.5, (3,))
    hidden = hidden_tokens(batch)
    predicted, targets = objective.predict(batch, hidden), objective.targets(batch)[hidden]
    keys = zip(
        *(of[hidden].tolist() for of in (batch.tile_of_token, batch.modality, batch.band_set)),
        strict=True,
    )
    members = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    total = sum(
        len(own) * patch_discrimination(predicted[own], targets[own], [len(own)])
        for own in members.values()
    )
    assert len(members) > 4
    assert_close(objective(batch), total / len(hidden))


def test_a_batch_is_the_sum_of_its_tiles(make_scene, make_scene_encoder):
    objective, scene = objective_of(make_scene_encoder), make_scene()
    whole = random_masking(scene.pack(), 0.5, (4,))
    sums, ends = torch.zeros(()), whole.cu_seqlens.tolist()
    for tile in range(scene.num_tiles):
        alone = scene.select([tile]).pack()
        alone = alone.with_mask(whole.mask[ends[tile] : ends[tile + 1]])
        sums = sums + objective(alone) * len(hidden_tokens(alone))
    assert_close(objective(whole), sums / len(hidden_tokens(whole)), rtol=1e-4, atol=1e-5)


def test_a_patch_size_the_kernel_does_not_have_is_resized_to(make_scene, make_scene_encoder):
    batch = random_masking(make_scene().pack(), 0.5, (0,))
    losses = [objective_of(make_scene_encoder, kernel_px=px)(batch) for px in (1, 3, 8)]
    assert all(loss.isfinite() for loss in losses)


def test_all_is_wanted_of_nobody_without_masks(make_scene, make_scene_encoder):
    batch = make_scene().pack()
    assert objective_of(make_scene_encoder)(replace(batch)).item() == 0
