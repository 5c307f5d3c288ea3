"""Runs that start, stop, go on and end: what is in their folder is the same every time."""

import csv
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

from model.checkpoint import SafetensorsCheckpointIO, read_checkpoint
from model.config import EncoderConfig
from model.data import TileDataset
from model.encoder import APTEncoder
from model.objectives import MaskedPrediction, random_masking
from model.training import Pretraining, train
from model.training_config import TrainConfig
from pipeline.errors import ConfigError, StoreError
from pipeline.store import open_store

CONFIG = TrainConfig(steps=8, batch_tiles=4, warmup_steps=2, checkpoint_every=3, seed=5)


class Interruption(Exception):  # noqa: N818
    """What a killed job would be, as far as the files can tell."""


def interrupt_after(steps, error=Interruption):
    def observer(step, loss):
        if step == steps:
            raise error

    return observer


def ignore(step, loss):
    pass


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def seen():
    """(steps done, loss) as the observer of the finished run was told."""
    return []


@pytest.fixture(scope="module")
def finished(chip_store, tmp_path_factory, seen):
    """The folder of a run that nothing disturbed. Tests leave it as it is."""
    out = tmp_path_factory.mktemp("run") / "out"
    report = train(chip_store, out, CONFIG, lambda step, loss: seen.append((step, loss)))
    assert (report.steps, report.steps_now, report.out) == (CONFIG.steps, CONFIG.steps, out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def loss_rows(out):
    with (out / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_configuration_losses_checkpoint_and_encoder(finished, chip_store):
    assert sorted(content(finished)) == [
        "checkpoint.safetensors",
        "encoder/config.json",
        "encoder/model.safetensors",
        "loss.csv",
        "run.json",
    ]
    run = json.loads((finished / "run.json").read_text())
    assert TrainConfig.model_validate(run["train"]) == CONFIG
    assert run["data"] == open_store(chip_store).digest


def test_every_step_has_one_row_in_the_loss_file(finished, seen):
    rows = loss_rows(finished)
    assert [int(row["step"]) for row in rows] == list(range(CONFIG.steps))
    assert [(int(row["step"]) + 1, float(row["loss"])) for row in rows] == seen
    assert all(math.isfinite(float(row["loss"])) and int(row["tokens"]) > 0 for row in rows)


def test_the_learning_rate_of_a_row_is_the_one_its_step_used(finished):
    """Linear warm-up to the peak, then a half cosine to zero after the last step."""
    left = CONFIG.steps - CONFIG.warmup_steps
    shares = [(step + 1) / (CONFIG.warmup_steps + 1) for step in range(CONFIG.warmup_steps)]
    shares += [0.5 * (1 + math.cos(math.pi * step / left)) for step in range(left)]
    rates = [float(row["learning_rate"]) for row in loss_rows(finished)]
    assert rates == pytest.approx([CONFIG.learning_rate * share for share in shares])


def test_the_exported_encoder_is_the_trained_one(finished, chip_store):
    encoder = APTEncoder.from_pretrained(finished / "encoder")
    trained = read_checkpoint(finished / "checkpoint.safetensors")["state_dict"]
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, trained[f"objective.encoder.{name}"])
    assert encoder(TileDataset(chip_store).batch([0])).tokens.isfinite().all()


def test_training_moves_every_weight_but_the_targets(finished, chip_store):
    store = open_store(chip_store)
    encoder = EncoderConfig.for_store(store, size=CONFIG.size)
    torch.manual_seed(CONFIG.seed)
    initial = Pretraining(CONFIG, encoder).state_dict()
    trained = read_checkpoint(finished / "checkpoint.safetensors")["state_dict"]
    assert initial.keys() == trained.keys()
    same = [name for name in initial if torch.equal(initial[name], trained[name])]
    # What stands for absent bands begins at zero, and none is absent here.
    kept = ("targets_of", "band_absent")
    assert [name for name in same if not any(part in name for part in kept)] == []
    assert len(same) == len(kept)


@pytest.mark.parametrize(
    ("stops", "left"), [((1,), 8), ((3,), 8), ((5,), 5), ((8,), 2), ((2, 4, 7), 2)]
)
def test_an_interrupted_run_ends_like_one_that_was_not(chip_store, finished, tmp_path, stops, left):
    """Stopped before, just ahead of and after a checkpoint, at the last step, and again and again."""
    for stop in stops:
        with pytest.raises(Interruption):
            train(chip_store, tmp_path, CONFIG, interrupt_after(stop))
    assert train(chip_store, tmp_path, CONFIG, ignore).steps_now == left
    expected, found = content(finished), content(tmp_path)
    for name in ("loss.csv", "run.json", "encoder/config.json", "encoder/model.safetensors"):
        assert found[name] == expected[name], name


def test_a_run_with_a_token_budget_goes_on_like_any_other(chip_store, tmp_path):
    config = CONFIG.model_copy(update={"batch_tiles": None, "batch_tokens": 1000})
    train(chip_store, tmp_path / "whole", config, ignore)
    with pytest.raises(Interruption):
        train(chip_store, tmp_path / "stopped", config, interrupt_after(5))
    train(chip_store, tmp_path / "stopped", config, ignore)
    assert content(tmp_path / "stopped")["loss.csv"] == content(tmp_path / "whole")["loss.csv"]
    assert all(int(row["tokens"]) <= 1000 for row in loss_rows(tmp_path / "whole"))


def test_only_tiles_of_the_splits_are_trained_on(chip_store, tmp_path):
    with pytest.raises(ConfigError, match="train"):
        train(chip_store, tmp_path / "out", CONFIG.model_copy(update={"split": "train"}), ignore)
    assert not (tmp_path / "out").exists()


def test_data_that_changed_in_the_meantime_are_refused(chip_store, copy):
    """The folder's file says the same data, the stream's own state knows better."""
    checkpoint = read_checkpoint(copy / "checkpoint.safetensors")
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state["epoch"], state["step"]) == (2, 2)
    state["fingerprint"] = "0" * 64
    checkpoint["global_step"] = 6
    SafetensorsCheckpointIO().save_checkpoint(checkpoint, copy / "checkpoint.safetensors")
    before = content(copy)
    with pytest.raises(StoreError, match="made over other data"):
        train(chip_store, copy, CONFIG, ignore)
    assert content(copy) == before


