"""`aptile verify` as a user calls it."""

import json
import shutil

import pytest
from grown import grown_store

from pipeline.jobs.verify import verify
from support import aptile, flip
from workflows.verify import groups, in_words

pytestmark = pytest.mark.usefixtures("kept_workers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two commits of preprocessing and one of a further partition: 14 tiles in 4 shards."""
    return grown_store(tmp_path_factory.mktemp("grown")) / "store"


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def test_the_command_says_what_to_do(store, capsys):
    assert aptile("verify", store, "--workers", 2) == 0
    assert "commit 3; 78 objects, " in capsys.readouterr().out
    (store / "image" / "pixels" / "c" / "1" / "0" / "0" / "0").unlink()
    (store / "image" / "valid" / "c" / "0" / "0" / "0").unlink()
    (store / "image" / "partitions" / "lean" / "scales" / "c" / "3").unlink()
    flip(store / "COMMIT.json", 100, 1)
    assert aptile("verify", store) == 4
    text = capsys.readouterr().out
    assert (
        f"run `aptile preprocess SOURCE {store}` again: it writes 2 objects of 2 shards anew"
        in text
    )
    assert "image/pixels/c/1/0/0/0 is missing" in text
    assert f"`aptile repartition {store} --name lean --modality image` again with its rule" in text
    assert "restores 1 object from commits/000003.json" in text
    assert aptile("verify", store, "--json") == 4
    content = json.loads(capsys.readouterr().out)
    assert content["intact"] is False
    assert len(content["damaged"]) == 4
    assert {d["cure"] for d in content["damaged"]} == {"shard", "partition", "record"}


def test_a_store_that_is_none_is_a_wrong_argument(tmp_path, capsys):
    assert aptile("verify", tmp_path / "nothing") == 2
    assert "no aptile store here" in capsys.readouterr().err


def test_long_lists_are_capped(store):
    for path in store.glob("image/*/c"):
        shutil.rmtree(path)
    report = verify(store)
    lines = in_words(report)
    assert "and " in lines[-1]
    assert lines[-1].endswith("more; --json lists all")
    assert len(lines) == 23
    (damages,) = groups(report).values()
    assert len(damages) == len(report.damaged) > 20
