"""Packed attention, against one dense attention under a block-diagonal mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from model.attention import attention_per_sequence, choose_attention
from model.batch import cumulative_lengths

HEADS, HEAD_WIDTH = 2, 8


def random_qkv(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, num_tokens, HEADS, HEAD_WIDTH)
    return torch.randn(shape, generator=generator, requires_grad=True)


def packed(qkv, lengths):
    cu_seqlens = cumulative_lengths(torch.tensor(lengths))
    return attention_per_sequence(*qkv, cu_seqlens, max(lengths))


def dense(qkv, lengths):
    """softmax(q k' / sqrt(width)) v of all tokens at once; other sequences are masked out."""
    q, k, v = qkv
    owner = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    logits = torch.einsum("nhk,mhk->hnm", q, k) / HEAD_WIDTH**0.5
    logits = logits.masked_fill(owner[:, None] != owner[None], -torch.inf)
    return torch.einsum("hnm,mhk->nhk", logits.softmax(-1), v)


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any))
def test_equals_dense_attention_under_a_block_diagonal_mask(lengths):
    qkv = random_qkv(sum(lengths))
    result, expected = packed(qkv, lengths), dense(qkv, lengths)
    assert_close(result, expected, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    gradients = [torch.autograd.grad((out * weights).sum(), qkv)[0] for out in (result, expected)]
    assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 3], [3, 0], [0, 2, 0, 0, 1, 0]])
def test_empty_sequences_give_no_rows_and_hurt_nobody(lengths):
    qkv = random_qkv(sum(lengths))
    result = packed(qkv, lengths)
    assert result.shape == (sum(lengths), HEADS, HEAD_WIDTH)
    without = [n for n in lengths if n] or [0]
    assert torch.equal(result, packed(qkv, without))


def test_a_sequence_never_sees_another():
    lengths = [4, 3, 5]
    qkv = random_qkv(12)
    changed = qkv.detach().clone()
    changed[:, 4:7] = 1e6
    before, after = packed(qkv, lengths), packed(changed, lengths)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[4:7], after[4:7])


def test_the_cpu_runs_one_attention_per_sequence():
    assert choose_attention("cpu") is attention_per_sequence
