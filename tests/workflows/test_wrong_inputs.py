"""Wrong inputs as users make them: each gets the one line that docs/wrong-inputs.md shows for it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support import aptile
from wrong_cases import CASES, SINGLE_SCENES
from wrong_makers import item, items, tif

pytestmark = pytest.mark.usefixtures("kept_workers")

CODE = re.compile("^(`+) ?(.*?) ?\\1$")
PAGE = Path(__file__).parents[2] / "docs" / "wrong-inputs.md"


def rows_of_the_page() -> dict[str, dict[str, str]]:
    """Message by what was done wrong, section by section."""
    sections: dict[str, dict[str, str]] = {}
    for block in PAGE.read_text().split("\n## ")[1:]:
        title, _, body = block.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line[:2] == "| "]
        assert all(len(row) == 3 and all(row) for row in rows), title
        sections[title] = {done: CODE.sub(r"\2", message) for done, message, _ in rows[1:]}
    return sections


ROWS = rows_of_the_page()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An archive of one scene and its finished store."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tif()()
        assert aptile("preprocess", "ARCHIVE", "STORE", "--workers", 1) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(text: str, here: Path) -> list[str]:
    """Lines on stderr with paths as the page has them."""
    return [line.replace(f"{here}/", "") for line in text.strip().splitlines()]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def matches(message: str, line: str) -> bool:
    """Whether a line is a message of the page, in which ... stands for what systems word differently."""
    return re.fullmatch(".*".join(map(re.escape, message.split("..."))), line) is not None


def test_the_page_has_every_case_and_no_other():
    listed = {title: list(rows) for title, rows in ROWS.items() if title not in SINGLE_SCENES}
    assert listed == {title: list(cases) for title, cases in CASES.items()}
    assert set(ROWS) - set(listed) == set(SINGLE_SCENES)


@pytest.mark.parametrize(
    ("section", "done"), [(section, done) for section, cases in CASES.items() for done in cases]
)
def test_a_wrong_input_is_refused_in_one_line_and_nothing_is_left(
    section, done, here, finished, capsys
):
    case = CASES[section][done]
    case.prepare(finished)
    before = files(here)
    capsys.readouterr()
    assert case.run() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = shown(captured.err, here)
    assert matches(f"aptile: {ROWS[section][done]}", line), line
    assert files(here) == before


@pytest.mark.parametrize("section", SINGLE_SCENES)
def test_a_wrong_scene_is_left_out_and_named_and_the_rest_is_done(section, here, capsys):
    case, messages = SINGLE_SCENES[section], ROWS[section].values()
    case.prepare(here)
    assert case.run() == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = shown(captured.err, here)
    quarantined = [line for line in lines if line.startswith("quarantined ")]
    assert [[matches(m, line) for m in messages].count(True) for line in quarantined] == [1] * len(
        messages
    ), quarantined
    total = f"STORE: {len(messages) + 1} inputs = 1 done + {len(messages)} quarantined + 0 skipped"
    assert lines[-1] == f"{total}; 1 tiles in 1 shards"
    assert {path.parts[0] for path in map(Path, files(here))} <= {"ARCHIVE", "CONFIG", "STORE"}


def test_ctrl_c_while_a_server_keeps_the_command_waiting(here):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        # Without a stated shape, planning has to open the files.
        items(*(item(name, f"{address}/{name}.tif", **{"proj:shape": None}) for name in "abc"))()
        before = files(here)
        process = subprocess.Popen(
            [sys.executable, "-c", "from workflows.cli import main; main()", "preprocess",
             "ARCHIVE/items.json", "STORE", "--set", "modality.bands=[B02]",
             "--set", f"run.allow=['{address}']"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PAGE.parents[1])},
            # Tests that run in the background inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == 130
    assert err == "aptile: interrupted; nothing is lost, run the same command again to go on\n"
    assert files(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(
    ("closed", "message"),
    [
        ("ARCHIVE", "cannot be listed: Permission denied; make it readable or name another folder"),
        ("ARCHIVE/a.tif", "none of the 1 scenes can be used; the first, a: "),
        ("CONFIG", "CONFIG: cannot read the configuration: Permission denied"),
    ],
)
def test_what_may_not_be_read_is_named(here, capsys, closed, message):
    tif()()
    Path("CONFIG").write_text("store: {codec: zstd}")
    Path(closed).chmod(0)
    try:
        assert aptile("preprocess", "ARCHIVE", "STORE", "--config", "CONFIG") == 2
    finally:
        Path(closed).chmod(0o700)
    (line,) = shown(capsys.readouterr().err, here)
    assert message in line
    assert not Path("STORE").exists()
