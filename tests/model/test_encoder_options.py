"""What each option of the encoder does, and what the encoder refuses to read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.encoder import APTEncoder
from pipeline.errors import ConfigError

PLAIN_AND = {
    "position": {"position": "rotary"},
    "position_cells": {"position": "learned", "position_cells": (8, 8)},
    "season": {"season": "day_of_year"},
    "size_position": {"size_position": True},
    "location_token": {"location_token": True},
    "class_token": {"class_token": True},
    "register_tokens": {"register_tokens": 1},
    "sequences": {"sequences": "date"},
    "windows": {"windows": 2},
    "global_every": {"windows": 2, "global_every": 2},
    "merge": {"merge": "per_level", "merge_levels": 2},
    "merge_init": {"merge_init": "zero"},
    "mlp": {"mlp": "swiglu"},
    "mlp_ratio": {"mlp_ratio": 2},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"layer_scale": 0.5},
}


@pytest.mark.parametrize("options", PLAIN_AND.values(), ids=PLAIN_AND)
def test_every_option_changes_what_comes_out(options, make_scene, make_scene_encoder):
    plain, other = make_scene_encoder(), make_scene_encoder(**options)
    weights, own = plain.state_dict(), other.state_dict()
    shared = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    other.load_state_dict(shared, strict=False)
    batch = make_scene().pack()
    assert not torch.allclose(other(batch).tokens, plain(batch).tokens, atol=1e-3)


def test_sequences_are_dropped_in_training_only(make_scene, make_scene_encoder):
    encoder, batch = make_scene_encoder(drop_path=0.9, depth=3), make_scene().pack()
    torch.manual_seed(0)
    first, second = encoder(batch).tokens, encoder(batch).tokens
    assert not torch.equal(first, second)
    encoder.eval()
    assert torch.equal(encoder(batch).tokens, encoder(batch).tokens)


def test_checkpointing_computes_blocks_again(make_scene, make_scene_encoder):
    calls = {}
    for checkpointing in (False, True):
        encoder = make_scene_encoder(checkpointing=checkpointing)
        counted = []
        encoder.stack.blocks[0].qkv.register_forward_hook(lambda *_, seen=counted: seen.append(1))
        encoder(make_scene().pack()).tokens.sum().backward()
        calls[checkpointing] = len(counted)
    assert calls == {False: 1, True: 2}


def test_the_place_on_earth_matters_with_a_location_token(make_scene, make_scene_encoder):
    encoder, scene = make_scene_encoder(location_token=True), make_scene()
    here = replace(scene, location=np.full_like(scene.location, 10.0))
    there = replace(scene, location=np.full_like(scene.location, 50.0))
    unknown = replace(scene, location=np.full_like(scene.location, np.nan))
    found = [encoder(s.pack()).tokens for s in (here, there, unknown)]
    assert all(tokens.isfinite().all() for tokens in found)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def changed_tokens(encoder, scene, name, change):
    """bool [N]: the tokens that change with a modality's pixels."""

    def of_layer(layer):
        pixels = layer.tiles.frames.pixels.copy()
        change(pixels)
        return replace(layer, tiles=layer.tiles.with_pixels(pixels))

    before = encoder(scene.pack()).tokens
    return (encoder(scene.with_layer(name, of_layer).pack()).tokens != before).any(1)


def test_with_sequences_of_dates_a_date_sees_itself_only(make_scene, make_scene_encoder):
    scene = make_scene(tiles=[(2, 2, 1, 0.0)])
    batch, encoder = scene.pack(), make_scene_encoder(sequences="date")

    def second_date(pixels):
        pixels[1] += 100

    changed = changed_tokens(encoder, scene, "s1", second_date)
    static = batch.modality == 2
    assert torch.equal(changed, (batch.positions[:, 3] == 1) & ~static)
    expected = [(0, -1), (0, 0), (0, 1)]
    encoded = encoder(batch)
    found = zip(encoded.sequence_tile.tolist(), encoded.sequence_timestep.tolist(), strict=True)
    assert list(found) == expected


