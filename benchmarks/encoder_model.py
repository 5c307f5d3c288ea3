"""The encoder itself, as `bench_encoder.py` runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import record_function

from encoder_clock import SCATTER
from encoder_scenes import fresh
from model import APTEncoder, EncoderConfig, TokenBatch
from model.config import Size
from model.cost import TokenCounts, count_flops
from model.upsample import to_grid
from pipeline.store import Store


def encoder_of(batch: TokenBatch, store: Store, size: Size) -> APTEncoder:
    """A fresh encoder for the batch's band set."""
    torch.manual_seed(0)
    chosen = {m.name: [s.name for s in m.band_sets] for m in batch.modalities}
    config = EncoderConfig.for_store(store, chosen, size=size)
    return APTEncoder(config).to(batch.device)


def flops_of(encoder: APTEncoder, batch: TokenBatch) -> int:
    """Of a forward pass. A backward pass has twice as many, so that ratios hold for both."""
    return count_flops(encoder.config, TokenCounts.of(batch, encoder.config)).total


def encoded(encoder: APTEncoder, batch: TokenBatch) -> Tensor:
    """[N, D]; nothing is taken over from an earlier call."""
    return encoder(fresh(batch)).tokens


def on_grid(encoder: APTEncoder, batch: TokenBatch) -> Tensor:
    batch = fresh(batch)
    tokens = encoder(batch).tokens
    with record_function(SCATTER):
        return to_grid(tokens, batch)[0]


@contextmanager
def one_operator_attention() -> Iterator[None]:
    """The CPU's attention runs operators per sequence; put some in its place whose number is fixed."""

    def sum_of_three(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return q + k + v

    with mock.patch("model.blocks.choose_attention", return_value=sum_of_three):
        yield
