"""The cluster page holds: its settings load, its commands have these options, its table adds up."""

import re
from pathlib import Path

import pytest
from distributed.cli import dask_scheduler, dask_worker

from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config

PAGE = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"\bdask (scheduler|worker) ?(.*)", SHELL)
# Figures are printed with three digits.
DIGITS = 0.01


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_configuration(example, tmp_path):
    (tmp_path / "config.yaml").write_text(example)
    load_config(PreprocessConfig, tmp_path / "config.yaml")


def test_there_is_an_example_of_every_place():
    text = "\n".join(EXAMPLES)
    for place in ("workers: 8", "tcp://", "tls://", "slurm", "pbs", "lsf", "kubernetes"):
        assert place in text


def test_every_option_of_dasks_commands_exists():
    known = {
        name: {option for parameter in cli.main.params for option in parameter.opts}
        for name, cli in (("scheduler", dask_scheduler), ("worker", dask_worker))
    }
    assert len(COMMANDS) == 4
    for name, words in COMMANDS:
        assert set(re.findall(r"--[\w-]+", words)) <= known[name]


def rows() -> list[dict[str, str]]:
    """The sizing table."""
    lines = re.findall(r"^\|(.*)\|$", PAGE.split("## How much of everything")[1], re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_hours_follow_from_the_measured_rates():
    assert [row["files"] for row in rows()] == ["DEFLATE", "ZSTD", "LZW", "JPEG 2000"]
    for row in rows():
        hours = 1e6 / float(row["job MB/s"]) / 3600
        assert float(row["core hours per TB"]) == pytest.approx(hours, rel=DIGITS)
        for cores in (16, 64, 256):
            on_cores = float(row[f"hours on {cores} cores"])
            assert on_cores == pytest.approx(hours / cores / 0.9, rel=DIGITS)
        of_files = hours * float(row["ratio"])
        assert float(row["core hours per TB of files"]) == pytest.approx(of_files, rel=2 * DIGITS)
