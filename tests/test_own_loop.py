"""The page on training with one's own loop: its scripts run as they stand there, and do what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from how_to import HOW_TO
from model import BatchStream, TileDataset
from support import aptile

ROOT = Path(__file__).parent.parent
PAGE = (HOW_TO / "train-with-your-own-loop.md").read_text()


@pytest.fixture(scope="module")
def folder(satclip, tmp_path_factory):
    """Where the page's scripts lie, beside the store they name and another one."""
    folder = tmp_path_factory.mktemp("loop")
    config = HOW_TO / "satclip.yaml"
    store = folder / "store"
    assert aptile("preprocess", satclip, store, "--config", config, "--workers", 1) == 0
    shutil.copytree(store, folder / "other")
    for name, script in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.M | re.S):
        (folder / name).write_text(script)
    return folder


def run(folder, *command):
    """Standard output of a command with this Python and its scripts, warnings being errors."""
    bin_folder = Path(sys.executable).parent
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [bin_folder / command[0], *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_go_on_where_one_was_stopped(folder):
    (commands,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    stream = BatchStream(
        TileDataset(folder / "store", modalities={"s2_l2a": [""]}), batch_tokens=2000, seed=7
    )
    tokens = []
    while len(tokens) < 12:
        tokens += [batch.num_tokens for batch in stream]
    stream.close()
    printed = "".join(run(folder, *shlex.split(line)) for line in commands.splitlines())
    assert len(re.findall(r"step \d+: \d+ tokens", printed)) == 5 + 2 * 7
    for step in range(1, 13):
        of_ranks = [int(n) for n in re.findall(rf" step {step}: (\d+) tokens", printed)]
        assert len(of_ranks) == (1 if step <= 5 else 2)
        assert sum(of_ranks) == tokens[step - 1]
    kept = torch.load(folder / "run.pt")
    assert kept["step"] == 12
    assert kept["stream"]["epoch"] * len(stream) + kept["stream"]["step"] == 12
    assert 5 % len(stream) > 0, "the first run must stop in the middle of an epoch"


def test_workers_read_every_tile_once_per_epoch(folder):
    printed = run(folder, "python", "-W", "error", "workers.py")
    for epoch in range(2):
        batches = re.findall(rf"epoch {epoch} step \d+: tiles \[(.+)\]", printed)
        assert sorted(int(n) for batch in batches for n in batch.split(", ")) == list(range(16))


def test_three_quarters_come_from_the_first_store(folder):
    printed = run(folder, "python", "-W", "error", "several.py")
    assert printed == "24 of 32 tiles from the first store\n"
