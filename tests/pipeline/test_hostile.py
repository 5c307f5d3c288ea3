"""Whatever an archive holds: nothing runs, nothing outside is read, nobody is called."""

import json
import re
import subprocess
import sys
from pathlib import Path

from hostile_cases import CASES, WORD, secrets

COST = Path(__file__).parent.parent / "cost.py"
# A preset is named in the user's own file.
TRUSTED = "YAML preset outside"


def test_hostile_archives_execute_nothing_and_lead_nowhere(tmp_path):
    outside = secrets(tmp_path / "outside")
    cases = {}
    for number, (name, make) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        cases[name] = make(folder, outside)
    done = subprocess.run(
        [sys.executable, "-P", str(COST)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    results = {
        name: (told, touched) for name, (_, _, told, touched) in json.loads(done.stdout).items()
    }
    executed, read, connected, unclear = [], [], [], []
    for name, (told, touched) in results.items():
        executed += [
            f"{name}: {what}" for what in touched if re.match("subprocess|os|pickle|ctypes", what)
        ]
        read += [
            f"{name}: {what}" for what in touched if what == "pixels" or f" {outside}/" in what
        ]
        read += [f"{name}: {told}"] * (WORD in told)
        connected += [f"{name}: {what}" for what in touched if what.startswith("socket")]
        if not re.match("read|refused: ", told) or not told.isprintable():
            unclear.append(f"{name}: {told!r}")
    assert not (outside / "executed").exists()
    print(f"\n{len(results)} hostile archives: {len(executed)} executions, {len(read)} reads outside, "
          f"{len(connected)} connections, {len(unclear)} without a plain verdict")  # fmt: skip
    assert executed == connected == unclear == []
    assert [line for line in read if not line.startswith(TRUSTED)] == []
