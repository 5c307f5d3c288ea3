"""Two processes under torchrun: every step has the samples of the run with one, and one set of weights."""

import json
import subprocess
import sys

import pytest
import torch

from model.data import BatchStream, TileDataset

STEPS = 7
SCRIPT = """
import json, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from model import APTEncoder, BatchStream, EncoderConfig, TileDataset
from model.objectives import MaskedPrediction, random_masking

store, out, size = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
distributed.init_process_group("gloo")
rank = distributed.get_rank()
dataset = TileDataset(store)
stream = BatchStream(dataset, seed=3, **size)
config = EncoderConfig(width=64, depth=1, **{
    name: value
    for name, value in EncoderConfig.for_store(dataset.store, next(iter(dataset.modalities)), "nano")
    if name not in ("width", "depth")
})
torch.manual_seed(0)
model = DistributedDataParallel(MaskedPrediction(APTEncoder(config)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
seen = []
while len(seen) < int(sys.argv[4]):
    for batch in stream:
        loss = model(batch, random_masking(batch, 0.5, (3, len(seen))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(batch.tile_indices.tolist())
        if len(seen) == int(sys.argv[4]):
            break
weights = torch.cat([p.detach().ravel() for p in model.parameters()])
torch.save({"seen": seen, "state": stream.state_dict(), "weights": weights}, f"{out}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("size", [{"batch_tokens": 1400}])
def test_two_processes_train_on_the_samples_of_one(chip_store, tmp_path, size):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    arguments = [script, chip_store, tmp_path, json.dumps(size), str(STEPS)]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    stream = BatchStream(TileDataset(chip_store), seed=3, **size)
    alone = []
    while len(alone) < STEPS:
        for batch in stream:
            alone.append(sorted(batch.tile_indices.tolist()))
            if len(alone) == STEPS:
                break
    assert [sorted(a + b) for a, b in zip(*(r["seen"] for r in ranks), strict=True)] == alone
    assert ranks[0]["state"] == ranks[1]["state"] == stream.state_dict()
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
