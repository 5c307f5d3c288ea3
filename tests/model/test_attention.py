"""Packed attention: every backend against one dense attention under a block-diagonal mask."""

import sys
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from model import attention, cpu_attention
from model.attention import Packed, choose_attention, on_cpu, per_sequence
from model.cpu_attention import equal_runs

HEADS, HEAD_WIDTH = 2, 8
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=6)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def random_qkv(num_rows, seed=0, width=HEAD_WIDTH, **kind):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, num_rows, HEADS, width)
    return torch.randn(shape, generator=generator).to(**kind).requires_grad_()


def pack(lengths, device="cpu"):
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Packed(cu_seqlens, max(lengths))


def compiled_op(q, k, v, packed):
    """What a compiled model calls."""
    return torch.ops.aptile.cpu_attention(q, k, v, packed.cu_seqlens)[0]


def padded(q, k, v, packed):
    """torch's attention of all sequences filled up to the longest, under a mask of what is real."""
    there = torch.arange(packed.max_seqlen) < packed.cu_seqlens.diff()[:, None]
    filled = []
    for x in (q, k, v):
        slots = x.new_zeros(*there.shape, *x.shape[1:])
        slots[there] = x
        filled.append(slots.transpose(1, 2))
    out = scaled_dot_product_attention(*filled, attn_mask=there[:, None, None])
    return out.transpose(1, 2)[there]


def dense(q, k, v, packed):
    """softmax(q k' / sqrt(width)) v of all rows at once; other sequences are masked out."""
    owner = packed.sequence_of_row(len(q))
    logits = torch.einsum("nhk,mhk->hnm", q, k) / q.shape[2] ** 0.5
    logits = logits.masked_fill(owner[:, None] != owner[None], -torch.inf)
    return torch.einsum("hnm,mhk->nhk", logits.softmax(-1), v)


BACKENDS = [per_sequence, on_cpu, compiled_op, padded]


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths=LENGTHS.filter(any), data=st.data())
def test_every_backend_equals_dense_attention_under_a_block_diagonal_mask(backend, lengths, data):
    if data.draw(st.booleans(), label="equal lengths"):
        lengths = [max(lengths)] * len(lengths)
    qkv, packed = random_qkv(sum(lengths)), pack(lengths)
    result, expected = backend(*qkv, packed), dense(*qkv, packed)
    assert_close(result, expected, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    gradients = [torch.autograd.grad((out * weights).sum(), qkv)[0] for out in (result, expected)]
    assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [per_sequence, on_cpu, compiled_op])
@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 3], [3, 0], [0, 2, 0, 0, 1, 0]])
def test_empty_sequences_give_no_rows_and_hurt_nobody(backend, lengths):
    qkv = random_qkv(sum(lengths))
    result = backend(*qkv, pack(lengths))
    assert result.shape == (sum(lengths), HEADS, HEAD_WIDTH)
    without = [n for n in lengths if n] or [0]
    assert torch.equal(result, backend(*qkv, pack(without)))
    (gradient,) = torch.autograd.grad(result.sum(), qkv)
    assert gradient.shape == qkv.shape


@pytest.mark.parametrize("backend", [per_sequence, on_cpu, compiled_op])
def test_a_sequence_never_sees_another(backend):
    packed = pack([4, 3, 5])
    qkv = random_qkv(12)
    changed = qkv.detach().clone()
    changed[:, 4:7] = 1e6
    before, after = backend(*qkv, packed), backend(*changed, packed)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[4:7], after[4:7])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("backend", [on_cpu, compiled_op])
