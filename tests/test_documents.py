"""README and docs hold what the code does: their blocks run, their tables are compared."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from model import Augmentation
from model.training_config import TrainConfig
from pipeline.grid import BaseGrid
from pipeline.scorers.config import SCORER_CONFIGS
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.storage.layout import BandSet, StoreLayout

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def run_line(line: str, folder: Path, demo: Path) -> None:
    command = shlex.split(line, comments=True)
    if command[:1] == ["make"]:
        # Make sees to the environment; what it then calls has been run in the one we are in, or is this.
        recipe = subprocess.run(
            ["make", "--dry-run", *command[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert {"demo": "aptile demo demo", "test": "-m pytest"}[command[1]] in recipe
        if command[1] == "demo":
            shutil.copytree(demo, folder / "demo")
    elif command:
        run(command, folder)


def test_every_block_of_the_readme_runs(tmp_path, demo):
    kinds = [kind for kind, _ in BLOCKS]
    assert set(kinds) == {"bash", "python", "yaml"}
    for kind, text in BLOCKS:
        if kind == "bash":
            for line in text.splitlines():
                run_line(line, tmp_path, demo[0])
        elif kind == "python":
            run([sys.executable, "-W", "error::UserWarning", "-c", text], tmp_path)
        else:
            (tmp_path / "config.yaml").write_text(text)
            load_config(PreprocessConfig, tmp_path / "config.yaml")
    assert (tmp_path / "tile.png").stat().st_size > 10_000


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_format_page_lists_every_array():
    sets = (BandSet("", ("a",), "uint16", 32), BandSet("20m", ("b",), "uint16", 16))
    layout = StoreLayout("m", sets, BaseGrid(8, 8, 4, 3), 1, 1, "lz4")
    table = re.findall(
        r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|",
        (ROOT / "docs" / "format.md").read_text(),
        re.MULTILINE,
    )
    listed = {}
    for name, dims, dtype, fill in table:
        for size in layout.grid.patch_sizes if "<px>" in name else ("",):
            named = {"<px>": str(size), "<set>": "20m"}
            listed[_filled(name, named)] = (
                tuple(_filled(dims, named).strip().split(", ")),
                dtype.strip().replace("the archive's", "uint16"),
                fill.strip().lower(),
            )
    written = {
        name.removeprefix("m/"): (spec.dims, spec.dtype, str(spec.fill_value).lower())
        for name, spec in layout.arrays().items()
    }
    assert listed == written


def _filled(text: str, named: dict[str, str]) -> str:
    for mark, value in named.items():
        text = text.replace(mark, value)
    return text


def section(annotation: object) -> type[BaseModel] | None:
    """The model of a field that is a section, given or not."""
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def settings(model: type[BaseModel], prefix: str = ""):
    """(key, default, description) of every setting, depth first."""
    for name, field in model.model_fields.items():
        if name in {"scoring", "scorer"} and not prefix:
            continue
        below = section(field.annotation)
        # A modality's own scorer and partition have the keys of the shared ones.
        own = name in {"scoring", "partition"} and prefix
        if name == "scorer" and prefix == "scoring.":
            continue
        if below is not None and name != "modalities" and not own:
            yield from settings(below, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else str(field.default)
            yield f"{prefix}{name}", default, field.description


@pytest.mark.parametrize("model", [PreprocessConfig, TrainConfig, Augmentation, *SCORER_CONFIGS])
def test_the_configuration_page_lists_every_setting(model):
    page = (ROOT / "docs" / "configuration.md").read_text()
    if model in SCORER_CONFIGS:
        heading = f"### `{model.model_fields['scorer'].default}`"
        page = page.split(heading)[1].split("\n##")[0]
    prefix = "scoring." if model in SCORER_CONFIGS else ""
    for key, default, description in settings(model, prefix):
        assert f"| `{key}` | {default} | {description} |" in page
