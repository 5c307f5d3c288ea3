"""Weights of timm's ViTs: on uniform tokens the encoder computes what timm does, and then runs on any."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import timm_vits
from model.config import BandSetConfig, ModalityConfig
from model.encoder import APTEncoder
from model.timm_weights import export_vit, load_vit, value_range
from pipeline.errors import ConfigError

MODALITY = ModalityConfig(
    name="image",
    band_sets=(
        BandSetConfig(
            bands=("B0", "B1", "B2"), value_range=value_range(timm_vits.MEAN, timm_vits.STD)
        ),
    ),
)
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def options_of(model):
    return {**timm_vits.OF_ALL, **timm_vits.MODELS[model]}


def load(model, **options):
    shapes, _ = timm_vits.golden(model)
    weights = timm_vits.weights(shapes)
    return load_vit(weights, options_of(model)["num_heads"], MODALITY, **options).eval()


def tiles_of_the_image(make_tiles, split_share):
    """Twice the image, every pixel valid."""
    tiles = make_tiles(
        tiles=[(1, 0.0)] * 2, num_roots=(1, 1), base_patch_size=4, split_share=split_share
    )
    pixels = np.stack([timm_vits.image()] * 2)
    valid = np.ones_like(tiles.frames.valid)
    return replace(tiles, frames=replace(tiles.frames, pixels=pixels, valid=valid))


def in_timms_order(encoder, batch):
    """Tokens of the first tile: class token, registers, then patches row by row."""
    encoded = encoder(batch)
    begin, end = batch.cu_seqlens[:2].tolist()
    y, x = batch.positions[begin:end, :2].long().unbind(1)
    tokens = torch.empty(end - begin, encoder.config.width)
    tokens[y * (timm_vits.SIDE // timm_vits.PATCH) + x] = encoded.tokens[begin:end]
    prefix = [encoded.class_tokens[:1]] if encoded.class_tokens is not None else []
    if encoded.registers is not None:
        prefix.append(encoded.registers[0])
    return torch.cat([*prefix, tokens])


@pytest.mark.parametrize("model", timm_vits.MODELS)
@torch.no_grad()
def test_uniform_tokens_come_out_as_of_timm(model, make_tiles):
    batch = tiles_of_the_image(make_tiles, split_share=1.0).pack()
    assert not batch.scales.any()
    _, expected = timm_vits.golden(model)
    assert_close(in_timms_order(load(model), batch), expected, **TOLERANCE)


@pytest.mark.parametrize("model", timm_vits.MODELS)
@torch.no_grad()
def test_timm_computes_what_the_goldens_say(model):
    pytest.importorskip("timm", reason="timm cannot be imported here", exc_type=Exception)
    shapes, expected = timm_vits.golden(model)
    vit = timm_vits.build(model)
    assert {n: list(w.shape) for n, w in vit.state_dict().items()} == shapes
    assert_close(vit.forward_features(timm_vits.timm_input())[0], expected, **TOLERANCE)


@pytest.mark.parametrize("model", timm_vits.MODELS)
@torch.no_grad()
def test_the_same_weights_run_on_adaptive_tokens(model, make_tiles):
    """Merging is as it begins: a coarse token is the mean of timm's embedded patches."""
    tiles, encoder = tiles_of_the_image(make_tiles, split_share=0.5), load(model)
    batch = tiles.pack()
    assert 0 < int((batch.scales > 0).sum()) < batch.num_tokens
    patches = encoder.embed(tiles_of_the_image(make_tiles, split_share=1.0).pack())
    means = torch.stack(
        [rows.mean(0) for rows in patches.split((4 ** batch.scales.int()).tolist())]
    )
    assert_close(encoder.embed(batch), means, **TOLERANCE)
    encoded = encoder(batch)
    assert encoded.tokens.shape == (batch.num_tokens, encoder.config.width)
    assert encoded.tokens.isfinite().all()


@pytest.mark.parametrize("model", timm_vits.MODELS)
def test_what_is_exported_loads_as_the_same_encoder(model):
    encoder = load(model)
    exported = export_vit(encoder)
    again = load_vit(exported, encoder.config.num_heads, MODALITY)
    assert again.config == encoder.config
    assert_close(dict(again.state_dict()), dict(encoder.state_dict()), rtol=0, atol=1e-6)


