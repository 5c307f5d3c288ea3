"""The encoder learns eight real tiles by heart."""

import pytest
import torch
from torch import nn

from model import APTEncoder, BatchStream, EncoderConfig, TileDataset
from model.merge import average_runs

WIDTH, STEPS, RATE = 128, 250, 1e-2


@pytest.fixture(scope="module")
def batch(chip_store):
    """Eight tiles of the chip, of at most 32 tokens each."""
    return next(iter(BatchStream(TileDataset(chip_store, max_tokens_per_tile=32), batch_tiles=8)))


@pytest.mark.parametrize("options", [{}, {"position": "rotary", "qk_norm": True, "mlp": "swiglu"}])
def test_eight_real_tiles_are_learned_by_heart(options, batch, chip_store):
    """From a token and those it sees to its own patch and to the mean patch of its tile."""
    store = TileDataset(chip_store).store
    torch.manual_seed(0)
    config = EncoderConfig.for_store(store, width=WIDTH, depth=2, kernel_px=4, **options)
    encoder = APTEncoder(config)
    wanted = targets(encoder, batch)
    head = nn.Linear(WIDTH, wanted.shape[1])
    losses = trained(nn.ModuleList([encoder, head]), batch, wanted)
    # Of a target's variance, which is 1.
    assert losses[0] > 0.9
    assert losses[-1] < 0.01


def targets(encoder, batch):
    """[N, 2 C P P]: mean base patch of every token, and the mean of these over its tile, standardised."""
    pixels, _ = encoder.pixels(batch, 0, 0)
    own = average_runs([pixels.flatten(1)], batch)
    of_tile = own.new_zeros(batch.num_tiles, own.shape[1])
    of_tile = of_tile.index_add(0, batch.tile_of_token, own) / batch.cu_seqlens.diff()[:, None]
    wanted = torch.cat([own, of_tile.index_select(0, batch.tile_of_token)], dim=1)
    return ((wanted - wanted.mean(0)) / wanted.std(0)).detach()


def trained(model, batch, wanted):
    encoder, head = model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = (head(encoder(batch).tokens) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
