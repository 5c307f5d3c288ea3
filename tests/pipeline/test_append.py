import json
import shutil

import numpy as np
import pytest
import rasterio

from model.data import TileDataset
from pipeline import open_store
from pipeline.errors import ArchiveError, StoreError
from pipeline.jobs.job import run_job
from pipeline.jobs.repartition import repartition
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from support import Watching, aptile, assert_same_bytes, files, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")

SETTINGS = (
    "store.tile_size_px=32",
    "store.shard_tiles=4",
    "modality.value_range=[0, 10000]",
    "modality.pattern='{tile}_{date}.tif'",
    "run.workers=1",
)


def job(archive, store, *overrides, observer=None, **how):
    settings = load_config(PreprocessConfig, None, [*SETTINGS, *overrides])
    return run_job(str(archive), store, settings, observer or Watching(), **how)


def image(seed):
    pixels = textured((3, 70, 100), seed=seed)
    pixels[:, 40:60, 20 * (seed % 3) :] = 0
    return pixels


@pytest.fixture
def archive(tmp_path):
    """Two places, the first at two dates."""
    for name, seed in (("a_20200101", 1), ("a_20200301", 2), ("b_20200101", 3)):
        save_scene(tmp_path / "archive" / f"{name}.tif", image(seed), nodata=0)
    return tmp_path / "archive"


def further(archive):
    """A date between those of the first place, another place, and a scene nobody can read."""
    for name, seed in (("a_20200201", 4), ("c_20200101", 5)):
        save_scene(archive / f"{name}.tif", image(seed), nodata=0)
    (archive / "b_20200401.tif").write_bytes(b"II*\0 torn")


def tiles(store, **which):
    """Everything of every tile by id: dates and per date pixels, validity, scores and scales."""
    found = {}
    for name in store.manifest["id"].to_pylist():
        tile = store.tile(name, **which)
        found[name] = (
            tile.datetimes,
            tile.timesteps.tolist(),
            tile.pixels * tile.valid[:, None],
            tile.valid,
            *tile.score_maps,
            *tile.scales,
        )
    return found


def assert_equal_tiles(one, other):
    assert one.keys() == other.keys()
    for name, parts in one.items():
        assert len(parts) == len(other[name])
        for part, same in zip(parts, other[name], strict=True):
            np.testing.assert_array_equal(part, same)


def test_appended_scenes_make_the_store_of_the_whole_archive(archive, tmp_path):
    first = job(archive, tmp_path / "grown")
    pinned = open_store(tmp_path / "grown")
    before, was = tiles(pinned), files(tmp_path / "grown")
    contents = {name: (tmp_path / "grown" / name).read_bytes() for name in was}
    further(archive)
    report = job(archive, tmp_path / "grown", append=True)
    assert (first.commit, report.commit) == (1, 2)
    assert (report.inputs, report.done, list(report.quarantined)) == (6, 5, ["b_20200401"])
    whole = job(archive, tmp_path / "whole")
    assert (whole.inputs, whole.done, whole.tiles) == (6, 5, report.tiles)
    grown = open_store(tmp_path / "grown")
    assert_equal_tiles(tiles(grown), tiles(open_store(tmp_path / "whole")))
    assert rows_by_id(grown) == rows_by_id(open_store(tmp_path / "whole"))
    # Who reads the first commit goes on seeing it, object by object.
    assert_equal_tiles(tiles(pinned), before)
    assert_equal_tiles(tiles(open_store(tmp_path / "grown", commit=1)), before)
    changed = {
        n for n, content in contents.items() if (tmp_path / "grown" / n).read_bytes() != content
    }
    assert {name for name in changed if not name.endswith("zarr.json")} == {"COMMIT.json"}


def rows_by_id(store):
    """Manifest rows, without where their frames lie."""
    rows = {row["id"]: row for row in store.manifest.to_pylist()}
    for row in rows.values():
        for modality in store.modalities:
            row[modality].pop("frames")
    return rows


def test_nothing_new_is_nothing_to_do(archive, tmp_path):
    job(archive, tmp_path / "store")
    before = {
        name: (tmp_path / "store" / name).stat().st_mtime_ns for name in files(tmp_path / "store")
    }
    report = job(archive, tmp_path / "store", append=True)
    assert (report.shards_written, report.commit) == (0, 1)
    before.pop(".lock")
    assert (
        before.items()
        <= {
            name: (tmp_path / "store" / name).stat().st_mtime_ns
            for name in files(tmp_path / "store")
        }.items()
    )


def test_new_scenes_are_not_taken_in_unasked(archive, tmp_path):
    job(archive, tmp_path / "store")
    further(archive)
    with pytest.raises(
        ArchiveError, match="a_20200201.tif is new; add --append to take in what is new"
    ):
        job(archive, tmp_path / "store")
    job(archive, tmp_path / "store", append=True)
    assert job(archive, tmp_path / "store").shards_written == 0


