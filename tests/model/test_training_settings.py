"""Runs over modalities and dates, with options of the encoder, augmentation and precision."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from how_to import HOW_TO
from model.checkpoint import read_checkpoint
from model.encoder import APTEncoder
from model.training import train
from model.training_config import TrainConfig, attention_name, chosen_precision
from pipeline.errors import ConfigError, StoreError
from pipeline.jobs.job import run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from sentinels import CONFIG, make_archive
from support import Watching, aptile

OPTIONS = {
    "position": "rotary",
    "sequences": "date",
    "class_token": True,
    "register_tokens": 1,
    "drop_path": 0.3,
    "qk_norm": True,
    "merge_init": "zero",
    "mlp": "swiglu",
}
SETTINGS = {
    "steps": 6,
    "warmup_steps": 1,
    "batch_tiles": 2,
    "checkpoint_every": 2,
    "seed": 3,
    "encoder": OPTIONS,
    "augment": {"flips": True, "rotations": True, "drop_dates": 0.3, "drop_bands": 0.3},
}


class Interruption(Exception):  # noqa: N818
    """What a killed job would be, as far as the files can tell."""


def ignore(step, loss):
    pass


def run(store, out, observer=ignore, **changes):
    return train(store, out, TrainConfig.model_validate({**SETTINGS, **changes}), observer)


def losses(out):
    with (out / "loss.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Seven tiles of s2 in three band sets and up to three dates, s1, and a static dem."""
    folder = tmp_path_factory.mktemp("settings")
    make_archive(folder / "archive")
    (folder / "config.yaml").write_text(CONFIG)
    config = load_config(PreprocessConfig, folder / "config.yaml", ["run.workers=1"])
    run_job(str(folder / "archive"), folder / "store", config, Watching())
    return folder / "store"


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    run(store, out)
    return out


