"""Scores from outside: rasters that lie beside the archive."""

import numpy as np
import pytest

from pipeline import open_store, score_maps
from pipeline.errors import ArchiveError, ConfigError
from pipeline.jobs.job import run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from support import Watching, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")


def settings(folder, *overrides):
    return load_config(
        PreprocessConfig,
        None,
        [
            "scoring.scorer=external",
            f"scoring.folder={folder}",
            "store.tile_size_px=32",
            "partition.thresholds=[0.4, 0.6]",
            "run.workers=1",
            *overrides,
        ],
    )


@pytest.fixture
def archive(tmp_path):
    save_scene(tmp_path / "scenes" / "a.tif", textured((3, 50, 70)))
    save_scene(tmp_path / "scenes" / "deep" / "b.tif", textured((3, 32, 32), seed=1))
    return tmp_path / "scenes"


@pytest.fixture
def scores(tmp_path):
    plane = np.random.default_rng(0).random((1, 50, 70)).astype(np.float32)
    plane[0, :20, :20] = np.nan
    save_scene(tmp_path / "scores" / "a.tif", plane)
    save_scene(tmp_path / "scores" / "deep" / "b.tif", np.ones((1, 32, 32), np.float32), crs=None)
    return plane


def test_the_maps_of_a_store_are_those_of_the_score_rasters(archive, scores, tmp_path):
    run_job(str(archive), tmp_path / "store", settings(tmp_path / "scores"), Watching())
    store = open_store(tmp_path / "store")
    padded = np.full((1, 64, 96), np.nan, np.float32)
    padded[:, :50, :70] = scores
    expected = score_maps(padded, base_patch_size=4, num_scales=3, scorer="external")
    for row in range(2):
        for col in range(3):
            tile = store.tile(f"a/r{row}c{col}")
            for scale, stored in enumerate(tile.score_maps):
                side = 8 >> scale
                part = expected[scale][row * side : (row + 1) * side, col * side : (col + 1) * side]
                np.testing.assert_array_equal(stored[0], part)
    # Unknown scores make no token, though the pixels are valid.
    first = store.tile("a/r0c0")
    assert first.valid[0, :20, :20].all()
    assert np.isnan(first.score_maps[0][0, :5, :5]).all()
    assert store.tile("deep/b/r0c0").score_maps[2][0].tolist() == [[1, 1], [1, 1]]


def test_scores_that_changed_since_the_job_was_begun_are_noticed(archive, scores, tmp_path):
    config = settings(tmp_path / "scores", "store.shard_tiles=1")
    with pytest.raises(KeyboardInterrupt):
        run_job(str(archive), tmp_path / "store", config, Watching(interrupt_after=1))
    save_scene(tmp_path / "scores" / "a.tif", scores + 1, compress="lzw")
    with pytest.raises(ArchiveError, match="1 of its files differ, scores/a.tif was changed"):
        run_job(str(archive), tmp_path / "store", config, Watching())


def test_scenes_without_a_fitting_score_raster_are_quarantined(archive, scores, tmp_path):
    save_scene(tmp_path / "scores" / "a.tif", scores[:, :40])
    report = run_job(str(archive), tmp_path / "store", settings(tmp_path / "scores"), Watching())
    assert list(report.quarantined) == ["a"]
    assert "has 1 bands of 40 x 70 px; expected 1 of 50 x 70" in report.quarantined["a"]


def test_a_folder_without_scores_is_refused(archive, tmp_path):
    with pytest.raises(ArchiveError, match=r"the first, a: has no score raster a.tif in"):
        run_job(str(archive), tmp_path / "store", settings(tmp_path / "nothing"), Watching())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scoring.folder=null", "scoring.folder is not given"),
        ("scoring.bands=[band_1]", "unknown key 'scoring.bands'"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, override)
