"""`aptile repartition` and what `aptile inspect` shows of it, as a user calls them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pipeline import open_store
from support import aptile, assert_same_bytes

pytestmark = pytest.mark.usefixtures("kept_workers")


@pytest.fixture
def store(chip_store, tmp_path):
    return shutil.copytree(chip_store, tmp_path / "store")


def test_a_budget_from_the_command_line(store, capsys):
    assert aptile("repartition", store, "--name", "lean", "--tokens-per-tile", 100, "--json") == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["rule"] == {"tokens_per_tile": 100}
    assert (report["tiles"], report["shards"], report["shards_written"]) == (9, 1, 1)
    assert "partition lean by tokens_per_tile 100" in shown.err
    assert aptile("repartition", store, "--name", "lean", "--tokens-per-tile", 100) == 0
    assert "complete already, nothing to do" in capsys.readouterr().err
    tokens = open_store(store).partition("lean").tokens.sum(1)[:9]
    assert (tokens <= 100).all()
    # Whole tiles reach their budget up to a split's three tokens.
    assert tokens[[0, 1, 3, 4]].min() >= 98


def test_the_same_store_by_preprocess_and_by_repartition(chip_archive, store, tmp_path):
    for name, setting, option in (
        ("budget", "tokens_per_tile=100", ("--tokens-per-tile", 100)),
        ("uniform", "uniform_px=8", ("--uniform-px", 8)),
        ("fixed", "thresholds=[-.inf, 2.5]", ("--thresholds", "-inf,2.5")),
    ):
        fresh = tmp_path / name
        setting = f"partition.{setting}"
        assert aptile("preprocess", chip_archive, fresh, "--workers", 1, "--set", setting) == 0
        assert aptile("repartition", store, "--name", name, *option) == 0
        partitions = store / "image" / "partitions"
        for array in ("scales", "counts", "tokens"):
            default = fresh / "image" / "partitions" / "default" / array
            assert_same_bytes(default, partitions / name / array)
        assert open_store(fresh).partition("default").rule == open_store(store).partition(name).rule
        rows = open_store(fresh).manifest.to_pylist()
        expected = {"budget": [], "uniform": [np.inf, -np.inf], "fixed": [-np.inf, 2.5]}[name]
        assert rows[0]["image"]["thresholds"] == [expected]


def test_a_mean_is_met(store, capsys):
    assert aptile("repartition", store, "--name", "m", "--mean-tokens", 200, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.99 * 200 <= report["mean_tokens"] <= 200
    assert len(report["thresholds"]) == 2
    tokens = open_store(store).partition("m").tokens
    assert tokens.sum() / 9 == report["mean_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no rule given; give one of --thresholds, --tokens-per-tile"),
        (["--quantile", 0.5, "--uniform-px", 8], "uniform_px has no effect beside quantile"),
        (["--quantile", 2], "repartition: quantile is 2.0; input should be less than 1"),
        (["--tokens-per-tile", 0], "repartition: tokens_per_tile is 0"),
        (["--thresholds", "1,x"], "expected numbers separated by commas, for example 0.8,1.5"),
        (["--thresholds", "1"], "has 1 values [1.0]; 3 scales need 2, fine to coarse"),
        (["--thresholds", "1,7"], "thresholds[1] is 7.0; a patch of 16 px scores at most 5"),
        (["--thresholds", "nan,1"], "thresholds[0] is nan"),
        (["--uniform-px", 6], "this quadtree has patches of 4, 8, 16 px"),
        (["--mean-tokens", 1], "mean_tokens is 1; these tiles have between"),
        (["--mean-tokens", "nan"], "repartition: mean_tokens is nan"),
        (["--quantile", 0.5, "--shared", "max"], "shared max has no effect: every tile of"),
        (["--uniform-px", 8, "--shared", "max"], "shared has no effect with uniform_px"),
        (["--quantile", 0.5, "--shared", "min"], "Invalid value"),
        (["--uniform-px", 8, "--workers", 0], "repartition: workers is 0"),
        (["--uniform-px", 8, "--workers", 2, "--scheduler", "tcp://x:1"], "has no effect beside"),
        (["--uniform-px", 8, "--name", "default"], "the partition `aptile preprocess` made"),
        (["--uniform-px", 8, "--name", "../up"], "a partition's name is a letter"),
        (["--uniform-px", 8, "--name", ""], "a partition's name is a letter"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_rules_and_names_are_refused_and_nothing_is_made(
    chip_store, capsys, options, message
):
    before = sorted(path.name for path in (chip_store / "image" / "partitions").iterdir())
    name = [] if "--name" in options else ["--name", "new"]
    assert aptile("repartition", chip_store, *name, *options) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert message in shown.err
    after = sorted(path.name for path in (chip_store / "image" / "partitions").iterdir())
    assert after == before


def test_what_is_no_committed_store_is_refused(store, tmp_path, capsys):
    assert aptile("repartition", tmp_path / "none", "--name", "a", "--uniform-px", 8) == 2
    assert "no aptile store here" in capsys.readouterr().err
    (store / "COMMIT.json").unlink()
    assert aptile("repartition", store, "--name", "a", "--uniform-px", 8) == 2
    assert "has not finished" in capsys.readouterr().err


def test_another_rule_under_a_taken_name_is_refused(store, capsys):
    assert aptile("repartition", store, "--name", "a", "--uniform-px", 8) == 0
    capsys.readouterr()
    assert aptile("repartition", store, "--name", "a", "--uniform-px", 4) == 2
    assert "made by uniform_px 8, not by uniform_px 4; use that rule, or" in capsys.readouterr().err


def test_inspect_shows_a_partition(store, tmp_path, capsys):
    assert aptile("repartition", store, "--name", "lean", "--tokens-per-tile", 100) == 0
    assert aptile("inspect", store, "--partition", "lean", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["partition"], content["rule"]) == ("lean", {"tokens_per_tile": 100})
    assert content["tokens_per_tile"]["max"] == 100
    assert content["tokens"] == open_store(store).partition("lean").tokens.sum()
    png = tmp_path / "tile.png"
    tile = "sentinel2_chip/r0c0"
    assert aptile("inspect", store, tile, "--partition", "lean", "--png", png) == 0
    assert "partition        lean: tokens_per_tile 100" in capsys.readouterr().out
    assert png.stat().st_size > 10_000
    assert aptile("inspect", store, "--partition", "fat") == 2
    assert "no partition 'fat'; there are default, lean" in capsys.readouterr().err


def test_inspect_shows_the_curve(chip_store, tmp_path, capsys):
    png = tmp_path / "curve.png"
    assert aptile("inspect", chip_store, "--curve", "--json", "--png", png) == 0
    content = json.loads(capsys.readouterr().out)
    means = [row["mean_tokens"] for row in content["curve"]]
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(75 * 75 / 9)
    assert content["curve"][-1]["thresholds"] == ["inf", "inf"]
    assert png.stat().st_size > 10_000
    assert aptile("inspect", chip_store, "--curve") == 0
    text = capsys.readouterr().out
    assert "threshold 16 px" in text
    assert f"{means[10]:.2f}" in text
    assert aptile("inspect", chip_store, "--curve", "--partition", "a") == 2
    assert "--curve is about all tiles" in capsys.readouterr().err
    assert aptile("inspect", chip_store, "--curve", "--png", "nowhere/x.png") == 2
    assert "cannot write the picture" in capsys.readouterr().err


def test_repartition_needs_no_archive_library(store):
    """Scores are stored: rasterio's readers are never called, and torch is not needed."""
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'rasterio', 'matplotlib', 'skimage', 'xarray'):\n"
        "    sys.modules[name] = None\n"
        "from workflows.cli import main\n"
        f"main(['repartition', {str(store)!r}, '--name', 'a', '--uniform-px', '8'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
