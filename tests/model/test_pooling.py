"""One vector per tile: the same as tile by tile, whatever else is in the batch."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import multi_head_attention_forward
from torch.testing import assert_close

from model.encoded import Encoded
from model.pooling import AttentionPool, class_pool, mean_pool
from pipeline.errors import ConfigError

WIDTH = 128


def encoded_of(batch, share=1.0, seed=0, dtype=torch.float32):
    """Random tokens; about `share` of the batch's are visible."""
    draw = torch.Generator().manual_seed(seed)
    visible = torch.rand(batch.num_tokens, generator=draw).le(share).nonzero()[:, 0]
    tokens = torch.randn(len(visible), WIDTH, generator=draw, dtype=dtype)
    tiles = torch.arange(batch.num_tiles)
    return Encoded(tokens, None if share == 1 else visible, None, None, tiles, tiles.sub(tiles) - 1)


def by_tile(encoded, batch):
    """Visible tokens of each tile."""
    visible = range(batch.num_tokens) if encoded.visible is None else encoded.visible.tolist()
    ends = batch.cu_seqlens.tolist()
    rows = [
        [row for row, token in enumerate(visible) if begin <= token < end]
        for begin, end in pairwise(ends)
    ]
    return [encoded.tokens[of_tile] for of_tile in rows]


def plain_attention(pool, tokens_nD):
    """[Q, D] by torch's own multi-head attention."""
    identity = torch.eye(WIDTH, dtype=tokens_nD.dtype)
    key, value = pool.key_value.weight.split(WIDTH)
    out, _ = multi_head_attention_forward(
        pool.query[:, None],
        tokens_nD[:, None],
        tokens_nD[:, None],
        WIDTH,
        WIDTH // 64,
        None,
        torch.cat([tokens_nD.new_zeros(WIDTH), pool.key_value.bias]),
        None,
        None,
        False,
        0.0,
        pool.projection.weight,
        pool.projection.bias,
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=key,
        v_proj_weight=value,
        need_weights=False,
    )
    return out[:, 0]


shares = st.sampled_from([0.0, 0.3, 1.0])


@settings(max_examples=40)
@given(data=st.data(), share=shares, seed=st.integers(0, 1000))
def test_a_mean_is_that_of_the_tiles_visible_tokens(data, share, seed, tilesets):
    batch = data.draw(tilesets).pack()
    encoded = encoded_of(batch, share, seed)
    expected = [
        tokens.mean(0) if len(tokens) else torch.zeros(WIDTH) for tokens in by_tile(encoded, batch)
    ]
    assert_close(mean_pool(encoded, batch), torch.stack(expected), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(data=st.data(), share=shares, seed=st.integers(0, 1000), queries=st.integers(1, 3))
def test_queries_attend_to_the_tiles_visible_tokens(data, share, seed, queries, tilesets):
    batch = data.draw(tilesets).pack()
    encoded, pool = encoded_of(batch, share, seed), AttentionPool(WIDTH, queries)
    # Scores far from 0, so that forgetting to subtract the largest would overflow.
    with torch.no_grad():
        pool.query.mul_(2000 if seed % 2 else 20)
    expected = [
        plain_attention(pool, tokens) if len(tokens) else torch.zeros(queries, WIDTH)
        for tokens in by_tile(encoded, batch)
    ]
    assert_close(pool(encoded, batch), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_queries_have_the_gradients_of_what_they_compute(make_tiles):
    batch = make_tiles(tiles=[(1, 0.3), (1, 1.0), (1, 0.0)], num_scales=2, split_share=0.3).pack()
    encoded = encoded_of(batch, dtype=torch.float64)
    pool = AttentionPool(WIDTH).double()
    inputs = [encoded.tokens.requires_grad_(), *pool.parameters()]
    fast = pool(encoded, batch)
    slow = torch.stack(
        [
            plain_attention(pool, tokens) if len(tokens) else tokens.new_zeros(1, WIDTH)
            for tokens in by_tile(encoded, batch)
        ]
    )
    weights = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).view_as(fast)
    expected = torch.autograd.grad((slow * weights).sum(), inputs)
    assert_close(torch.autograd.grad((fast * weights).sum(), inputs), expected)


def test_class_tokens_of_a_tiles_dates_are_averaged(make_tiles):
    batch = make_tiles(tiles=[(2, 0.0), (1, 1.0), (1, 0.0)]).pack()
    tile = torch.tensor([0, 0, 2])
    encoded = encoded_of(batch)
    rows = torch.randn(3, WIDTH)
    dated = Encoded(encoded.tokens, None, rows, None, tile, torch.tensor([0, 1, 0]))
    expected = torch.stack([rows[:2].mean(0), torch.zeros(WIDTH), rows[2]])
    assert_close(class_pool(dated, batch), expected)


def test_an_encoder_without_a_class_token_is_told(make_tiles):
    batch = make_tiles().pack()
    with pytest.raises(
        ConfigError, match=r"no class token; set class_token: true, or use mean_pool"
    ):
        class_pool(encoded_of(batch), batch)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"width": 96}, "width is 96; expected a multiple of 64"),
     ({"width": 64, "num_queries": 0}, "num_queries is 0; expected 1 or more")],
)  # fmt: skip
def test_impossible_attention_pools_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        AttentionPool(**given)


def test_means_of_many_bfloat16_tokens_are_summed_in_more_bits(make_tiles):
    """257 ones: a sum in bfloat16 would stop at 256."""
    batch = make_tiles(tiles=[(1, 0.0)], num_roots=(5, 4), split_share=1.0).pack()
    assert batch.num_tokens > 257
    tokens = torch.ones(batch.num_tokens, WIDTH, dtype=torch.bfloat16)
    tile = torch.zeros(1, dtype=torch.int64)
    pooled = mean_pool(Encoded(tokens, None, None, None, tile, tile - 1), batch)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, torch.ones(1, WIDTH, dtype=torch.bfloat16))
