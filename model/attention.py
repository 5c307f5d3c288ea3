"""Attention over packed sequences: each row sees the rows of its own sequence, nothing is padded.

One backend is chosen per kind of device and number, at the first use, and reported in the log:

| device | numbers | backend |
|---|---|---|
| CUDA, compute capability 8.0 or later | float16, bfloat16 | `flash_attn`, else torch's `varlen_attn` |
| CPU | any | `on_cpu`: torch's fused kernel, one call per run of equally long sequences |
| any other; CUDA in float32 | any | `per_sequence`: the same, but not part of a compiled graph |

All of them give the same numbers but for rounding. Shape suffixes are those of `model.batch`; here N are
the rows of a packed buffer and S its sequences.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.cpu_attention import as_batch, as_rows, attend_any_lengths, attend_lengths, equal_runs

log = logging.getLogger(__name__)

# What the packed kernels of CUDA are made for: flash-attn 2, and torch's copy of it.
_PACKED_DTYPES = (torch.float16, torch.bfloat16)
_PACKED_CAPABILITY = (8, 0)


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences side by side in one buffer; some may be empty.

    `cu_seqlens` int32 [S + 1]: sequence `s` owns rows `cu_seqlens[s] ... cu_seqlens[s + 1] - 1`.
    `max_seqlen` is no less than the length of the longest.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of every sequence. Waits for the device: only backends that go by sequence ask."""
        return tuple(self.cu_seqlens.diff().tolist())

    def sequence_of_row(self, num_rows: int) -> Tensor:
        """int64 [N]: the sequence each of the buffer's rows belongs to."""
        # Told the size, a GPU need not be waited for.
        return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=num_rows)


# (q_NHK, k_NHK, v_NHK, packed) -> [N, H, K]; all of one type, the last axis dense in memory
PackedAttention = Callable[[Tensor, Tensor, Tensor, Packed], Tensor]


def choose_attention(device_type: str, dtype: torch.dtype) -> PackedAttention:
    """The attention for tensors of this type on a device of this type ("cpu", "cuda", ...).

    The same function every time, named as in the log and in the table above.
    """
    return _BACKENDS[_chosen_name(device_type, dtype)]


@torch.compiler.assume_constant_result
def _chosen_name(device_type: str, dtype: torch.dtype) -> str:
    # The compiler takes a constant from a function it need not look into; it cannot take a function.
    return _choose(device_type, dtype)


@lru_cache(maxsize=32)
def _choose(device_type: str, dtype: torch.dtype) -> str:
    chosen = "per_sequence"
    if device_type == "cpu":
        chosen = "on_cpu"
    elif device_type == "cuda" and dtype in _PACKED_DTYPES and _has_packed_kernels():
        chosen = _packed_kernel()
    log.info("attention on %s in %s: %s", device_type, str(dtype).split(".")[-1], chosen)
    return chosen


def _has_packed_kernels() -> bool:
    return torch.cuda.get_device_capability() >= _PACKED_CAPABILITY


def _packed_kernel() -> str:
    """The first of the packed kernels that can be imported."""
    for module, name in (
        ("flash_attn", "flash_attn"),
        ("torch.nn.attention.varlen", "varlen_attn"),
    ):
        try:
            import_module(module)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            # Built for another version of torch.
            log.warning("%s is installed but cannot be used: %s", module, error)
            continue
        return name
    return "per_sequence"


def flash_attn(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packed: Packed) -> Tensor:
    """`flash_attn_varlen_func` of the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    if not q_NHK.shape[0]:
        return v_NHK
    cu, longest = packed.cu_seqlens, packed.max_seqlen
    return flash_attn_varlen_func(q_NHK, k_NHK, v_NHK, cu, cu, longest, longest)


def varlen_attn(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packed: Packed) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, which torch has from 2.10 on."""
    from torch.nn.attention import varlen

    if not q_NHK.shape[0]:
        return v_NHK
    cu, longest = packed.cu_seqlens, packed.max_seqlen
    out = varlen.varlen_attn(q_NHK, k_NHK, v_NHK, cu, cu, longest, longest)
    assert isinstance(out, Tensor)
    return out


@torch.compiler.disable
def per_sequence(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packed: Packed) -> Tensor:
    """One call of torch's attention per run of equally long sequences, on slices of the buffers.

    Works on every device and in every type; waits for the device once per `packed`.
    """
    runs = list(equal_runs(packed.lengths))
    if not runs:
        return torch.zeros_like(q_NHK) + v_NHK
    # split: its backward is one concatenation, that of a slice a whole buffer of zeros for each.
    sizes = [rows.stop - rows.start for rows, _ in runs]
    parts = zip(*(x.split(sizes) for x in (q_NHK, k_NHK, v_NHK)), runs, strict=True)
    outputs = []
    for *qkv, (_, count) in parts:
        q, k, v = (as_batch(x, count) for x in qkv)
        outputs.append(as_rows(scaled_dot_product_attention(q, k, v)))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def on_cpu(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packed: Packed) -> Tensor:
    """The same by torch's kernel for the CPU, whose gradient is made to keep all threads busy.

    In a compiled model it is one operation that takes any lengths.
    """
    if torch.compiler.is_compiling():
        return attend_any_lengths(q_NHK, k_NHK, v_NHK, packed.cu_seqlens)
    lengths = packed.lengths
    if lengths and lengths[0] and lengths.count(lengths[0]) == len(lengths):
        return per_sequence(q_NHK, k_NHK, v_NHK, packed)
    return attend_lengths(q_NHK, k_NHK, v_NHK, lengths)


_BACKENDS: dict[str, PackedAttention] = {
    backend.__name__: backend for backend in (flash_attn, varlen_attn, on_cpu, per_sequence)
}