def test_an_interrupted_append_is_invisible_and_completed_to_the_same_bytes(archive, tmp_path):
    job(archive, tmp_path / "store")
    further(archive)
    shutil.copytree(tmp_path / "store", tmp_path / "whole")
    job(archive, tmp_path / "whole", append=True)
    before = tiles(open_store(tmp_path / "store"))
    with pytest.raises(KeyboardInterrupt):
        job(archive, tmp_path / "store", append=True, observer=Watching(interrupt_after=2))
    assert_equal_tiles(tiles(open_store(tmp_path / "store")), before)
    with pytest.raises(StoreError, match="that was interrupted; complete it with --append"):
        job(archive, tmp_path / "store")
    save_scene(archive / "late_20200101.tif", image(7), nodata=0)
    with pytest.raises(ArchiveError, match="late_20200101.tif is new"):
        job(archive, tmp_path / "store", append=True)
    (archive / "late_20200101.tif").unlink()
    watching = Watching()
    report = job(archive, tmp_path / "store", append=True, observer=watching)
    assert 0 < report.shards_written == watching.done
    assert_same_bytes(tmp_path / "store", tmp_path / "whole")


def test_scenes_of_another_archive_are_appended(archive, tmp_path):
    job(archive, tmp_path / "store")
    save_scene(tmp_path / "other" / "d_20210101.tif", image(8), nodata=0)
    save_scene(tmp_path / "other" / "a_20210101.tif", image(9), nodata=0)
    report = job(tmp_path / "other", tmp_path / "store", append=True)
    assert (report.inputs, report.done, report.commit) == (5, 5, 2)
    # Both archives are complete, and either command says so.
    for folder in (archive, tmp_path / "other"):
        assert job(folder, tmp_path / "store").shards_written == 0
        assert job(folder, tmp_path / "store", append=True).shards_written == 0


def test_a_changed_scene_of_the_store_is_refused(archive, tmp_path):
    job(archive, tmp_path / "store")
    further(archive)
    save_scene(archive / "a_20200101.tif", image(8), nodata=0)
    with pytest.raises(ArchiveError, match="a_20200101.tif is in the store, and was changed since"):
        job(archive, tmp_path / "store", append=True)


def test_a_second_scene_of_a_place_and_date_is_refused_by_name(archive, tmp_path):
    job(archive, tmp_path / "store")
    save_scene(archive / "a_2020-01-01.tif", image(8), nodata=0)
    save_scene(archive / "c_20200101.tif", image(9), nodata=0)
    report = job(archive, tmp_path / "store", append=True)
    assert list(report.quarantined) == ["a_2020-01-01"]
    assert "in common with a_20200101, which is in the store" in report.quarantined["a_2020-01-01"]


