"""A larger encoder on a GPU, by kind of attention, for `bench_encoder.py`."""

import statistics
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from encoder_clock import FORWARD, STEP, Forward, median_ratio, seconds, taking_turns
from encoder_model import encoded, encoder_of, flops_of
from encoder_peers import PlainBlocks, padded
from encoder_scenes import UNIFORM, Setting, batches_of, fresh
from model import APTEncoder, TokenBatch
from model.attention import PackedAttention, flash_attn, per_sequence, varlen_attn
from model.config import Size
from pipeline.store import Store

MODULES = {flash_attn: "flash_attn", varlen_attn: "torch.nn.attention.varlen"}


def gpu_rows(
    setting: Setting,
    store: Store,
    ratios: Sequence[float],
    rounds: int,
    device: str = "cuda",
    size: Size = "base",
) -> list[dict[str, Any]]:
    """A larger model with every packed attention there is, and padded, by ratio.

    Utilisation is of the fastest product of large matrices in the same run.
    """
    batches = {r: b.to(device) for r, b in batches_of(store, setting, ratios).items()}
    encoder = encoder_of(batches[UNIFORM], store, size)
    blocks = PlainBlocks(encoder.config.width, encoder.config.depth).to(device)
    contenders: dict[tuple[str, float], tuple[nn.Module, Forward]] = {}
    for ratio, batch in batches.items():
        for name, attend in packed_attentions(device).items():
            call = partial(with_attention, attend, partial(encoded, encoder, batch))
            contenders[name, ratio] = encoder, call
        both = nn.ModuleList([encoder, blocks])
        contenders["padded SDPA", ratio] = both, partial(padded_step, encoder, blocks, batch)
    found, peak = taking_turns(contenders, rounds, device), matmul_flops(device)
    rows = []
    for (name, ratio), times in found.items():
        flops, tokens = flops_of(encoder, batches[ratio]), batches[ratio].num_tokens
        row: dict[str, Any] = {"what": f"GPU: {setting.name}, {size}, {name}, ratio {ratio:g}"}
        row["FLOP ratio"] = flops_of(encoder, batches[UNIFORM]) / flops
        for what, passes in ((FORWARD, 1), (STEP, 3)):
            taken = statistics.median(times[what])
            row[f"{what}, tokens/s"] = tokens / taken
            row[f"{what}, utilisation"] = passes * flops / taken / peak
            row[f"{what}, speedup"] = median_ratio(found[name, UNIFORM][what], times[what])
        rows.append(row)
    return rows


def packed_attentions(device: str) -> dict[str, PackedAttention]:
    """Those of the encoder that can be had here, by name."""
    if device != "cuda":
        return {per_sequence.__name__: per_sequence}
    return {attend.__name__: attend for attend, of in MODULES.items() if find_spec(of)}


def with_attention(attend: PackedAttention, forward: Forward) -> Tensor:
    with mock.patch("model.blocks.choose_attention", return_value=attend):
        return forward()


def padded_step(encoder: APTEncoder, blocks: PlainBlocks, batch: TokenBatch) -> Tensor:
    return padded(encoder, blocks, fresh(batch))


def matmul_flops(device: str) -> float:
    """FLOP/s of large matrix products, in bf16 on a GPU."""
    side, kind = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(side, side, device=device, dtype=kind)
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(10))
