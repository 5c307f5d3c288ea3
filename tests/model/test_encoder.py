"""Laws of the encoder: packing, missing data and merging change nothing they should not change."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d
from torch.testing import assert_close

from model.embed import PixelNormalization
from model.encoder import APTEncoder


def one_by_one(encoder, tiles):
    return [encoder(tiles.select([tile]).pack()).tokens for tile in range(tiles.num_tiles)]


def gradients(encoder, outputs):
    """By parameter, of a fixed function of the tokens; its value does not grow with their number."""
    tokens = torch.cat(outputs)
    weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
    loss = (tokens * weights).sum() / max(len(tokens), 1)
    return dict(
        zip(
            dict(encoder.named_parameters()),
            torch.autograd.grad(loss, list(encoder.parameters()), materialize_grads=True),
            strict=True,
        )
    )


@settings(max_examples=60)
@given(data=st.data())
def test_packed_tiles_come_out_as_if_alone(data, tilesets, make_encoder):
    tiles = data.draw(tilesets)
    encoder = make_encoder(tiles.grid.base_patch_size)
    packed, alone = [encoder(tiles.pack()).tokens], one_by_one(encoder, tiles)
    assert_close(packed[0], torch.cat(alone), rtol=0, atol=1e-5)
    if len(packed[0]):
        assert_close(gradients(encoder, packed), gradients(encoder, alone), rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(data=st.data())
def test_the_order_of_tiles_only_orders_the_tokens(data, tilesets, make_encoder):
    tiles = data.draw(tilesets)
    order = data.draw(st.permutations(range(tiles.num_tiles)))
    encoder = make_encoder(tiles.grid.base_patch_size)
    batch = tiles.pack()
    parts = encoder(batch).tokens.split(batch.cu_seqlens.diff().tolist())
    expected = torch.cat([parts[tile] for tile in order])
    assert_close(encoder(tiles.select(order).pack()).tokens, expected, rtol=0, atol=1e-5)


@settings(max_examples=60)
@given(data=st.data(), junk=st.integers(0, 65535))
def test_invalid_pixels_change_nothing(data, junk, tilesets, make_encoder):
    tiles = data.draw(tilesets)
    pixels = np.where(tiles.frames.valid[:, None], tiles.frames.pixels, np.uint16(junk))
    encoder = make_encoder(tiles.grid.base_patch_size)
    changed = encoder(tiles.with_pixels(pixels).pack()).tokens
    assert torch.equal(changed, encoder(tiles.pack()).tokens)


@settings(max_examples=60)
@given(data=st.data(), junk=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_invalid_pixels_of_any_float_change_no_output_and_no_gradient(
    data, junk, tilesets, make_encoder
):
    tiles = data.draw(tilesets)
    clean = tiles.with_pixels(tiles.frames.pixels.astype(np.float32))
    dirty = tiles.with_pixels(
        np.where(tiles.frames.valid[:, None], clean.frames.pixels, np.float32(junk))
    )
    encoder = make_encoder(tiles.grid.base_patch_size)
    before, after = encoder(clean.pack()).tokens, encoder(dirty.pack()).tokens
    assert torch.equal(after, before)
    if len(before):
        of_clean, of_dirty = gradients(encoder, [before]), gradients(encoder, [after])
        assert all(torch.equal(of_dirty[name], of_clean[name]) for name in of_clean)


@settings(max_examples=60)
@given(data=st.data(), junk=st.sampled_from([0.0, np.nan, np.inf]))
def test_only_valid_pixels_have_a_gradient(data, junk, tilesets, make_encoder, with_pixels):
    tiles = data.draw(tilesets)
    batch = tiles.with_pixels(tiles.frames.pixels.astype(np.float32)).pack()
    (band_set,) = batch.modalities[0].band_sets
    invalid = ~band_set.valid[:, None].expand_as(band_set.pixels)
    values = band_set.pixels.masked_fill(invalid, junk).requires_grad_()
    out = make_encoder(tiles.grid.base_patch_size)(with_pixels(batch, pixels=values)).tokens
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert not values.grad[invalid].any()
    assert values.grad[~invalid].ne(0).float().mean() > 0.9 or not len(out)


@settings(max_examples=60)
@given(data=st.data())
def test_missing_leaves_change_nothing_however_they_are_cut(data, tilesets, make_encoder):
    """Other numbers below them, or four missing quarters in place of one: the same bits come out."""
    tiles = data.draw(tilesets)
    pixels = tiles.frames.pixels.copy()
    for frame, leaves in enumerate(tiles.leaves):
        for leaf in leaves:
            if leaf.missing:
                pixels[frame][:, *leaf.window(tiles.grid.base_patch_size)] += 1
    cut = [[part for leaf in leaves for part in quarters(leaf)] for leaves in tiles.leaves]
    encoder = make_encoder(tiles.grid.base_patch_size)
    expected = encoder(tiles.pack()).tokens
    found = encoder(tiles.with_pixels(pixels).with_leaves(cut).pack()).tokens
    assert torch.equal(found, expected)


def quarters(leaf):
    if leaf.missing and leaf.scale:
        return [replace(child, missing=True) for child in leaf.children()]
    return [leaf]


def test_an_invalid_pixel_differs_from_a_valid_one_in_the_middle_of_the_range(make_encoder):
    """Both become 0 when scaled; the encoder still tells them apart."""
    pixels = torch.zeros(1, 3, 2, 2)
    valid = torch.ones(1, 2, 2, dtype=torch.bool)
    one_invalid = valid.clone()
    one_invalid[0, 1, 0] = False
    embedding = make_encoder().embedding["image/first"]
    assert not torch.equal(embedding(pixels, valid), embedding(pixels, one_invalid))


def test_valid_pixels_of_one_tile_change_that_tile_alone(make_tiles, make_encoder):
    tiles = make_tiles(tiles=[(2, 0.2), (1, 0.2), (2, 0.2)])
    pixels = tiles.frames.pixels.copy()
    pixels[2] += 1
    batch, encoder = tiles.pack(), make_encoder()
    after = encoder(tiles.with_pixels(pixels).pack()).tokens
    changed = (encoder(batch).tokens != after).any(1)
    begin, end = batch.cu_seqlens[1:3].tolist()
    expected = torch.zeros(batch.num_tokens, dtype=torch.bool)
    expected[begin:end] = True
    assert torch.equal(changed, expected)


def plain_vit(encoder, images, valid, grid):
    """[image, cells, D] of float images [image, C, y, x]: a ViT of one patch size, row by row of cells."""
    embedding, stack = encoder.embedding["image/first"], encoder.stack
    values = torch.where(valid[:, None], 2 * images / 1000 - 1, 0)
    channels = torch.cat([values, valid[:, None].float()], dim=1)
    x = conv2d(channels, embedding.weight, embedding.bias, stride=grid.base_patch_size)
    y_x = torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.cols)) + 0.5
    x = x.flatten(2).mT + encoded_places(encoder, y_x * grid.base_patch_size)
    for block in stack.blocks:
        q, k, v = block.qkv(block.norm1(x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / 8).softmax(-1) @ v
        x = x + block.projection(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return stack.norm(x)


def encoded_places(encoder, metres_10):
    """[n, 64]: band set, first timestep, no date, and positions [n, 2] in units of 10 m."""
    vector = encoder.encoding.band_set_vector("image", "")
    first = torch.cat([torch.zeros(8), torch.ones(8)])
    frequencies = 10_000.0 ** -(torch.arange(4) / 4)
    waves = [f(axis[:, None] * frequencies) for axis in metres_10.T for f in (torch.sin, torch.cos)]
    time = torch.cat([torch.zeros(16), first, torch.zeros(32)])
    return vector + time + torch.cat([torch.zeros(len(metres_10), 48), *waves], dim=1)


def test_without_coarse_leaves_the_model_is_a_plain_vit(make_tiles, make_encoder):
    """At thresholds of minus infinity: one convolution, encodings, dense attention."""
    tiles = make_tiles(split_share=1.0, tiles=[(1, 0.0)] * 3)
    encoder, batch = make_encoder(), tiles.pack()
    assert not batch.scales.any()
    images = torch.from_numpy(tiles.frames.pixels.astype(np.float32))
    expected = plain_vit(encoder, images, torch.from_numpy(tiles.frames.valid), tiles.grid)
    expected = expected[:, torch.from_numpy(tiles.grid.storage_order)].flatten(0, 1)
    assert_close(encoder(batch).tokens, expected, rtol=0, atol=1e-5)


def test_a_fresh_coarse_token_is_the_mean_of_its_base_tokens(make_tiles, make_encoder):
    tiles = make_tiles(split_share=0.5)
    whole = [[part for leaf in leaves for part in base_leaves(leaf)] for leaves in tiles.leaves]
    encoder = APTEncoder(make_encoder().config)
    base = encoder.embed(tiles.with_leaves(whole).pack())
    lengths = [4**leaf.scale for _, leaf in tiles.present()]
    means = torch.stack([rows.mean(0) for rows in base.split(lengths)])
    assert max(lengths) == 16
    assert_close(encoder.embed(tiles.pack()), means, rtol=0, atol=1e-5)


def base_leaves(leaf):
    if leaf.scale == 0:
        return [leaf]
    return [
        part
        for child in leaf.children()
        for part in base_leaves(replace(child, missing=leaf.missing))
    ]


def test_a_tile_without_tokens_goes_through_forward_and_backward(make_tiles, make_encoder):
    batch = make_tiles(tiles=[(1, 1.0), (2, 0.0), (1, 1.0)]).pack()
    assert (batch.cu_seqlens.diff() > 0).tolist() == [False, True, False]
    encoder = make_encoder()
    out = encoder(batch).tokens
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(encoder, [out]).values())


def test_pixels_are_scaled_to_one_over_each_bands_range():
    values = torch.tensor([[0.0, 100.0], [5.0, 150.0], [10.0, 200.0], [10.0, 200.0]])
    valid = torch.tensor([True, True, True, False])
    scaled = PixelNormalization(((0.0, 10.0), (100.0, 200.0)))(
        values[:, :, None, None], valid[:, None, None, None]
    )
    expected = [[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert scaled[:, :, 0, 0].tolist() == expected