def test_plain_weights_are_exported_under_their_names():
    shapes, _ = timm_vits.golden("plain")
    given = timm_vits.weights(shapes)
    exported = export_vit(load("plain"))
    assert exported.keys() == given.keys()
    # Its position is in the class token now.
    moved = {"cls_token", "pos_embed"}
    assert_close(
        {n: w for n, w in exported.items() if n not in moved},
        {n: w for n, w in given.items() if n not in moved},
    )
    assert_close(
        exported["cls_token"] + exported["pos_embed"][:, :1],
        given["cls_token"] + given["pos_embed"][:, :1],
    )
    assert_close(exported["pos_embed"][:, 1:], given["pos_embed"][:, 1:])


@torch.no_grad()
def test_a_trained_encoder_runs_in_timm(make_tiles, make_encoder):
    """Weights of validity and band set are no longer zero: they go into bias and positions."""
    pytest.importorskip("timm", reason="timm cannot be imported here", exc_type=Exception)
    from timm.models.vision_transformer import VisionTransformer

    options = {"position": "learned", "position_cells": (4, 4), "class_token": True}
    encoder = make_encoder(kernel_px=4, width=128, register_tokens=2, **options).eval()
    encoder = with_ranges(encoder)
    vit = VisionTransformer(**timm_vits.OF_ALL, reg_tokens=2).eval()
    vit.load_state_dict(export_vit(encoder))
    batch = tiles_of_the_image(make_tiles, split_share=1.0).pack()
    expected = vit.forward_features(timm_vits.timm_input())[0]
    assert_close(in_timms_order(encoder, batch), expected, **TOLERANCE)


def with_ranges(encoder):
    """The encoder for pixels in timm's range."""
    changed = APTEncoder(encoder.config.model_copy(update={"modalities": (MODALITY,)}))
    changed.load_state_dict(encoder.state_dict())
    return changed.eval()


def without(name):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


def renamed_norm(weights):
    """As with pooling by the mean, which timm norms afterwards."""
    return {f"fc_{n}" if n.startswith("norm.") else n: w for n, w in weights.items()}


def extra(name):
    return lambda weights: weights | {name: torch.ones(128)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed_norm, "norm.weight is missing"),
        (extra("norm_pre.weight"), "no place for norm_pre.weight"),
        (extra("blocks.1.attn.norm.weight"), "no place for blocks.1.attn.norm.weight"),
        (extra("attn_pool.latent"), "no place for attn_pool.latent"),
        (without("blocks.1.norm2.weight"), "blocks.1.norm2.weight is missing"),
        (without("patch_embed.proj.weight"), "patch_embed.proj.weight is missing"),
    ],
)
def test_other_weights_are_refused_in_words(change, words):
    shapes, _ = timm_vits.golden("plain")
    with pytest.raises(ConfigError, match="weights of a ViT") as refused:
        load_vit(change(timm_vits.weights(shapes)), 2, MODALITY)
    assert words in str(refused.value)


def test_heads_of_another_width_are_refused():
    shapes, _ = timm_vits.golden("plain")
    with pytest.raises(ConfigError, match="num_heads is 4; heads must be 64 wide"):
        load_vit(timm_vits.weights(shapes), 4, MODALITY)


def test_bands_must_be_as_many_as_channels():
    band_set = BandSetConfig(bands=("B0",), value_range=((0, 1),))
    one_band = ModalityConfig(name="image", band_sets=(band_set,))
    shapes, _ = timm_vits.golden("plain")
    with pytest.raises(
        ConfigError, match=r"embedding.*\(128, 4, 4, 4\).*\(128, 2, 4, 4\).*1 bands"
    ):
        load_vit(timm_vits.weights(shapes), 2, one_band)


def test_positions_that_are_no_square_need_their_shape():
    shapes, _ = timm_vits.golden("plain")
    weights = timm_vits.weights(shapes | {"pos_embed": [1, 13, 128]})
    with pytest.raises(ConfigError, match=r"pos_embed has 13 rows.*give the \(rows, columns\)"):
        load_vit(weights, 2, MODALITY)
    assert load_vit(weights, 2, MODALITY, cells=(3, 4)).config.position_cells == (3, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "position is 'sincos'"),
        ({"size_position": True, "position": "learned", "position_cells": (2, 2)}, "size_position is True"),
    ],
)  # fmt: skip
def test_an_encoder_no_vit_can_be_is_refused(options, words, make_encoder):
    with pytest.raises(ConfigError, match=words):
        export_vit(make_encoder(**options))
