"""Whole jobs over a catalogue behind a URL: faults that pass leave no trace, others quarantine by name."""

from collections import deque

import pytest
import yaml

from faulty_server import PASSING, faulty_server, listener
from pipeline import open_store
from pipeline.jobs.job import run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from stac_catalogues import item_of, write_collection, write_rasters
from support import Watching

pytestmark = pytest.mark.usefixtures("kept_workers")

NAMES = ("a", "b", "c")


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    sections = {
        "modality": {"name": "s2", "bands": ["B02", "B03"], "value_range": [0, 10_000]},
        "store": {"tile_size_px": 16},
        "run": {
            "workers": 1,
            "retries": {"attempts": 3, "first_wait_s": 0.001, "longest_wait_s": 0.01, "timeout_s": 0.2},
        },
    }  # fmt: skip
    file.write_text(yaml.safe_dump(sections))
    return load_config(PreprocessConfig, file)


@pytest.fixture
def catalogue(tmp_path):
    items = [
        item_of(name, datetime=f"2023-07-{day:02}T10:00:00Z") for day, name in enumerate(NAMES, 1)
    ]
    for name in NAMES:
        write_rasters(tmp_path / "served", name)
    return write_collection(tmp_path / "served/items.json", items)


def pixels(store) -> dict[str, bytes]:
    opened = open_store(store)
    return {
        tile: opened.tile(tile).pixels.tobytes() + opened.tile(tile).valid.tobytes()
        for tile in opened.manifest["id"].to_pylist()
    }


def test_faults_that_pass_leave_no_trace_in_the_store(tmp_path, config, catalogue):
    with faulty_server(tmp_path / "served") as served:
        source = f"{served.address}/{catalogue.name}"
        report = run_job(source, tmp_path / "plain", config, Watching())
        # Never three in a row, however requests and faults fall.
        served.faults = deque(fault for kind in PASSING for fault in (kind, ""))
        again = run_job(source, tmp_path / "faulty", config, Watching())
    count = sum(n for fault, n in served.injected.items() if fault)
    print(
        f"{count} faults of {len(PASSING)} kinds injected: {again.done} of {again.inputs} scenes done"
    )
    assert (report.done, again.done, again.quarantined) == (3, 3, {})
    assert pixels(tmp_path / "plain") == pixels(tmp_path / "faulty")


def test_a_file_that_cannot_be_read_is_quarantined_with_the_reason(tmp_path, config, catalogue):
    with faulty_server(tmp_path / "served") as served:
        served.where = lambda path: path == "/b_B03.tif"
        served.always = "503"
        report = run_job(
            f"{served.address}/{catalogue.name}", tmp_path / "store", config, Watching()
        )
    (reason,) = report.quarantined.values()
    print(
        f"{served.injected['503']} x 503 injected: {report.done} scenes done, quarantined: {reason}"
    )
    assert (report.inputs, report.done, list(report.quarantined)) == (3, 2, ["b"])
    assert "b_B03.tif cannot be read: tried 3 times" in reason
    assert reason.endswith("at last: 503 Service Unavailable")
    store = open_store(tmp_path / "store")
    for tile in store.manifest["id"].to_pylist():
        assert store.tile(tile).valid.shape[0] == 2
        assert store.tile(tile).valid[:, :16, :8].all()


def test_a_catalogue_that_points_into_the_private_network(tmp_path, config, catalogue):
    with faulty_server(tmp_path / "served") as served, listener() as (elsewhere, came):
        port = elsewhere.rpartition(":")[2]
        hosts = (
            "127.0.0.2",
            "2130706433",
            "0x7f.1",
            "017700000001",
            "[::1]",
            "localhost",
            "10.0.0.1",
        )
        items = [item_of("a", datetime="2023-07-01T10:00:00Z")]
        items += [
            item_of(f"x{number}", rasters=f"http://{host}:{port}", datetime="2023-07-02T10:00:00Z")
            for number, host in enumerate((*hosts, "169.254.169.254"))
        ]
        write_collection(tmp_path / "served/items.json", items)
        report = run_job(f"{served.address}/items.json", tmp_path / "store", config, Watching())
    print(
        f"{len(items) - 1} private addresses: {len(report.quarantined)} refused, {len(came)} connections"
    )
    assert (report.done, len(report.quarantined)) == (1, len(items) - 1)
    assert all("outside" in reason for reason in report.quarantined.values())
    assert came == []