def test_a_run_reads_all_modalities_with_all_band_sets(finished):
    config = APTEncoder.from_pretrained(finished / "encoder").config
    sets = {m.name: [s.name for s in m.band_sets] for m in config.modalities}
    assert sets == {"s2": ["", "20m", "60m"], "s1": [""], "dem": [""]}
    assert {key: getattr(config, key) for key in OPTIONS} == OPTIONS
    run = json.loads((finished / "run.json").read_text())
    assert TrainConfig.model_validate(run["train"]) == TrainConfig.model_validate(SETTINGS)


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_stopped_run_ends_in_the_same_bytes_whatever_is_drawn(store, finished, tmp_path, stop):
    """Turns, dates, bands, masks and left-out branches are drawn anew for steps that are done again."""

    def interrupt(step, loss):
        if step == stop:
            raise Interruption

    with pytest.raises(Interruption):
        run(store, tmp_path, interrupt)
    torch.rand(7)
    run(store, tmp_path)
    for name in ("loss.csv", "encoder/config.json", "encoder/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_only_the_modalities_named_are_read(store, tmp_path):
    run(store, tmp_path, modalities=["s1", "dem"], encoder={}, augment=None, steps=2)
    config = APTEncoder.from_pretrained(tmp_path / "encoder").config
    assert [m.name for m in config.modalities] == ["s1", "dem"]


@pytest.fixture(scope="module")
def aligned(real_data, tmp_path_factory):
    """Two real places with Sentinel-2 twice, Sentinel-1 and elevation."""
    path, config = tmp_path_factory.mktemp("aligned") / "store", HOW_TO / "terramind.yaml"
    archive = real_data / "terramind"
    assert aptile("preprocess", archive, path, "--config", config, "--workers", 1) == 0
    return path


# One quickly learned modality; all of them take longer.
REAL_RUNS = [(["dem"], 80), pytest.param(None, 300, marks=pytest.mark.full)]


@pytest.mark.parametrize(("modalities", "steps"), REAL_RUNS)
def test_the_loss_falls_on_real_imagery(aligned, tmp_path, modalities, steps):
    changes = {"encoder": {}, "augment": None, "batch_tiles": 1, "checkpoint_every": 100}
    report = run(aligned, tmp_path, modalities=modalities, steps=steps, **changes)
    config = APTEncoder.from_pretrained(tmp_path / "encoder").config
    names = modalities or ["s2_l2a", "s2_l1c", "s1_rtc", "dem"]
    assert [m.name for m in config.modalities] == names
    assert report.last_loss < 0.93 * report.first_loss


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": {}},
        {"encoder": {**OPTIONS, "register_tokens": 2}},
        {"augment": None},
        {"modalities": ["s2"]},
        {"precision": "bf16-mixed"},
        {"compile": True},
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(store, finished, change):
    before = (finished / "run.json").read_bytes()
    with pytest.raises(StoreError, match="holds a run of another configuration"):
        run(store, finished, **change)
    assert (finished / "run.json").read_bytes() == before


def test_a_run_in_16_bits_is_another_one_and_finite(store, finished, tmp_path):
    run(store, tmp_path, precision="bf16-mixed")
    found = losses(tmp_path)
    assert torch.tensor(found).isfinite().all()
    assert found != losses(finished)
    assert found == pytest.approx(losses(finished), rel=0.2)


@pytest.mark.full
def test_a_compiled_run_learns_the_same(store, tmp_path):
    plain = {"encoder": {}, "augment": None}
    run(store, tmp_path / "compiled", compile=True, **plain)
    run(store, tmp_path / "plain", **plain)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    states = [
        read_checkpoint(tmp_path / n / "checkpoint.safetensors") for n in ("compiled", "plain")
    ]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"encoder": {"global_every": 2}},
            "global_every is 2, which has no effect without windows",
        ),
        ({"encoder": {"width": 64}}, "encoder.width"),
        (
            {"encoder": {"windows": 2, "global_every": 6}},
            "encoder: global_every is 6, and no block of 4 would be global",
        ),
        ({"encoder": {"position_cells": [4, 4]}}, "no effect with position 'sincos'"),
        ({"augment": {}}, "everything is off"),
        ({"precision": "64-true"}, "precision"),
        ({"modalities": []}, "modalities"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(change, expected):
    with pytest.raises(ValueError, match=expected):
        TrainConfig.model_validate({**SETTINGS, **change})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"modalities": ["s3"]}, "s3"),
        ({"modalities": ["dem"]}, "drop_dates is 0.3, and no tile has more than one date"),
        ({"encoder": {"windows": 5, "global_every": 2}}, "windows is 5"),
    ],
)
def test_what_the_store_cannot_do_is_said_and_leaves_no_folder(store, tmp_path, change, expected):
    with pytest.raises(ConfigError, match=expected):
        run(store, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"sequences": "date"}, "sequences is date, and no tile has more than one date"),
        ({"season": "day_of_year"}, "season is day_of_year, and no date of a tile is known"),
        ({"location_token": True}, "location_token is true, and no tile's place on Earth is known"),
    ],
)
def test_options_of_what_no_tile_has_are_refused(chip_store, tmp_path, option, expected):
    with pytest.raises(ConfigError, match=expected):
        run(chip_store, tmp_path / "out", encoder=option, augment=None)
    assert not (tmp_path / "out").exists()


def test_dates_and_places_that_tiles_have_are_used(store, tmp_path):
    options = {"season": "day_of_year", "location_token": True, "sequences": "date"}
    run(store, tmp_path, encoder=options, steps=2)


def test_settings_come_from_files_and_the_command_line(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("encoder: {class_token: true, layer_scale: 0.1}\naugment: {flips: true}\n")
    config = load_config(TrainConfig, file, ["encoder.layer_scale=0.2", "augment.rotations=true"])
    assert (config.encoder.class_token, config.encoder.layer_scale) == (True, 0.2)
    assert (config.augment.flips, config.augment.rotations) == (True, True)
    with pytest.raises(ConfigError, match=r"train\.yaml: .*encoder.*global_every is 2.*windows"):
        load_config(TrainConfig, file, ["encoder.global_every=2"])
    with pytest.raises(ConfigError, match=r"encoder\.depht"):
        load_config(TrainConfig, file, ["encoder.depht=2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_precision_without_a_gpu():
    assert (chosen_precision(None), attention_name()) == ("32-true", "on_cpu")
    assert chosen_precision("bf16-mixed") == "bf16-mixed"
    with pytest.raises(ConfigError, match="16-mixed, which needs a CUDA device"):
        chosen_precision("16-mixed")


def test_attention_is_what_the_command_says(store, tmp_path):
    command = [sys.executable, "-m", "workflows.cli", "train", store, "--out", tmp_path / "out"]
    options = ["--set", "steps=1", "--set", "warmup_steps=0", "--set", "encoder.class_token=true"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"attention: {attention_name()}" in done.stderr