def test_gradients_in_parts_that_keep_all_threads_busy_are_the_same(backend, threads, monkeypatch):
    lengths, parts = [600, 3, 257, 256, 255, 5, 5], []
    original = cpu_attention._backward_in_parts

    def noting(number, *tensors):
        parts.append((number, tensors[0].shape[2]))
        return original(number, *tensors)

    monkeypatch.setattr(cpu_attention, "_backward_in_parts", noting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    heads = torch.randn(3, sum(lengths), 5, 8, generator=torch.Generator().manual_seed(0))
    heads.requires_grad_()
    packed, weights = pack(lengths), torch.linspace(-1, 1, sum(lengths))[:, None, None]
    found, expected = (
        torch.autograd.grad((attend(*heads, packed) * weights).sum(), heads)[0]
        for attend in (backend, dense)
    )
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert parts == [(min(threads, n // 128), n) for n in (600, 257, 256)]


def test_one_thread_or_as_many_as_heads_need_no_parts(monkeypatch):
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert cpu_attention._query_parts(1, 4, 1000) == 1
        assert cpu_attention._query_parts(7, 3, 1000) == 1
    assert cpu_attention._query_parts(1, 3, 1000) == 4


@pytest.mark.parametrize("backend", [per_sequence, on_cpu, compiled_op])
def test_gradients_are_those_of_finite_differences(backend):
    packed, qkv = pack([3, 0, 2]), random_qkv(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: backend(*x, packed), qkv)


def test_the_operation_of_compiled_models_keeps_to_the_rules_of_operations():
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        qkv = [random_qkv(7, seed, dtype=kind)[0].detach().requires_grad_() for seed in range(3)]
        inputs = (*qkv, pack([4, 0, 3]).cu_seqlens)
        torch.library.opcheck(torch.ops.aptile.cpu_attention.default, inputs)


@pytest.mark.parametrize("backend", [per_sequence, on_cpu, compiled_op])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_near(backend, dtype):
    packed, qkv = pack([40, 9]), random_qkv(49)
    near, expected = backend(*qkv.to(dtype), packed), dense(*qkv, packed)
    assert near.dtype == dtype
    assert_close(near.float(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(("lengths", "calls"), [([5] * 9, 1), ([3, 5, 5, 0, 5, 2], 3), ([0], 0)])
def test_equally_long_neighbours_share_one_call(lengths, calls, monkeypatch):
    seen = []

    def counting(*qkv):
        seen.append(qkv)
        return scaled_dot_product_attention(*qkv)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counting)
    qkv = random_qkv(sum(lengths))
    per_sequence(*qkv, pack(lengths))
    assert len(seen) == calls
    # Nothing was copied for it.
    owners = {x.untyped_storage().data_ptr() for of_call in seen for x in of_call}
    assert owners <= {qkv.untyped_storage().data_ptr()}


@given(lengths=LENGTHS)
def test_runs_of_equal_lengths_cover_all_rows_once(lengths):
    found = []
    for rows, count in equal_runs(lengths):
        assert (rows.stop - rows.start) % count == 0
        found += [(rows.stop - rows.start) // count] * count
    assert found == [n for n in lengths if n]


@pytest.fixture
def _fresh_choice():
    """Choices are made once per process."""
    attention._choose.cache_clear()
    yield
    attention._choose.cache_clear()


@pytest.mark.usefixtures("_fresh_choice")
def test_the_choice_is_reported_once(caplog):
    with caplog.at_level("INFO", logger="model.attention"):
        first = choose_attention("cpu", torch.float32)
        assert choose_attention("cpu", torch.float32) is first is on_cpu
    assert caplog.messages == ["attention on cpu in float32: on_cpu"]


def installed(monkeypatch, *names, broken=()):
    """Of the packed kernels, only these can be imported."""

    def import_module(name):
        if name in broken:
            raise ImportError(f"{name}: undefined symbol")
        if name not in names:
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(attention, "import_module", import_module)


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize(
    ("dtype", "capability", "modules", "expected"),
    [
        (torch.bfloat16, (9, 0), ("flash_attn", "torch.nn.attention.varlen"), "flash_attn"),
        (torch.float16, (8, 0), ("torch.nn.attention.varlen",), "varlen_attn"),
        (torch.bfloat16, (8, 9), (), "per_sequence"),
        (torch.float32, (9, 0), ("flash_attn",), "per_sequence"),
        (torch.float16, (7, 5), ("flash_attn",), "per_sequence"),
    ],
)
def test_what_a_gpu_uses(monkeypatch, dtype, capability, modules, expected):
    installed(monkeypatch, *modules)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_attention("cuda", dtype).__name__ == expected


@pytest.mark.usefixtures("_fresh_choice")
def test_a_package_that_cannot_be_loaded_is_named_and_passed_over(monkeypatch, caplog):
    installed(monkeypatch, "torch.nn.attention.varlen", broken=["flash_attn"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_attention("cuda", torch.bfloat16).__name__ == "varlen_attn"
    assert "flash_attn is installed but cannot be used: flash_attn: undefined" in caplog.text


def stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Takes what `flash_attn_varlen_func` and `varlen_attn` take, in their order."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
    return dense(q, k, v, Packed(cu_seqlens_q, max_seqlen_q))


def test_packed_kernels_are_called_as_they_want_to_be(monkeypatch):
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    for lengths in ([3, 4], [0, 0]):
        packed, qkv = pack(lengths), random_qkv(sum(lengths))
        for backend in (attention.flash_attn, attention.varlen_attn):
            assert_close(backend(*qkv, packed), per_sequence(*qkv, packed))


@on_gpu
@pytest.mark.parametrize("lengths", [[70, 0, 300, 1], [64, 64], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_agrees(lengths, dtype):
    qkv = random_qkv(sum(lengths), width=64)
    there = qkv.detach().to("cuda", dtype).requires_grad_()
    backend = choose_attention("cuda", dtype)
    result, expected = backend(*there, pack(lengths, "cuda")), per_sequence(*qkv, pack(lengths))
    assert_close(result.float().cpu(), expected, rtol=0, atol=0.02)
    gradients = [
        torch.autograd.grad(out.sum(), x)[0] for out, x in ((result, there), (expected, qkv))
    ]
    assert_close(gradients[0].float().cpu(), gradients[1], rtol=0, atol=0.05)
