"""Commands as a new user calls them, mostly with something wrong."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

from support import aptile, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")


@pytest.fixture
def archive(tmp_path):
    save_scene(tmp_path / "scenes" / "a.tif", textured((3, 64, 64)))
    return tmp_path / "scenes"


def refusal(capsys) -> str:
    """The one line on stderr; nothing may be on stdout."""
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("aptile: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "partition.treshold=[1]"], "unknown key 'partition.treshold'; did you mean"),
        (["--set", "partition.thresholds=[0.5]"], "has 1 values [0.5]; 3 scales need 2"),
        (["--set", "partition.thresholds=[0.5, 7]"], "scores at most 5 with"),
        (
            ["--set", "partition.base_patch_size=5"],
            "must be a multiple of the largest patch, 20 px",
        ),
        (["--set", "nonsense"], "expected key=value"),
        (["--config", "missing.yaml"], "missing.yaml: cannot read the configuration"),
        (["--preset", "landsat"], "preset 'landsat' is not known"),
        (["--workers", "0"], "run.workers is 0"),
        (["--workers", "two"], "Invalid value"),
        (["--colour"], "--colour"),
        (["--preset", "s2_l2a"], "none of the 1 scenes can be used; the first, a: has 3 bands"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_and_nothing_is_made(
    archive, capsys, tmp_path, options, message
):
    assert aptile("preprocess", archive, tmp_path / "store", *options) == 2
    assert message in refusal(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def folder_of(name, content):
    def make(tmp_path):
        (tmp_path / "scenes").mkdir()
        (tmp_path / "scenes" / name).write_bytes(content)

    return make


def different_bands(tmp_path):
    save_scene(tmp_path / "scenes" / "a.tif", textured((3, 64, 64)))
    save_scene(tmp_path / "scenes" / "b.tif", textured((4, 64, 64)))


def truncated(tmp_path):
    whole = save_scene(tmp_path / "scenes" / "a.tif", textured((3, 64, 64)), compress="deflate")
    whole.write_bytes(whole.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path: None, "no such folder"),
        (lambda tmp_path: (tmp_path / "scenes").mkdir(), "no scene found"),
        (folder_of("a.tif", b"just text"), "scenes/a.tif' not recognized"),
        (truncated, "none of the 1 scenes can be used; the first, a: "),
        (
            different_bands,
            "differ in their bands: band_1, band_2, band_3 (a), band_1, band_2, band_3, band_4 (b)",
        ),
    ],
    ids=["missing folder", "empty folder", "text", "truncated", "different bands"],
)
def test_wrong_archives_are_refused_and_nothing_is_made(
    tmp_path, monkeypatch, capsys, make, message
):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert aptile("preprocess", "scenes", "store", "--workers", 1) == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["other folder", "file", "below a file"])
def test_wrong_store_paths_are_refused_and_left_as_they_are(archive, tmp_path, capsys, kind):
    path = tmp_path / "taken"
    if kind == "other folder":
        path.mkdir()
        (path / "thesis.docx").write_text("precious")
    else:
        path.write_text("precious")
    store = path / "store" if kind == "below a file" else path
    assert aptile("preprocess", archive, store) == 2
    expected = {
        "other folder": "exists and is no aptile store (it holds 'thesis.docx')",
        "file": "is a file; give a path for a new store",
        "below a file": "give a path you may write to",
    }
    assert expected[kind] in refusal(capsys)
    kept = path / "thesis.docx" if kind == "other folder" else path
    assert kept.read_text() == "precious"


def test_the_current_folder_is_no_store(archive, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert aptile("preprocess", archive, ".") == 2
    assert "is the current folder; give a name for the store" in refusal(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(archive, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert aptile("preprocess", archive, tmp_path / "closed" / "store") == 2
    assert "give a path you may write to" in refusal(capsys)


def test_quarantine_ends_with_exit_code_3_and_is_listed(archive, tmp_path, capsys):
    (archive / "text.tif").write_text("just text")
    store = tmp_path / "store"
    assert aptile("preprocess", archive, store, "--json", "--workers", 1) == 3
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (report["inputs"], report["done"], list(report["quarantined"])) == (2, 1, ["text"])
    assert "quarantined text: " in shown.err
    assert "2 inputs = 1 done + 1 quarantined" in shown.err
    assert aptile("preprocess", archive, store) == 3
    assert "complete already, nothing to do" in capsys.readouterr().err
    assert aptile("inspect", store, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["quarantined"]) == ["text"]


def test_another_configuration_on_the_same_store_is_refused(chip_archive, chip_store, capsys):
    assert aptile("preprocess", chip_archive, chip_store, "--set", "scoring.num_bins=16") == 2
    assert "scoring.num_bins is 32 there and 16 now" in refusal(capsys)


def test_dry_run_plans_and_writes_nothing(archive, tmp_path, capsys):
    assert aptile("preprocess", archive, tmp_path / "store", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["inputs"], plan["planned"], plan["tiles"], plan["shards"]) == (1, 1, 1, 1)
    assert plan["modalities"]["image"]["scored_bands"] == ["band_1", "band_2", "band_3"]
    assert not (tmp_path / "store").exists()


def test_inspect_shows_the_same_numbers_as_text_and_json(chip_store, capsys):
    assert aptile("inspect", chip_store, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert aptile("inspect", chip_store) == 0
    text = capsys.readouterr().out
    assert content["tiles"] == 9
    assert content["uniform_base_tokens"] == 75 * 75
    assert content["tokens"] == sum(tile["tokens"] for tile in content["per_tile"])
    assert sum(size["share_of_area"] for size in content["patch_sizes"]) == pytest.approx(1)
    assert f"tokens           {content['tokens']} of 5625" in text
    assert f"valid pixels     {300 * 300 / (384 * 384):.1%}" in text
    for size in content["patch_sizes"]:
        assert f"{size['size_px']} px" in text


def test_inspect_draws_a_tile(chip_store, tmp_path, capsys):
    from matplotlib.image import imread

    png = tmp_path / "tile.png"
    assert aptile("inspect", chip_store, "sentinel2_chip/r2c1", "--png", png) == 0
    assert "tiles            1" in capsys.readouterr().out
    picture = imread(png)
    assert picture.shape[1] > 4 * picture.shape[0]
    magenta = np.isclose(picture[..., :3], (1, 0, 1), atol=0.02).all(-1).mean()
    assert 0.05 < magenta < 0.5
    yellow = (picture[..., :2].min(-1) - picture[..., 2] > 0.4).mean()
    assert yellow > 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no aptile store here; make one with `aptile preprocess`"),
        (["STORE", "r9"], "no tile 'r9'; there are 9"),
        (["STORE", "--png", "x.png"], "--png needs a tile to draw; for example: aptile inspect"),
        (["STORE", "sentinel2_chip/r0c0", "--png", "nowhere/x.png"], "cannot write the picture"),
        (["STORE", "sentinel2_chip/r0c0", "--png", "x.what"], "cannot write the picture"),
    ],
)
def test_inspect_refuses_in_words(chip_store, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert aptile("inspect", *(chip_store if a == "STORE" else a for a in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "run"], "no aptile store here"),
        (["STORE"], "--out"),
        (["STORE", "--out", "run", "--set", "step=3"], "unknown key 'step'; did you mean 'steps'?"),
        (["STORE", "--out", "run", "--set", "size=huge"], "size is 'huge'"),
        (["STORE", "--out", "run", "--set", "steps=5"], "warmup_steps is 20; it must be below"),
        (["STORE", "--out", "taken"], "taken exists and holds no run of aptile"),
    ],
)
def test_train_refuses_in_words(chip_store, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.docx").write_text("precious")
    assert aptile("train", *(chip_store if a == "STORE" else a for a in arguments)) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["taken", "thesis.docx"]


def test_a_damaged_store_ends_with_exit_code_4(chip_store, tmp_path, capsys):
    import shutil

    store = shutil.copytree(chip_store, tmp_path / "copy")
    (store / "manifest" / "000001.parquet").write_bytes(b"")
    assert aptile("inspect", store) == 4
    assert "manifest/000001.parquet differs from what was committed" in refusal(capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["preprocess", "--help"], ["train", "--help"]]
)
def test_help_is_shown(arguments, capsys):
    assert aptile(*arguments) == 0
    assert "aptile" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    assert aptile("--version") == 0
    assert capsys.readouterr().out.strip() == version("aptile")


def test_preprocess_and_inspect_need_no_torch(chip_store):
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'safetensors', 'matplotlib', 'spyndex', 'xarray'):\n"
        "    sys.modules[name] = None\n"
        "from workflows.cli import main\n"
        f"main(['inspect', {str(chip_store)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens per tile" in done.stdout


def test_a_missing_extra_is_named(chip_store):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from workflows.cli import main\n"
        f"main(['train', {str(chip_store)!r}, '--out', 'run'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'aptile[train]'" in done.stderr
