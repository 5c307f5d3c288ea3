"""Two processes that train together: each step has the samples of the run with one, and equal weights."""

import torch

from model.data import BatchStream, TileDataset
from streams import steps_of
from training_processes import exit_codes, train_rank

STEPS, SIZE = 7, {"batch_tokens": 1400}


def test_two_processes_train_on_the_samples_of_one(chip_store, tmp_path):
    arguments = [(rank, 2, chip_store, tmp_path, SIZE, STEPS) for rank in range(2)]
    assert exit_codes(train_rank, arguments) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    stream = BatchStream(TileDataset(chip_store), seed=3, **SIZE)
    alone = [sorted(batch.tile_indices.tolist()) for batch in steps_of(stream, STEPS)]
    assert [sorted(a + b) for a, b in zip(*(r["seen"] for r in ranks), strict=True)] == alone
    assert ranks[0]["state"] == ranks[1]["state"] == stream.state_dict()
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
