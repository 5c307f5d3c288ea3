"""Pretraining runs: the Lightning module, checkpoints and the loss file.

A run's folder holds `run.json` (configuration and the identity of the data), `checkpoint.safetensors`
(everything needed to go on), `loss.csv` and, at the end, `encoder/`.
"""

import csv
import json
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from model.batch import TokenBatch
from model.checkpoint import SafetensorsCheckpointIO, read_checkpoint
from model.config import EncoderConfig
from model.data import BatchStream, TileDataset
from model.encoder import APTEncoder
from model.objectives import MaskedPrediction, random_masking
from model.pretrained import CONFIG_FILE
from model.training_config import TrainConfig, check_fits, chosen_precision
from pipeline.errors import StoreError
from pipeline.settings.canonical import canonical_json
from pipeline.storage.objects import Location
from pipeline.store import open_store

CHECKPOINT, LOSS_FILE, RUN_FILE, ENCODER = (
    "checkpoint.safetensors",
    "loss.csv",
    "run.json",
    "encoder",
)
_LOSS_COLUMNS = ("step", "loss", "tokens", "learning_rate")


@dataclass(frozen=True)
class TrainReport:
    """Where a run stands: steps done in all and now, and the first and last mean loss.

    The losses are means over the first and last tenth of the run's steps.
    """

    out: Path
    steps: int
    steps_now: int
    first_loss: float
    last_loss: float


class Pretraining(pl.LightningModule):
    """Masked prediction with AdamW, linear warm-up and cosine decay."""

    def __init__(self, config: TrainConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.objective = MaskedPrediction(APTEncoder(encoder))

    def training_step(self, batch: TokenBatch, batch_index: int) -> dict[str, Any]:
        # What layers draw depends on the step alone, so that a run that was stopped goes on the same.
        torch.manual_seed(self._seed_of_step)
        return {"loss": self.objective(batch), "tokens": batch.num_tokens}

    def on_before_batch_transfer(self, batch: TokenBatch, dataloader_idx: int) -> TokenBatch:
        # Masks are drawn on the CPU; a GPU would have to be waited for.
        return random_masking(batch, self.config.hidden_share, (self.config.seed, self.global_step))

    def transfer_batch_to_device(
        self, batch: TokenBatch, device: torch.device, dataloader_idx: int
    ) -> TokenBatch:
        return batch.to(device, non_blocking=True)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def _seed_of_step(self) -> int:
        words = np.random.SeedSequence((self.config.seed, self.global_step)).generate_state(2)
        return int(words[0]) << 32 | int(words[1])

    def _rate(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        warmup, steps = self.config.warmup_steps, self.config.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class RunFiles(Callback):
    """Appends every step's loss to `loss.csv`, saves checkpoints, tells an observer."""

    def __init__(self, out: Path, every: int, observer: Callable[[int, float], None]) -> None:
        self.out, self.every, self.observer = out, every, observer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Steps after the checkpoint are about to be done again.
        kept = [row for row in _loss_rows(self.out) if int(row[0]) < trainer.global_step]
        self._file = (self.out / LOSS_FILE).open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(_LOSS_COLUMNS)
        self._writer.writerows(kept)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TokenBatch, batch_idx: int
    ) -> None:
        # At the end of the batch the schedule has moved on already.
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TokenBatch,
        batch_idx: int,
    ) -> None:
        loss = float(outputs["loss"])
        self._writer.writerow((trainer.global_step - 1, loss, outputs["tokens"], self._rate))
        self.observer(trainer.global_step, loss)
        if trainer.global_step % self.every == 0:
            self._file.flush()
            trainer.save_checkpoint(self.out / CHECKPOINT)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._file.close()
        trainer.save_checkpoint(self.out / CHECKPOINT)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._file.close()


