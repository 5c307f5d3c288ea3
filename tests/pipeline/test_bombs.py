"""Files that claim very much are refused from their headers, or read within the memory they may take."""

import json
import re
import subprocess
import sys
from pathlib import Path

from bombs import BOMBS
from pipeline.settings.run import RunConfig

# What a refusal, or reading a window of the largest block that is allowed, may take beside that block.
BESIDE = 256
COST = Path(__file__).parent.parent / "cost.py"


def test_bombs_are_refused_or_read_within_the_budget(tmp_path):
    cases = {}
    for number, (name, bomb) in enumerate(BOMBS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        cases[name] = (str(bomb.make(folder)), bomb.settings)
    done = subprocess.run(
        [sys.executable, "-P", str(COST)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    budget = RunConfig().max_block_bytes // 2**20 + BESIDE
    print(f"\n{len(results)} bombs; each may take {budget} MiB")
    for name, (peak, seconds, verdict, _) in results.items():
        print(f"{name:40} {peak:5.0f} MiB {seconds:5.2f} s  {_short(verdict)}")
    wrong = {
        name: verdict for name, (_, _, verdict, _) in results.items()
        if not re.search(BOMBS[name].told, verdict) or "\n" in verdict
    }  # fmt: skip
    assert not wrong
    assert {name for name, (peak, *_) in results.items() if peak > budget} == set()


def _short(verdict: str) -> str:
    found = re.sub(
        r"refused: \S+: (none of the 1 scenes can be used; the first, \S+: )?", "refused: ", verdict
    )
    return found[:90]