def test_ctrl_c_is_an_interruption_like_any_other(chip_store, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(chip_store, tmp_path, CONFIG, interrupt_after(4, KeyboardInterrupt))
    train(chip_store, tmp_path, CONFIG, ignore)
    assert (tmp_path / "loss.csv").read_bytes() == (finished / "loss.csv").read_bytes()


def test_a_killed_process_leaves_a_run_that_goes_on(chip_store, tmp_path):
    """No `finally` runs, no buffer is written out."""
    script = """
import os, sys
from pathlib import Path
from model.training import train
from model.training_config import TrainConfig
config = TrainConfig.model_validate_json(sys.argv[3])
train(Path(sys.argv[1]), Path(sys.argv[2]), config, lambda step, loss: step == 7 and os._exit(9))
"""
    arguments = [chip_store, tmp_path, CONFIG.model_dump_json()]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert killed.returncode == 9
    assert train(chip_store, tmp_path, CONFIG, ignore).steps_now == 2
    assert [row["step"] for row in loss_rows(tmp_path)] == [str(i) for i in range(CONFIG.steps)]


def test_every_step_hides_other_tokens(chip_store, tmp_path, monkeypatch):
    seeds = []

    def recording(batch, share, seed):
        seeds.append(seed)
        return random_masking(batch, share, seed)

    monkeypatch.setattr("model.training.random_masking", recording)
    train(chip_store, tmp_path, CONFIG, ignore)
    assert len(set(seeds)) == len(seeds) == CONFIG.steps


def test_another_seed_is_another_run(chip_store, finished, tmp_path):
    train(chip_store, tmp_path, CONFIG.model_copy(update={"seed": 6}), ignore)
    assert loss_rows(tmp_path)[0]["loss"] != loss_rows(finished)[0]["loss"]


def test_a_finished_run_is_left_alone(chip_store, copy):
    before = content(copy)
    report = train(chip_store, copy, CONFIG, interrupt_after(1))
    assert (report.steps, report.steps_now) == (CONFIG.steps, 0)
    assert content(copy) == before
    losses = [float(row["loss"]) for row in loss_rows(copy)]
    assert (report.first_loss, report.last_loss) == (losses[0], losses[-1])


def test_a_run_killed_before_its_export_only_exports(chip_store, copy):
    before = content(copy)
    shutil.rmtree(copy / "encoder")
    assert train(chip_store, copy, CONFIG, interrupt_after(1)).steps_now == 0
    assert content(copy) == before


def test_a_run_killed_during_its_export_exports_again(chip_store, copy):
    before = content(copy)
    (copy / "encoder" / "config.json").unlink()
    assert train(chip_store, copy, CONFIG, interrupt_after(1)).steps_now == 0
    assert content(copy) == before


def test_a_run_killed_while_writing_losses_goes_on(chip_store, finished, tmp_path):
    with pytest.raises(Interruption):
        train(chip_store, tmp_path, CONFIG, interrupt_after(5))
    losses = tmp_path / "loss.csv"
    losses.write_bytes(losses.read_bytes()[:-25])
    train(chip_store, tmp_path, CONFIG, ignore)
    assert losses.read_bytes() == (finished / "loss.csv").read_bytes()


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"steps": 9}, {"size": "tiny"}, {"learning_rate": 1e-3}]
)
def test_another_configuration_is_refused_and_nothing_changes(chip_store, copy, change):
    before = content(copy)
    with pytest.raises(StoreError, match="holds a run of another configuration") as refused:
        train(chip_store, copy, CONFIG.model_copy(update=change), ignore)
    (name, value), message = *change.items(), str(refused.value)
    assert str(copy) in message
    assert f"({name} {getattr(CONFIG, name)}, not {value})" in message
    assert content(copy) == before


