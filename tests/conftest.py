"""Fixtures shared by all tests: archives real and synthetic, stores made by the command line."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from support import aptile, save_scene

ROOT = Path(__file__).parent.parent

# The fixtures hypothesis complains about are read-only here, and slow machines are no failure.
settings.register_profile(
    "aptile",
    deadline=None,
    # A change is judged by the same examples every time; at a desk new ones are tried.
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("aptile")


@pytest.fixture(autouse=True, scope="module")
def _workers_stay_what_they_are() -> Iterator[None]:
    """Tests that work without workers must not leave the others without."""
    yield
    batch, engine = (sys.modules.get(f"pipeline.jobs.{name}") for name in ("batch", "engine"))
    assert batch is None or batch.run_tasks is engine.run_tasks


@pytest.fixture(scope="session")
def _workers() -> Iterator[Any]:
    # Dask sets up logging as it is imported, and must find that pytest has done so.
    from kept_workers import KeptWorkers

    with contextlib.closing(KeptWorkers()) as kept:
        yield kept


@pytest.fixture(scope="module")
def kept_workers(_workers: Any) -> Iterator[None]:
    """Local jobs of a module that uses this share their worker processes, one job after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.jobs.clients._local", _workers.local)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real imagery beside the project; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("APTILE_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip("no real imagery here; APTILE_TEST_DATA can name its folder")
    return folder


@pytest.fixture(scope="session")
def satclip(real_data: Path) -> Path:
    """Four Sentinel-2 L2A scenes of 256 x 256 px and 12 bands."""
    return real_data / "satclip"


@pytest.fixture(scope="session")
def chip_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Sentinel-2 chip of the demo: one scene of 300 x 300 px and 4 bands, no georeference."""
    from workflows.demo import write_archive  # needs the extra demo

    folder = tmp_path_factory.mktemp("chip") / "archive"
    write_archive(folder)
    return folder


@pytest.fixture(scope="session")
def chip_store(chip_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chip preprocessed with default settings: 9 tiles, those at the edge partly invalid."""
    store = tmp_path_factory.mktemp("store") / "chip"
    assert aptile("preprocess", chip_archive, store, "--workers", 1) == 0
    return store


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that `aptile demo` made, and what it said; a minute's work, so do not change it."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    command = [sys.executable, "-m", "workflows.cli", "demo", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


WriteScene = Callable[..., Path]


@pytest.fixture
def write_scene(tmp_path: Path) -> WriteScene:
    """`write_scene(name, pixels [band, y, x], **creation_options)` below tmp_path/archive."""
    return lambda name, pixels, **options: save_scene(
        tmp_path / "archive" / name, pixels, **options
    )
