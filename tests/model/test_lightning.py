"""Streams in Lightning's own loop, over epochs that differ in their number of steps."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from model.data.sampling import Sampling
from model.data.stream import BatchStream
from streams import numbered, taken

# Another tenth of the tiles in every epoch, so that their numbers of steps differ.
SOME = Sampling(np.ones(500), tiles_per_epoch=50)


def stream_of_some():
    return BatchStream(numbered(500), batch_tokens=400, seed=5, sampling=SOME)


class Interruption(Exception):  # noqa: N818
    """Ends a run in the middle."""


class Seeing(pl.LightningModule):
    """Learns nothing, and remembers the tiles of its batches."""

    def __init__(self, stop=None, every=None, path=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.stop, self.every, self.path = [], stop, every, path

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch, batch_index):
        self.seen.append(batch.tiles)
        return self.weight * 0.0

    def on_train_batch_end(self, outputs, batch, batch_index):
        if self.trainer.global_step == self.stop:
            self.trainer.save_checkpoint(self.path)
            raise Interruption

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, stream, resume=None, **limit):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        **limit,
    )
    trainer.fit(module, stream, ckpt_path=resume)
    stream.close()


@pytest.fixture(scope="module")
def epochs():
    """Tiles of every step of three epochs, as a plain loop sees them."""
    stream = stream_of_some()
    batches = [taken(stream) for _ in range(3)]
    stream.close()
    assert len({len(steps) for steps in batches}) == 3, [len(steps) for steps in batches]
    return batches


@pytest.mark.filterwarnings("ignore")
def test_epochs_of_lightning_are_those_of_the_stream(epochs):
    module = Seeing()
    fit(module, stream_of_some(), max_epochs=3)
    assert module.seen == sum(epochs, [])  # noqa: RUF017


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", ["the middle", "the end of an epoch", "a start", "a late epoch"])
def test_a_checkpoint_of_lightning_resumes_in_the_middle_of_an_epoch(epochs, tmp_path, at):
    first, second = len(epochs[0]), len(epochs[1])
    stop = {
        "the middle": first // 2,
        "the end of an epoch": first,
        "a start": first + 1,
        "a late epoch": first + second + 3,
    }[at]
    stopped = Seeing(stop=stop, path=tmp_path / "checkpoint")
    whole = sum(epochs, [])  # noqa: RUF017
    with pytest.raises(Interruption):
        fit(stopped, stream_of_some(), max_steps=len(whole))
    again = Seeing()
    stream = stream_of_some()
    fit(again, stream, tmp_path / "checkpoint", max_steps=len(whole))
    assert stopped.seen + again.seen == whole