@pytest.mark.parametrize("run", ['{"train": {}, "data": "other"}', "[]", "not JSON", "\xff\x00"])
def test_other_data_is_refused_and_nothing_changes(chip_store, copy, run):
    (copy / "run.json").write_text(run, encoding="latin-1")
    before = content(copy)
    with pytest.raises(StoreError, match="holds (a run of other data|an unreadable run.json)"):
        train(chip_store, copy, CONFIG, ignore)
    assert content(copy) == before


def test_a_folder_of_something_else_is_refused_and_nothing_changes(chip_store, tmp_path):
    (tmp_path / "thesis.txt").write_text("five years of work")
    before = content(tmp_path)
    with pytest.raises(StoreError, match="holds no run of aptile") as refused:
        train(chip_store, tmp_path, CONFIG, ignore)
    assert str(tmp_path) in str(refused.value)
    assert content(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(chip_store, tmp_path):
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(StoreError, match="holds no run of aptile"):
        train(chip_store, out, CONFIG, ignore)
    assert out.read_text() == "a file"


def test_a_damaged_checkpoint_is_named_and_nothing_changes(chip_store, copy):
    checkpoint = copy / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    before = content(copy)
    with pytest.raises(StoreError, match=r"checkpoint\.safetensors: not a checkpoint"):
        train(chip_store, copy, CONFIG, ignore)
    assert content(copy) == before


def test_a_store_that_is_none_leaves_no_folder_behind(tmp_path):
    with pytest.raises(StoreError, match="no aptile store"):
        train(tmp_path, tmp_path / "out", CONFIG, ignore)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"warmup_steps": 8}, "warmup_steps is 8; it must be below steps, 8"),
        ({"steps": 0}, "steps"),
        ({"hidden_share": 1.0}, "hidden_share"),
        ({"batch_tokens": 4096}, "batch_tokens is 4096 and batch_tiles is 4; give one of them"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_a_configuration_that_cannot_train_is_refused(change, expected):
    with pytest.raises(ValueError, match=expected):
        TrainConfig.model_validate({**CONFIG.model_dump(), **change})


def test_a_step_in_mixed_precision_is_finite_and_near_the_full_one(chip_store):
    dataset = TileDataset(chip_store)
    batch = dataset.batch([0, 1, 2])
    torch.manual_seed(0)
    objective = MaskedPrediction(APTEncoder(EncoderConfig.for_store(dataset.store)))
    masked = random_masking(batch, 0.5, (0, 1))
    full = objective(masked).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(masked)
    loss.backward()
    assert torch.allclose(loss.detach(), full, rtol=0.02)
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
