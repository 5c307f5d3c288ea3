"""Every benchmark runs on tiny input and says something finite."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_runs(script, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, script, "--quick", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert figures
    assert all(math.isfinite(figure) for figure in figures)
