"""Laws of the encoder over modalities, band sets and dates, for several ways to build it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from model import blocks
from model.batch import MISSING, ONLINE, TARGET_ONLY
from model.encoder import APTEncoder
from model.masks import with_token_masks

# Every option of the encoder is in one of them.
OPTIONS = {
    "as-it-is": {},
    "rotary": {"position": "rotary", "season": "day_of_year", "class_token": True},
    "learned": {"position": "learned", "position_cells": (8, 8), "size_position": True},
    "dates": {"sequences": "date", "class_token": True, "register_tokens": 2},
    "windows": {
        "windows": 2, "global_every": 2, "class_token": True, "register_tokens": 1,
        "location_token": True, "depth": 3,
    },
    "windows-of-dates": {"windows": 2, "sequences": "date", "position": "rotary"},
    "swiglu": {
        "mlp": "swiglu", "mlp_ratio": 3, "qk_norm": True, "layer_scale": 0.1, "drop_path": 0.3,
        "depth": 2,
    },
    "per-level": {"merge": "per_level", "merge_levels": 2, "merge_init": "kaiming"},
    "zero": {"merge_init": "zero", "location_token": True, "checkpointing": True},
    "zero-per-level": {"merge_init": "zero", "merge": "per_level", "merge_levels": 3},
}  # fmt: skip
every_way = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(scope="session")
def encoder_of(make_scene_encoder):
    made = {}

    def of(options):
        key = str(options)
        if key not in made:
            made[key] = make_scene_encoder(**options).eval()
        return made[key]

    return of


def masked(scene, seed):
    """A batch of the scene's tiles; which tokens are hidden depends on the tile, not on the batch."""
    batch = scene.pack()
    if seed is None:
        return batch
    counts = batch.cu_seqlens.diff().tolist()
    # Of two tiles with equally many tokens the same ones are hidden.
    parts = [np.random.default_rng((seed, n)).integers(0, 4, n, np.uint8) for n in counts]
    return with_token_masks(batch, torch.from_numpy(np.concatenate(parts)))


def outputs(encoded):
    return {
        name: value
        for name in ("tokens", "class_tokens", "registers", "sequence_timestep")
        if (value := getattr(encoded, name)) is not None
    }


