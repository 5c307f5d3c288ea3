"""The page on the encoder's stages: its code prints what it says, its pictures are drawn, its options are all."""

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


def test_the_code_prints_what_the_page_says(satclip, tmp_path):
    (commands,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    for line in commands.splitlines():
        command = line.replace("archive", str(satclip)).replace(
            "satclip.yaml", str(HOW_TO / "satclip.yaml")
        )
        arguments = [
            str(tmp_path / word) if word == "store" else word for word in command.split()[1:]
        ]
        assert aptile(*arguments, "--workers", 1) == 0
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S))


def test_every_picture_is_one_the_script_draws():
    shown = re.findall(r"\(pictures/encoder-(\w+)\.png\)", PAGE)
    drawn = re.findall(r'save\(figure, "(\w+)"', (PICTURES / "encoder.py").read_text())
    assert sorted(shown) == sorted(drawn)
    assert all((PICTURES / f"encoder-{name}.png").stat().st_size < 200_000 for name in shown)


@pytest.mark.parametrize("option", EncoderOptions.model_fields)
def test_every_option_is_explained(option):
    table = PAGE.split("## Options")[1]
    assert re.search(rf"^\| [^|]*`{option}`[^|]* \|", table, re.M)
