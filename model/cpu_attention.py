"""torch's attention kernel for the CPU on packed sequences of any lengths, and its gradient.

Equally long neighbours share a call of the kernel; nothing is padded. Shape suffixes are those of
`model.attention`; n are the rows of one sequence.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries below which cutting a sequence costs more than threads that wait (measured: 256 in 2 parts gain).
_SHORTEST_PART = 128


def attend_lengths(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention [N, H, K] inside sequences of these lengths."""
    attended: Tensor = _CpuAttention.apply(q_NHK, k_NHK, v_NHK, lengths)  # type: ignore[no-untyped-call]
    return attended


def attend_any_lengths(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same for compiled models, as one operation the compiler does not look into.

    The lengths of sequences, which are others in every batch, are then no part of what it compiles.
    """
    out: Tensor = torch.ops.aptile.cpu_attention(q_NHK, k_NHK, v_NHK, cu_seqlens)[0]
    return out


def equal_runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """(rows, number of sequences) of every run of equally long sequences; empty ones do not count."""
    first = 0
    for length, run in groupby(n for n in lengths if n):
        count = sum(1 for _ in run)
        yield slice(first, first + count * length), count
        first += count * length


def as_batch(rows_NHK: Tensor, count: int) -> Tensor:
    """[S, H, n, K]: a view of the rows of `count` equally long sequences."""
    return rows_NHK.unflatten(0, (count, -1)).transpose(1, 2)


def as_rows(batch_SHnK: Tensor) -> Tensor:
    """[N, H, K]; a view of what torch's attention returns, which has the heads behind the rows."""
    return batch_SHnK.transpose(1, 2).flatten(0, 1)


def _cpu_forward(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Attention [N, H, K] and the logarithm [N, H] of the sum over which each row's softmax divides."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = []
    for rows, count in equal_runs(lengths):
        out_SHnK, log_sum_SHn = kernel(*(as_batch(x[rows], count) for x in (q_NHK, k_NHK, v_NHK)))
        parts.append((as_rows(out_SHnK), log_sum_SHn.transpose(1, 2).flatten(0, 1)))
    if not parts:
        return q_NHK.new_empty(q_NHK.shape), q_NHK.new_empty(q_NHK.shape[:2])
    out_NHK, log_sum_NH = map(torch.cat, zip(*parts, strict=True))
    return out_NHK, log_sum_NH


def _cpu_backward(
    grad_NHK: Tensor, saved: Sequence[Tensor], log_sum_NH: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Gradients [3, N, H, K] of q, k and v; `saved` are those three and what attention gave."""
    inputs = (grad_NHK.contiguous(), *saved)
    grads_3NHK = grad_NHK.new_empty((3, *grad_NHK.shape))
    for rows, count in equal_runs(lengths):
        log_sum_SHn = log_sum_NH[rows].unflatten(0, (count, -1)).transpose(1, 2)
        of_run = (*(as_batch(x[rows], count) for x in inputs), log_sum_SHn)
        parts = _query_parts(count, *log_sum_SHn.shape[1:])
        grads = _kernel_backward(*of_run) if parts == 1 else _backward_in_parts(parts, *of_run)
        for into, grad_SHnK in zip(grads_3NHK, grads, strict=True):
            into[rows].copy_(as_rows(grad_SHnK))
    return grads_3NHK


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads: tuple[Tensor, Tensor, Tensor] = kernel(grad, q, k, v, out, log_sum, 0.0, False)
    return grads


def _query_parts(num_sequences: int, num_heads: int, length: int) -> int:
    """Into how many parts to cut the queries of a sequence for its gradient.

    The kernel gives every thread whole heads of whole sequences: of 3 heads, 2 threads need the time of 4.
    """
    threads = torch.get_num_threads()
    wanted = threads // math.gcd(num_heads, threads)
    return max(1, min(wanted, length // _SHORTEST_PART)) if num_sequences == 1 else 1


def _backward_in_parts(
    parts: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_kernel_backward` of one sequence: parts of its queries as a batch, all with the same keys.

    The gradients of keys and values are sums over the queries, so over the parts and what is left.
    """
    whole = q.shape[2] // parts * parts
    by_query = (grad, q, out, log_sum)
    cut = [x[0, :, :whole].unflatten(1, (parts, -1)).transpose(0, 1) for x in by_query]
    left = [x[:, :, whole:] for x in by_query]
    every_k, every_v = (x.expand(parts, -1, -1, -1) for x in (k, v))
    grad_q, *sums = _kernel_backward(cut[0], cut[1], every_k, every_v, *cut[2:])
    grad_q = grad_q.transpose(0, 1).flatten(1, 2)[None]
    grad_k, grad_v = (x.sum(0, keepdim=True) for x in sums)
    if whole < q.shape[2]:
        of_left, *more = _kernel_backward(left[0], left[1], k, v, *left[2:])
        grad_q, grad_k, grad_v = torch.cat([grad_q, of_left], 2), grad_k + more[0], grad_v + more[1]
    return grad_q, grad_k, grad_v


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        out_NHK, log_sum_NH = _cpu_forward(q_NHK, k_NHK, v_NHK, lengths)
        ctx.save_for_backward(q_NHK, k_NHK, v_NHK, out_NHK, log_sum_NH)
        ctx.lengths = lengths
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor | None, ...]:
        *saved, log_sum_NH = ctx.saved_tensors
        return (*_cpu_backward(grad_NHK, saved, log_sum_NH, ctx.lengths), None)


@torch.library.custom_op("aptile::cpu_attention", mutates_args=())
def _cpu_attention_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return _cpu_forward(q, k, v, cu_seqlens.diff().tolist())


@torch.library.custom_op("aptile::cpu_attention_backward", mutates_args=())
def _cpu_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, cu_seqlens: Tensor
) -> Tensor:
    return _cpu_backward(grad, (q, k, v, out), log_sum, cu_seqlens.diff().tolist())


@_cpu_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    # The kernel counts in float32 at least.
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


@_cpu_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, cu_seqlens: Tensor
) -> Tensor:
    return grad.new_empty((3, *grad.shape))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _gradients(ctx: Any, grad_NHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads_3NHK = torch.ops.aptile.cpu_attention_backward(grad_NHK, *ctx.saved_tensors)
    return (*grads_3NHK.unbind(), None)


_cpu_attention_op.register_autograd(_gradients, setup_context=_keep)
