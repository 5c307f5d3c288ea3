"""The page on the encoder: its code prints what it says, its pictures are drawn, no option is left out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from how_to import HOW_TO
from model import EncoderOptions
from support import aptile

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "encoder.md").read_text()
PICTURES = ROOT / "docs" / "pictures"


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_code_prints_what_the_page_says(satclip, tmp_path):
    (commands,) = blocks("bash")
    places = {
        "archive": satclip,
        "store": tmp_path / "store",
        "satclip.yaml": HOW_TO / "satclip.yaml",
    }
    for line in commands.splitlines():
        command = [places.get(word, word) for word in line.split()[1:]]
        assert aptile(*command, "--workers", 1) == 0
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks("python"))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks("text"))


def test_every_picture_is_one_the_script_draws():
    shown = re.findall(r"\(pictures/encoder-(\w+)\.png\)", PAGE)
    drawn = re.findall(r'save\(figure, "(\w+)"', (PICTURES / "encoder.py").read_text())
    assert sorted(shown) == sorted(drawn)
    assert all((PICTURES / f"encoder-{name}.png").stat().st_size < 200_000 for name in shown)


@pytest.mark.parametrize("option", EncoderOptions.model_fields)
def test_every_option_is_explained(option):
    table = PAGE.split("## Options")[1]
    assert re.search(rf"^\| [^|]*`{option}`[^|]* \|", table, re.M)