def test_quarantined_scenes_are_taken_in_once_they_can_be_read(archive, tmp_path):
    good = (archive / "a_20200301.tif").read_bytes()
    (archive / "a_20200301.tif").write_bytes(good[: len(good) // 2])
    torn = job(archive, tmp_path / "store")
    assert list(torn.quarantined) == ["a_20200301"]
    (archive / "a_20200301.tif").write_bytes(good)
    assert job(archive, tmp_path / "store", append=True).quarantined == torn.quarantined
    report = job(archive, tmp_path / "store", append=True, retry_quarantined=True)
    assert (report.inputs, report.done, report.quarantined) == (3, 3, {})
    job(archive, tmp_path / "whole")
    grown, whole = open_store(tmp_path / "store"), open_store(tmp_path / "whole")
    assert_equal_tiles(tiles(grown), tiles(whole))
    assert rows_by_id(grown) == rows_by_id(whole)


def cut(store, name, **rule):
    return repartition(store, name, FurtherRule(**rule), RunConfig(workers=1), Watching())


def test_a_partition_is_completed_after_an_append(archive, tmp_path):
    store = tmp_path / "store"
    job(archive, store)
    cut(store, "lean", quantile=0.3)
    cut(store, "shared", quantile=0.3, shared="max")
    before = tiles(open_store(store), partition="lean")
    further(archive)
    assert job(archive, store, append=True).commit == 4
    with pytest.raises(
        StoreError, match=r"'lean' of image was made before \d+ shards were appended"
    ):
        open_store(store).partition("lean")
    assert_equal_tiles(tiles(open_store(store, commit=3), partition="lean"), before)
    cut(store, "lean", quantile=0.3)
    job(archive, tmp_path / "whole")
    cut(tmp_path / "whole", "lean", quantile=0.3)
    whole = tiles(open_store(tmp_path / "whole"), partition="lean")
    assert_equal_tiles(tiles(open_store(store), partition="lean"), whole)
    with pytest.raises(
        StoreError, match="shared max would cut what is there anew; give another name"
    ):
        cut(store, "shared", quantile=0.3, shared="max")
    for at in (store, tmp_path / "whole"):
        cut(at, "shared-2", quantile=0.3, shared="max")
    whole = tiles(open_store(tmp_path / "whole"), partition="shared-2")
    assert_equal_tiles(tiles(open_store(store), partition="shared-2"), whole)


def test_a_grown_store_is_trained_from_like_any_other(archive, tmp_path):
    job(archive, tmp_path / "store")
    further(archive)
    job(archive, tmp_path / "store", append=True)
    job(archive, tmp_path / "whole")
    grown, whole = (TileDataset(open_store(tmp_path / name)) for name in ("store", "whole"))
    ids = [dataset.store.manifest["id"].to_pylist() for dataset in (grown, whole)]
    one = grown.batch(range(len(ids[0])))
    other = whole.batch([ids[1].index(name) for name in ids[0]])
    np.testing.assert_array_equal(one.cells(0, 0)[0], other.cells(0, 0)[0])
    np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)


def test_a_store_is_not_appended_to_what_does_not_fit_it(archive, tmp_path):
    job(archive, tmp_path / "store")
    save_scene(tmp_path / "four" / "d_20210101.tif", textured((4, 70, 100)))
    with pytest.raises(
        ArchiveError, match=r"band_4 as uint16 .* but the store holds band_1, band_2, band_3 as"
    ):
        job(tmp_path / "four", tmp_path / "store", append=True)
    with pytest.raises(StoreError, match="made with another configuration"):
        job(archive, tmp_path / "store", "modality.value_range=[0, 9000]", append=True)
    with pytest.raises(StoreError, match="no store to append to"):
        job(archive, tmp_path / "none", append=True)
    assert len(open_store(tmp_path / "store").manifest) == len(
        open_store(tmp_path / "store", 1).manifest
    )


def with_offset(path, pixels, offset):
    save_scene(path, pixels, nodata=0)
    with rasterio.open(path, "r+") as raster:
        raster.scales, raster.offsets = (0.0001,) * 3, (offset,) * 3


def test_a_scene_whose_offset_the_store_cannot_hold_is_refused_in_words(tmp_path):
    archive = tmp_path / "archive"
    with_offset(archive / "a_20200101.tif", image(1), -0.05)
    job(archive, tmp_path / "store")
    with_offset(archive / "b_20200101.tif", image(2), -0.1)
    with_offset(archive / "c_20200101.tif", image(3), 0.0)
    report = job(archive, tmp_path / "store", append=True)
    assert list(report.quarantined) == ["b_20200101"]
    assert "500 would have to be taken from its numbers" in report.quarantined["b_20200101"]
    tile = open_store(tmp_path / "store").tile("c/r0c0")
    shifted = image(3)[:, :32, :32] + np.uint16(500)
    np.testing.assert_array_equal(tile.pixels[0][:, tile.valid[0]], shifted[:, tile.valid[0]])


def test_a_static_scene_serves_places_that_come_later(tmp_path):
    archive = tmp_path / "archive"
    settings = ["store.tile_size_px=32", "store.shard_tiles=4", "run.workers=1"]
    modalities = (
        "modalities={s2: {source: s2, pattern: '{tile}_{date}.tif', value_range: [0, 10000]}, "
        "dem: {source: dem, pattern: '{tile}.tif', static: true, value_range: [0, 10000]}}"
    )
    config = load_config(PreprocessConfig, None, [*settings, modalities])
    for place, seed in (("a", 1), ("b", 2)):
        save_scene(archive / "dem" / f"{place}.tif", textured((1, 70, 100), seed=seed))
    save_scene(archive / "s2" / "a_20200101.tif", image(3))
    run_job(str(archive), tmp_path / "store", config, Watching())
    save_scene(archive / "s2" / "a_20200201.tif", image(4))
    save_scene(archive / "s2" / "b_20200101.tif", image(5))
    run_job(str(archive), tmp_path / "store", config, Watching(), append=True)
    run_job(str(archive), tmp_path / "whole", config, Watching())
    grown, whole = open_store(tmp_path / "store"), open_store(tmp_path / "whole")
    assert rows_by_id(grown) == rows_by_id(whole)
    for name in ("s2", "dem"):
        assert_equal_tiles(tiles(grown, modality=name), tiles(whole, modality=name))


def test_the_command_line_appends_lists_commits_and_reads_earlier_ones(archive, tmp_path, capsys):
    options = [part for s in SETTINGS for part in ("--set", s)]
    store = tmp_path / "store"
    assert aptile("preprocess", archive, store, *options) == 0
    further(archive)
    assert aptile("preprocess", archive, store, *options, "--append") == 3
    assert "6 inputs = 5 done + 1 quarantined + 0 skipped; 36 tiles" in capsys.readouterr().err
    assert aptile("log", store) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["commit", "1", "2"]
    assert "preprocess" in lines[1]
    assert "append" in lines[2]
    assert aptile("inspect", store, "--commit", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == 24
    assert aptile("inspect", store, "--commit", 3) == 2
    assert "no commit 3; there are 1 to 2, see `aptile log`" in capsys.readouterr().err
    assert aptile("preprocess", archive, store, *options, "--retry-quarantined") == 2
    assert "has no effect without --append" in capsys.readouterr().err
    assert aptile("log", tmp_path) == 2
    assert "no commit here" in capsys.readouterr().err
