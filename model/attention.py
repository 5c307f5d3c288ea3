"""Attention over packed sequences: each token sees the tokens of its own tile, nothing is padded.

One backend is chosen per device: `flash_attn_varlen_func` of the flash-attn package on CUDA where it
is installed, else torch's own `varlen_attn` on CUDA, else scaled-dot-product attention per sequence.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# (q_NHK, k_NHK, v_NHK, cu_seqlens int32 [B + 1], max_seqlen) -> [N, H, K]
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@lru_cache(maxsize=8)
def choose_attention(device_type: str) -> VarlenAttention:
    """The attention for tensors on a device of this type ("cpu", "cuda", ...)."""
    if device_type != "cuda":
        return attention_per_sequence
    return _flash_attention if find_spec("flash_attn") else _torch_varlen_attention


def attention_per_sequence(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """One attention call per sequence, on slices of the packed buffers."""
    lengths = cu_seqlens.diff().tolist()
    # [1, H, n, K] each: the fused CPU kernel takes four axes only.
    sequences = zip(
        *(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_NHK, k_NHK, v_NHK)), strict=True
    )
    parts = [scaled_dot_product_attention(q, k, v) for q, k, v in sequences]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _torch_varlen_attention(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q_NHK, k_NHK, v_NHK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    assert isinstance(out, Tensor)
    return out


def _flash_attention(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_NHK, k_NHK, v_NHK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    )
