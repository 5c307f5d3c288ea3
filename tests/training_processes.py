"""What other processes do in tests of training. They are forked from one that has imported it all."""

import copy
import json
import multiprocessing
import os
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from model import APTEncoder, BatchStream, EncoderConfig, TileDataset
from model.objectives import MaskedPrediction, random_masking

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["model.objectives"])


def exit_codes(function, arguments):
    """Exit codes of processes that run at the same time, one for each tuple of arguments."""
    processes = [SERVER.Process(target=function, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def read_until(store, ids, state, number, dies):
    """Write the ids and the state of every step; end without any clean-up after `dies` steps in all."""
    ids, state = Path(ids), Path(state)
    dataset = TileDataset(store)
    stream = BatchStream(dataset, batch_tiles=2, seed=3)
    if state.exists():
        stream.load_state_dict(json.loads(state.read_text()))
    done = len(ids.read_text().splitlines()) if ids.exists() else 0
    while done < number:
        for batch in stream:
            with ids.open("a") as file:
                file.write(" ".join(dataset.tile_ids[batch.tile_indices.numpy()]) + "\n")
            state.write_text(json.dumps(stream.state_dict()))
            done += 1
            if done == dies:
                os._exit(9)
            if done == number:
                break


def train_rank(rank, world_size, store, folder, size, steps):
    """Train a small encoder; keep the tiles of every step, the stream's state and the weights."""
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)
    dataset = TileDataset(store)
    stream = BatchStream(dataset, seed=3, **size)
    config = EncoderConfig.for_store(dataset.store, dataset.modalities, width=64, depth=1)
    torch.manual_seed(0)
    encoder = APTEncoder(config)
    model = DistributedDataParallel(MaskedPrediction(encoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    while len(seen) < steps:
        for batch in stream:
            loss = model(random_masking(batch, 0.5, (3, len(seen))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(batch.tile_indices.tolist())
            if len(seen) == steps:
                break
    weights = torch.cat([p.detach().ravel() for p in model.parameters()])
    kept = {"seen": seen, "state": stream.state_dict(), "weights": weights}
    torch.save(kept, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def replicated(encoder):
    # A modality may be in one process's batch and not in the other's.
    return DistributedDataParallel(encoder, find_unused_parameters=True)


def sharded(encoder):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (*encoder.stack.blocks, encoder):
        fully_shard(part, mesh=mesh)
    encoder.set_reduce_scatter_unused_params(True)
    return encoder


def encode_rank(rank, batches, folder, wrap, encoder):
    """Two steps on a batch of its own; keep outputs, gradients and the encoder after the steps."""
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=len(batches)
    )
    torch.set_num_threads(1)
    # What comes through a pipe shares memory with the other processes.
    model = wrap(copy.deepcopy(encoder))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = [step(model, optimizer, [batch]) for batch in batches[rank]]
    torch.save(kept, Path(folder) / f"{rank}.pt")
    getattr(model, "module", model).save_pretrained(Path(folder) / f"encoder{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def step(model, optimizer, batches):
    """Tokens of every batch, and gradients by parameter of the mean of their losses; one SGD step."""
    outputs = [model(batch) for batch in batches]
    loss = torch.stack([fixed_loss(encoded) for encoded in outputs]).mean()
    optimizer.zero_grad()
    loss.backward()
    gradients = {
        name.removeprefix("module."): whole(p.grad if p.grad is not None else torch.zeros_like(p))
        for name, p in model.named_parameters()
    }
    optimizer.step()
    return [encoded.tokens.detach() for encoded in outputs], gradients


def fixed_loss(encoded):
    weights = torch.linspace(-1, 1, encoded.tokens.shape[1])
    loss = (encoded.tokens * weights).square().mean()
    if encoded.class_tokens is not None:
        loss = loss + (encoded.class_tokens * weights).square().mean()
    return loss


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