def joined(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def loss_of(encoded, num_tiles):
    """A sum over tokens, so that it is the same however tiles are batched."""
    prefix = [x.flatten(0, -2) for x in (encoded.class_tokens, encoded.registers) if x is not None]
    rows = torch.cat([encoded.tokens, *prefix])
    return (rows.square() @ torch.linspace(-1, 1, rows.shape[1])).sum() / (100 * num_tiles)


def gradients_of(encoder, loss):
    named = dict(encoder.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


@every_way
@settings(max_examples=15)
@given(data=st.data(), seed=st.none() | st.integers(0, 1000))
def test_a_tile_comes_out_the_same_alone_and_in_any_batch(options, data, seed, scenes, encoder_of):
    scene, encoder = data.draw(scenes), encoder_of(options)
    order = data.draw(st.lists(st.sampled_from(range(scene.num_tiles)), min_size=1, max_size=4))
    alone = [outputs(encoder(masked(scene.select([tile]), seed))) for tile in order]
    together = encoder(masked(scene.select(order), seed))
    assert_close(outputs(together), joined(alone), rtol=0, atol=1e-5)
    sequences = [len(part["sequence_timestep"]) for part in alone]
    owners = torch.arange(len(order)).repeat_interleave(torch.tensor(sequences))
    assert torch.equal(together.sequence_tile, owners)


@every_way
@settings(max_examples=8)
@given(data=st.data(), seed=st.none() | st.integers(0, 1000))
def test_gradients_are_the_same_tile_by_tile_and_packed(options, data, seed, scenes, encoder_of):
    scene, encoder = data.draw(scenes), encoder_of(options)
    tiles = range(scene.num_tiles)
    packed = gradients_of(encoder, loss_of(encoder(masked(scene, seed)), len(tiles)))
    parts = [encoder(masked(scene.select([tile]), seed)) for tile in tiles]
    alone = gradients_of(encoder, sum(loss_of(part, len(tiles)) for part in parts))
    assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def groups_of(batch):
    return [(m, b) for m, of in enumerate(batch.modalities) for b in range(len(of.band_sets))]


def with_pixels_of(batch, pixels, with_group):
    for (m, b), values in zip(groups_of(batch), pixels, strict=True):
        batch = with_group(batch, m, b, pixels=values)
    return batch


@every_way
def test_gradients_are_those_of_finite_differences(
    options, make_scene, make_scene_encoder, with_group
):
    scene = make_scene(tiles=[(2, 1, 1, 0.2)], split_share=0.3)
    encoder = make_scene_encoder(**{**options, "depth": options.get("depth", 1)}).eval().double()
    names, weights = zip(*encoder.named_parameters(), strict=True)
    batch = scene.pack()
    pixels = [batch.modalities[m].band_sets[b].pixels / 1000 for m, b in groups_of(batch)]
    encoder.normalization.update(_of_unit_range(encoder))

    def tokens(*inputs):
        given = inputs[len(names) :]
        changed = with_pixels_of(scene.pack(), given, with_group)
        state = dict(zip(names, inputs[: len(names)], strict=True))
        return torch.func.functional_call(encoder, state, (changed,)).tokens

    inputs = [p.detach().double().requires_grad_() for p in (*weights, *pixels)]
    assert torch.autograd.gradcheck(tokens, inputs, fast_mode=True, atol=1e-4)


def _of_unit_range(encoder):
    """Normalisations of pixels in 0 ... 1, so that a finite difference is not lost in their range."""
    return {
        name: type(of)(((0.0, 1.0),) * len(of.low_C)).double()
        for name, of in encoder.normalization.items()
    }


def without(scene, name, frames):
    return scene.with_layer(name, lambda layer: layer.without(frames))


def pixel_gradients(encoder, scene, with_group, dirty=None):
    """Tokens, and by group the gradient of all pixels; `dirty` may change pixels (m, b, values)."""
    batch = scene.pack()
    pixels = []
    for m, b in groups_of(batch):
        values = batch.modalities[m].band_sets[b].pixels.clone()
        if dirty is not None:
            dirty(m, values)
        pixels.append(values.requires_grad_())
    tokens = encoder(with_pixels_of(batch, pixels, with_group)).tokens
    (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    return tokens.detach(), dict(zip(groups_of(batch), [p.grad for p in pixels], strict=True))


@every_way
@pytest.mark.parametrize("name", ["s2", "s1", "dem"])
@pytest.mark.parametrize("junk", [7.0, np.nan, np.inf])
def test_a_missing_frame_has_no_gradient_and_no_influence(
    options, name, junk, make_scene, encoder_of, with_group
):
    scene, encoder = make_scene(), encoder_of(options)
    number = [layer.name for layer in scene.layers].index(name)
    frames = {0, 2} & set(range(len(scene.layers[number].tiles.leaves)))
    scene = without(scene, name, frames)

    def dirty(m, values):
        if m == number:
            values[list(frames)] = junk

    clean_tokens, _ = pixel_gradients(encoder, scene, with_group)
    tokens, found = pixel_gradients(encoder, scene, with_group, dirty)
    assert torch.equal(tokens, clean_tokens)
    for (m, _), of_pixels in found.items():
        of_frames = of_pixels.abs().flatten(1).sum(1)
        assert of_frames.isfinite().all()
        if m == number:
            assert not of_frames[list(frames)].any()
            of_frames = of_frames[[f for f in range(len(of_frames)) if f not in frames]]
        assert (of_frames > 0).all()


@every_way
@pytest.mark.parametrize("name", ["s2", "s1", "dem"])
def test_a_modality_that_is_missing_everywhere_is_as_if_not_there(
    options, name, make_scene, encoder_of
):
    scene, encoder = make_scene(), encoder_of(options)
    others = [layer.name for layer in scene.layers if layer.name != name]
    missing = without(scene, name, set(range(20)))
    assert_close(
        encoder(missing.pack()).tokens,
        encoder(scene.only(*others).pack()).tokens,
        rtol=0,
        atol=1e-6,
    )


@every_way
@pytest.mark.parametrize("group", [(0, 0), (0, 1), (1, 0), (2, 0)])
def test_a_missing_band_has_no_gradient_and_no_influence(
    options, group, make_scene, encoder_of, with_group
):
    encoder, batch = encoder_of(options), make_scene().pack()
    of_group = batch.modalities[group[0]].band_sets[group[1]]
    present = of_group.band_present.clone()
    present[1:, 1] = False
    tokens = []
    for junk in (0.0, 77.0, np.nan):
        pixels = of_group.pixels.clone()
        pixels[1:, 1] = junk
        pixels.requires_grad_()
        out = encoder(with_group(batch, *group, pixels=pixels, band_present=present)).tokens
        out.square()[:, ::2].sum().backward()
        tokens.append(out.detach())
        assert pixels.grad.isfinite().all()
        assert not pixels.grad[1:, 1].any()
        assert pixels.grad[0, 1].any()
        assert pixels.grad[1:, 0].any()
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], encoder(batch).tokens)


@every_way
def test_the_order_of_modalities_only_orders_the_tokens(options, make_scene, encoder_of):
    scene, encoder = make_scene(), encoder_of(options)
    one, other = scene.pack(), scene.only("dem", "s2", "s1").pack()
    turned = torch.tensor([2, 0, 1])[other.modality.long()]
    tile = other.tile_of_token
    # Within a group both batches have the same order.
    order = (tile * 300 + turned * 100 + other.band_set).argsort(stable=True)
    assert_close(encoder(other).tokens[order], encoder(one).tokens, rtol=0, atol=1e-5)


@every_way
def test_tokens_that_may_not_be_seen_have_no_influence(options, make_scene, encoder_of, with_group):
    scene, encoder = make_scene(), encoder_of(options)
    batch = masked(scene, 3)
    for see, seen in (
        ("online", batch.mask == ONLINE),
        ("target", batch.mask != MISSING),
    ):
        pixels = [batch.modalities[m].band_sets[b].pixels.clone() for m, b in groups_of(batch)]
        for values in pixels:
            values.requires_grad_()
        encoded = encoder(with_pixels_of(batch, pixels, with_group), see)
        assert encoded.visible.tolist() == seen.nonzero()[:, 0].tolist()
        full = encoded.full(batch)
        assert torch.equal(full[seen], encoded.tokens)
        assert not full[~seen].any()
        encoded.tokens.square()[:, ::2].sum().backward()
        for (m, b), values in zip(groups_of(batch), pixels, strict=True):
            hidden = batch.covering(m, b).where(batch.covering(m, b) < len(seen), 0)
            hidden = ~seen[hidden] | (batch.covering(m, b) == len(seen))
            side = values.shape[-1] // hidden.shape[-1]
            on_pixels = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)
            assert not values.grad.any(1)[on_pixels].any()
            assert values.grad.any()


