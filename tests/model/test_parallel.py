"""An encoder replicated (DDP) or sharded (FSDP2) over two processes is the encoder of one process."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.encoder import APTEncoder
from model.packing import TileArrays, pack
from training_processes import encode_rank, exit_codes, replicated, sharded, step


@pytest.mark.parametrize("wrap", [replicated, sharded])
def test_two_processes_compute_what_one_does(wrap, make_tiles, make_encoder, tmp_path):
    """Outputs, gradients and the saved encoder, over two steps of batches of different shapes.

    One process's batches lack a modality.
    """
    encoder = with_radar(make_encoder(depth=3, class_token=True, register_tokens=1).config)
    batches = [[batch_of(make_tiles, rank, n) for n in range(2)] for rank in range(2)]
    arguments = [(rank, batches, tmp_path, wrap, encoder) for rank in range(2)]
    assert exit_codes(encode_rank, arguments) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    alone = copy.deepcopy(encoder)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for n in range(2):
        tokens, gradients = step(alone, optimizer, [of_rank[n] for of_rank in batches])
        for rank in range(2):
            assert_close(ranks[rank][n][0][0], tokens[rank], rtol=0, atol=1e-5)
            assert_close(ranks[rank][n][1], gradients, rtol=1e-4, atol=1e-6)
    assert any(g.any() for g in gradients.values())
    # Of a sharded encoder the first process saves it all; a replica saves itself.
    saved = APTEncoder.from_pretrained(tmp_path / "encoder0")
    assert_close(dict(saved.state_dict()), dict(alone.state_dict()), rtol=0, atol=1e-5)
    assert (tmp_path / "encoder1").exists() == (wrap is replicated)


def with_radar(config):
    (image,) = config.modalities
    radar = image.model_copy(update={"name": "radar"})
    torch.manual_seed(0)
    return APTEncoder(config.model_copy(update={"modalities": (image, radar)}))


def batch_of(make_tiles, rank, n):
    shares = [(1 + rank, 0.2), (2, 0.0), (1, 1.0)][n : 2 + rank]
    tiles = [make_tiles(seed=10 * n + rank + 100 * m, tiles=shares) for m in range(2 - rank)]
    frames = [replace(t.arrays(), name=("image", "radar")[m]) for m, t in enumerate(tiles)]
    return pack(TileArrays(np.arange(len(shares)), frames))