def train(
    store: Location, out: Path, config: TrainConfig, observer: Callable[[int, float], None]
) -> TrainReport:
    """Train, or go on with, a run in folder `out`; a finished run is left alone.

    `observer` gets the steps done and the loss after every step. Raises StoreError if `out` holds
    something else, or a run of another configuration or other data.
    """
    opened = open_store(store)
    chosen_precision(config.precision)
    dataset = TileDataset(
        opened, config.partition, config.modalities, config.split, augment=config.augment
    )
    if len(dataset) == 0:
        raise StoreError(f"{store}: the store has no tiles to train from")
    encoder = EncoderConfig.for_store(
        opened, config.modalities, config.size, **config.encoder.model_dump()
    )
    check_fits(encoder, dataset)
    _claim_folder(out, config, encoder, opened.digest)
    done = _steps_done(out)
    # A run that was killed between its last checkpoint and its export still lacks the encoder.
    if done < config.steps or not (out / ENCODER / CONFIG_FILE).exists():
        _fit(dataset, out, config, encoder, done, observer)
    losses = [float(row[1]) for row in _loss_rows(out)]
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth], losses[-tenth:]
    return TrainReport(
        out, config.steps, config.steps - done, sum(first) / tenth, sum(last) / tenth
    )


def _fit(
    dataset: TileDataset,
    out: Path,
    config: TrainConfig,
    encoder: EncoderConfig,
    done: int,
    observer: Callable[[int, float], None],
) -> None:
    stream = BatchStream(
        dataset,
        batch_tokens=config.batch_tokens,
        batch_tiles=config.tiles_per_step,
        seed=config.seed,
    )
    if done:
        # Lightning asks how long the epoch is before it hands the state back.
        stream.load_state_dict(_stream_state(out))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*|torch\..*")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        pl.seed_everything(config.seed, verbose=False)
        trainer = pl.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=1,
            precision=chosen_precision(config.precision),
            max_steps=config.steps,
            # Epochs of a token budget differ in their number of steps.
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RunFiles(out, config.checkpoint_every, observer)],
            plugins=[SafetensorsCheckpointIO()],
        )
        module = Pretraining(config, encoder)
        if config.compile:
            module.objective.compile_blocks()
        try:
            trainer.fit(module, stream, ckpt_path=str(out / CHECKPOINT) if done else None)
        except SystemExit:
            # Lightning turns Ctrl-C into an exit of its own.
            raise KeyboardInterrupt from None
        finally:
            stream.close()
    module.objective.encoder.save_pretrained(out / ENCODER)


def _claim_folder(out: Path, config: TrainConfig, encoder: EncoderConfig, digest: str) -> None:
    """Write `run.json`, or check that the one there says the same."""
    run = {"train": config.model_dump(), "encoder": encoder.model_dump(), "data": digest}
    wanted = json.loads(canonical_json(run))
    file = out / RUN_FILE
    if file.exists():
        try:
            found = json.loads(file.read_bytes())
        except ValueError:
            found = None
        if found != wanted:
            raise StoreError(
                f"{out} holds {_what_differs(found, wanted)}; give a new folder with --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} exists and holds no run of aptile; give a new folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=2) + "\n")
    except OSError as error:
        raise StoreError(
            f"{out}: cannot write the run here: {error.strerror}; give a folder you may write to"
        ) from None


def _what_differs(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return f"an unreadable {RUN_FILE}"
    if found.get("data") != wanted["data"]:
        return "a run of other data"
    told = found.get("train")
    then, now = told if isinstance(told, dict) else {}, wanted["train"]
    other = [name for name in now if then.get(name) != now[name]]
    changes = [f"{name} {then.get(name)!s:.80}, not {now[name]!s:.80}" for name in other]
    # With the same settings the encoder's own may differ: defaults of another version of aptile.
    return f"a run of another configuration ({'; '.join(changes) or 'of the encoder'})"


def _steps_done(out: Path) -> int:
    path = out / CHECKPOINT
    return int(read_checkpoint(path, with_tensors=False)["global_step"]) if path.exists() else 0


def _stream_state(out: Path) -> dict[str, Any]:
    """Where the stream of batches was at the last checkpoint."""
    checkpoint = read_checkpoint(out / CHECKPOINT, with_tensors=False)
    return checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]


def _loss_rows(out: Path) -> list[list[str]]:
    """Rows of the loss file without its header; a torn last row does not count."""
    path = out / LOSS_FILE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == len(_LOSS_COLUMNS)]