@every_way
def test_without_coarse_leaves_no_weight_of_merging_takes_part(
    options, make_scene, make_scene_encoder
):
    """At thresholds of minus infinity the model is the uniform model, bit for bit."""
    encoder = make_scene_encoder(**options).eval()
    batch = make_scene(split_share=1.0).pack()
    assert not batch.scales.any()
    expected = encoder(batch).tokens
    with torch.no_grad():
        for weight in encoder.merge.parameters():
            weight.fill_(torch.nan)
    assert torch.equal(encoder(batch).tokens, expected)


@every_way
@pytest.mark.parametrize(
    "tiles", [[(0, 0, 0, 0.0)], [(2, 1, 1, 1.0)], [(1, 1, 1, 1.0), (0, 0, 0, 0.0)]]
)
def test_batches_without_any_token_go_through(options, tiles, make_scene, encoder_of):
    batch, encoder = make_scene(tiles=tiles).pack(), encoder_of(options)
    encoded = encoder(batch)
    assert encoded.tokens.shape == (0, 64)
    found = gradients_of(encoder, loss_of(encoded, len(tiles)))
    assert all(gradient.isfinite().all() for gradient in found.values())


@every_way
def test_a_batch_of_nothing_but_hidden_tokens_goes_through(options, make_scene, encoder_of):
    batch, encoder = make_scene().pack(), encoder_of(options)
    batch = with_token_masks(batch, torch.full_like(batch.mask, TARGET_ONLY))
    assert encoder(batch).tokens.shape == (0, 64)
    assert len(encoder(batch, "target").tokens) == batch.num_tokens


@every_way
def test_in_bfloat16_everything_is_finite_and_about_the_same(options, make_scene, encoder_of):
    batch, encoder = make_scene().pack(), encoder_of(options)
    expected = encoder(batch).tokens.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encoder(batch)
    assert encoded.tokens.dtype == torch.float32
    found = gradients_of(encoder, loss_of(encoded, 4))
    assert all(gradient.isfinite().all() for gradient in found.values())
    similarity = torch.cosine_similarity(encoded.tokens.float(), expected, dim=1)
    assert similarity.min() > 0.98


@every_way
def test_weights_come_back_from_a_state_dict(options, make_scene, encoder_of):
    encoder, batch = encoder_of(options), make_scene().pack()
    other = APTEncoder(type(encoder.config).model_validate_json(encoder.config.model_dump_json()))
    assert other.config == encoder.config
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.eval()(batch).tokens, encoder(batch).tokens)


@every_way
def test_every_weight_has_a_gradient_in_every_batch(options, make_scene, encoder_of):
    """Even where there is nothing to merge and no token of a band set: data parallel training waits."""
    encoder = encoder_of(options)
    batch = make_scene(tiles=[(1, 0, 0, 0.0)], split_share=1.0).pack()
    found = torch.autograd.grad(
        loss_of(encoder(batch), 1), list(encoder.parameters()), allow_unused=True
    )
    unused = [
        name
        for (name, _), gradient in zip(encoder.named_parameters(), found, strict=True)
        if gradient is None
    ]
    assert unused == []


class Counting(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@every_way
def test_as_many_operations_whatever_the_batch_holds(options, make_scene, encoder_of, monkeypatch):
    """No loop over tokens, frames or tiles; but for attention on a CPU, which is left out."""
    monkeypatch.setattr(blocks, "choose_attention", lambda *_: lambda q, k, v, packed: q + k + v)
    encoder = encoder_of(options)
    tiles = [(2, 1, 1, 0.2), (1, 2, 1, 0.1), (3, 1, 0, 0.2)]
    counts = set()
    for chosen in (tiles[:1], tiles[1:], tiles * 3):
        # The first time tables are made that are kept.
        for counting in (Counting(), Counting()):
            batch = make_scene(tiles=chosen).pack()
            with counting:
                loss_of(encoder(batch), 1).backward()
        counts.add(counting.count)
    encoder.zero_grad()
    assert len(counts) == 1
