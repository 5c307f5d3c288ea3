import pytest

from pipeline.errors import EXIT_QUARANTINED
from pipeline.jobs.quarantine import QuarantineError, QuarantineLimit, allowed
from support import aptile, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")


@pytest.mark.parametrize(
    ("limit", "inputs", "most"),
    [(0, 10, 0), ("7", 10, 7), ("1%", 99, 0), ("1%", 100, 1), ("0.1 %", 3000, 3), ("100%", 5, 5)],
)
def test_limits_are_counts_or_shares(limit, inputs, most):
    assert allowed(limit, inputs) == most


def test_the_one_too_many_stops_the_job():
    limit = QuarantineLimit("STORE", 1, 10, {"a": "no raster"})
    limit.add([{"failed": {}}, {"failed": {"a": "torn"}}])
    with pytest.raises(
        QuarantineError, match=r"2 of 10 inputs are.* allows .1.; one of them, a: no raster"
    ):
        limit.add([{"failed": {"b": "torn"}}])
    unlimited = QuarantineLimit("STORE", None, 1, {"a": "", "b": ""})
    unlimited.add([{"failed": {"c": "torn"}}])
    assert list(unlimited.reasons) == ["a", "b", "c"]


@pytest.mark.parametrize("limit", ["many", "1.5", "-1", "101%", "1%%"])
def test_a_limit_that_is_none_is_refused(tmp_path, capsys, limit):
    assert aptile("preprocess", tmp_path, tmp_path / "store", f"--max-quarantine={limit}") == 2
    assert "a share such as 1%" in capsys.readouterr().err.replace("share of them", "share")


def test_a_job_stops_early_and_goes_on_with_a_higher_limit(tmp_path, capsys):
    archive, store = tmp_path / "archive", tmp_path / "store"
    for number in range(3):
        save_scene(archive / f"good{number}.tif", textured((3, 64, 64), number))
    torn = save_scene(archive / "torn.tif", textured((3, 64, 64)), compress="deflate")
    torn.write_bytes(torn.read_bytes()[:9000])
    (archive / "text.tif").write_text("no raster")
    job = ("preprocess", archive, store, "--workers", 1, "--set", "store.tile_size_px=64")
    job += ("--set", "store.shard_tiles=1")
    assert aptile(*job, "--max-quarantine", "20%") == EXIT_QUARANTINED
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "2 of 5 inputs are quarantined, more than run.max_quarantine 20% allows (1)" in error
    assert aptile("inspect", store) == 2
    capsys.readouterr()
    assert aptile(*job, "--max-quarantine", "2") == EXIT_QUARANTINED
    assert "5 inputs = 3 done + 2 quarantined + 0 skipped" in capsys.readouterr().err


def test_too_many_refused_at_planning_stop_a_job_before_it_begins(tmp_path, capsys):
    archive, store = tmp_path / "archive", tmp_path / "store"
    save_scene(archive / "good.tif", textured((3, 64, 64)))
    (archive / "text.tif").write_text("no raster")
    assert aptile("preprocess", archive, store, "--max-quarantine", 0) == EXIT_QUARANTINED
    assert "1 of 2 inputs" in capsys.readouterr().err
    assert not store.exists()