def test_with_windows_a_square_sees_itself_only(make_scene, make_scene_encoder):
    scene = make_scene(tiles=[(2, 1, 1, 0.0)])
    batch, encoder = scene.pack(), make_scene_encoder(windows=2)

    def top_left(pixels):
        pixels[0, :, :8, :8] += 100

    changed = changed_tokens(encoder, scene, "s2", top_left)
    half = torch.tensor([m.grid.rows // 2 for m in batch.modalities])[batch.modality.long()]
    y, x = batch.positions[:, :2].unbind(1)
    assert torch.equal(changed, (y < half) & (x < half))


def test_with_a_global_block_everything_sees_the_square(make_scene, make_scene_encoder):
    scene = make_scene(tiles=[(2, 1, 1, 0.0)])
    encoder = make_scene_encoder(windows=2, global_every=2)

    def top_left(pixels):
        pixels[0, :, :8, :8] += 100

    assert changed_tokens(encoder, scene, "s2", top_left).all()


def base_patch(layer, frame, leaf, encoder):
    """Normalised pixels and validity of a leaf shrunk to base size: means of valid pixels."""
    p = layer.tiles.grid.base_patch_size
    window = leaf.window(p)
    pixels = torch.from_numpy(layer.tiles.frames.pixels[frame][:, *window])
    side = 2**leaf.scale
    blocks = pixels.unfold(1, side, side).unfold(2, side, side).flatten(3).mean(3)
    scaled = 2 * blocks / 1000 - 1
    return scaled[None], torch.ones(1, p, p, dtype=torch.bool)


def test_a_fresh_zero_merge_embeds_the_shrunk_patch(make_scene, make_scene_config):
    torch.manual_seed(0)
    encoder = APTEncoder(make_scene_config(merge_init="zero"))
    scene = make_scene(tiles=[(2, 0, 0, 0.0)]).only("s2")
    scene = scene.with_layer(
        "s2",
        lambda layer: replace(
            layer,
            more={},
            tiles=replace(
                layer.tiles,
                frames=replace(layer.tiles.frames, valid=np.ones_like(layer.tiles.frames.valid)),
            ),
        ),
    )
    batch, layer = scene.pack(), scene.layers[0]
    embedded = torch.cat(
        [
            encoder.embedding["s2/first"](*base_patch(layer, frame, leaf, encoder))
            for frame, leaf in layer.tiles.present()
        ]
    )
    assert batch.scales.max() == 2
    assert_close(encoder.embed(batch), embedded + encoder.token_encoding(batch), rtol=0, atol=1e-5)


def test_what_the_encoder_was_not_made_for_is_refused_in_words(make_scene, make_scene_encoder):
    encoder, scene = make_scene_encoder(), make_scene()
    renamed = scene.with_layer("s1", lambda layer: replace(layer, name="palsar"))
    with pytest.raises(ConfigError, match="modality 'palsar'.*made for s2, s1, dem"):
        encoder(renamed.pack())
    more = scene.with_layer("s2", lambda layer: replace(layer, more={"60m": layer.more["20m"]}))
    with pytest.raises(ConfigError, match="band set s2/60m.*made for s2/first, s2/20m"):
        encoder(more.pack())
    fewer = scene.with_layer(
        "s2",
        lambda layer: replace(
            layer, more={"20m": (layer.more["20m"][0][:, :1].copy(), layer.more["20m"][1])}
        ),
    )
    with pytest.raises(ConfigError, match="s2/20m of the batch has bands C0; .* C0, C1"):
        encoder(fewer.pack())


def test_roots_that_lie_in_two_windows_are_refused_in_words(make_scene, make_scene_encoder):
    with pytest.raises(ConfigError, match="windows is 3"):
        make_scene_encoder(windows=3)(make_scene().pack())


def test_more_scales_than_merge_levels_are_refused_in_words(make_scene, make_scene_encoder):
    encoder = make_scene_encoder(merge="per_level", merge_levels=1)
    with pytest.raises(ConfigError, match="merge_levels is 1"):
        encoder(make_scene().pack())
