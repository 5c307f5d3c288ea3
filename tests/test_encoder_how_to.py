"""The page on using the encoder: its code prints what it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from how_to import HOW_TO

ROOT = Path(__file__).parent.parent
PAGE = (HOW_TO / "use-the-encoder.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_code_prints_what_the_page_says(chip_store, tmp_path):
    shutil.copytree(chip_store, tmp_path / "store")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks("python"))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks("text"))
