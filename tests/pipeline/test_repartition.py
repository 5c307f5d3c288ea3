import json
import shutil

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given
from hypothesis import strategies as st

from model import TileDataset
from pipeline import open_store, partition_image, score_maps, segments
from pipeline.calibrate import store_curve, token_curve
from pipeline.cut import leaves, splits_by_thresholds
from pipeline.errors import ConfigError, IntegrityError, LockedError, StoreError
from pipeline.grid import BaseGrid
from pipeline.jobs.repartition import repartition
from pipeline.nodes import node_scores, shared_maps, shared_nodes
from pipeline.quadtree import budget_scales, partition_scales
from pipeline.rules import FurtherRule
from pipeline.settings.run import RunConfig
from pipeline.storage.lock import exclusive
from pipeline.storage.objects import LocalObjects
from pipeline.storage.partitions import PartitionLedger, partition_ledger_name
from pipeline.storage.places import FrameRun
from support import (
    Watching,
    aptile,
    assert_same_bytes,
    files,
    grids_and_maps,
    save_scene,
    textured,
)

pytestmark = pytest.mark.usefixtures("kept_workers")

SCORING = {"base_patch_size": 4, "num_scales": 3, "value_range": (0, 10_000)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """35 tiles in 9 shards; the archive is gone."""
    folder = tmp_path_factory.mktemp("made")
    first = textured((3, 100, 150), seed=1)
    first[:, 40:75, 60:] = 0
    save_scene(folder / "archive" / "a.tif", first, nodata=0)
    save_scene(folder / "archive" / "b.tif", textured((3, 130, 70), seed=2))
    sizes = ("store.tile_size_px=32", "store.shard_tiles=4", "modality.value_range=[0, 10000]")
    options = [part for size in sizes for part in ("--set", size)]
    assert aptile("preprocess", folder / "archive", folder / "store", "--workers", 1, *options) == 0
    shutil.rmtree(folder / "archive")
    return folder / "store"


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """One place at two dates and another at one: 20 tiles of two frames and 15 of one, some in strips of
    invalid pixels; 9 shards."""
    folder = tmp_path_factory.mktemp("series")
    for number, date in enumerate(("20200101", "20200203")):
        image = textured((3, 100, 150), seed=number)
        image[:, 40:75, 60 * number :] = 0
        save_scene(folder / "archive" / f"a_{date}.tif", image, nodata=0)
    save_scene(folder / "archive" / "b_20200101.tif", textured((3, 130, 70), seed=2))
    settings = (
        "store.tile_size_px=32",
        "store.shard_tiles=4",
        "modality.value_range=[0, 10000]",
        "modality.pattern='{tile}_{date}.tif'",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    assert aptile("preprocess", folder / "archive", folder / "store", "--workers", 1, *options) == 0
    return folder / "store"


@pytest.fixture
def two_frames(series, tmp_path):
    return shutil.copytree(series, tmp_path / "series")


def cut(store, name, workers=1, observer=None, **rule):
    return repartition(
        store, name, FurtherRule(**rule), RunConfig(workers=workers), observer or Watching()
    )


def all_scales(store, name):
    opened = open_store(store)
    return [opened.tile(row["id"], partition=name).scales for row in opened.manifest.to_pylist()]


def test_the_default_rule_from_stored_maps_gives_the_default_partition(store):
    report = cut(store, "again", quantile=0.5)
    assert report.thresholds is None
    for array in ("scales", "counts", "tokens"):
        first = store / "image" / "partitions" / "default" / array
        assert_same_bytes(first, store / "image" / "partitions" / "again" / array)


def test_partitions_from_stored_maps_equal_those_from_pixels(store):
    cut(store, "fixed", thresholds=(0.5, 2.25))
    cut(store, "budget", tokens_per_tile=30)
    cut(store, "uniform", uniform_px=8)
    opened = open_store(store)
    for row in opened.manifest.to_pylist():
        tile = opened.tile(row["id"], partition="fixed")
        valid = tile.valid[0]
        made = partition_image(tile.pixels[0], thresholds=(0.5, 2.25), valid=valid, **SCORING)
        np.testing.assert_array_equal(tile.scales[0], made.scales)
        maps = score_maps(tile.pixels[0], valid=valid, **SCORING)
        budget = opened.tile(row["id"], partition="budget").scales[0]
        np.testing.assert_array_equal(budget, budget_scales(maps, 30, tile.grid))
        uniform = opened.tile(row["id"], partition="uniform").scales[0]
        assert (segments.levels(uniform)[~segments.is_missing(uniform)] == 1).all()


def test_the_bytes_do_not_depend_on_the_number_of_workers(store, tmp_path):
    other = shutil.copytree(store, tmp_path / "other")
    assert cut(store, "lean", tokens_per_tile=20).shards_written == 9
    assert cut(other, "lean", workers=2, tokens_per_tile=20).shards_written == 9
    assert_same_bytes(store, other)


@pytest.mark.parametrize("rule", [{"tokens_per_tile": 20}, {"mean_tokens": 21.5}])
def test_an_interrupted_run_is_completed_to_the_same_bytes(store, tmp_path, rule):
    whole = shutil.copytree(store, tmp_path / "whole")
    cut(whole, "lean", **rule)
    with pytest.raises(KeyboardInterrupt):
        cut(store, "lean", observer=Watching(interrupt_after=4), **rule)
    assert open_store(store).partitions("image") == ["default"]
    with pytest.raises(StoreError, match="no partition 'lean'; there are default"):
        open_store(store).partition("lean")
    group = store / "image" / "partitions" / "lean"
    (group / "scales" / "left.9.partial").write_bytes(b"by a killed writer")
    with (store / partition_ledger_name("image", "lean", 1)).open("ab") as file:
        file.write(b'{"shard": 8, "obj')
    with pytest.raises(StoreError, match="is made by .*, not by uniform_px 8"):
        cut(store, "lean", uniform_px=8)
    watching = Watching()
    report = cut(store, "lean", observer=watching, **rule)
    assert report.shards_written == watching.done == 5
    assert report.committed
    assert watching.tiles == 35
    assert_same_bytes(store, whole)


def test_a_run_killed_before_its_first_row_starts_anew(store, tmp_path):
    whole = shutil.copytree(store, tmp_path / "whole")
    cut(whole, "lean", uniform_px=8)
    group = store / "image" / "partitions" / "lean"
    group.mkdir()
    (group / "zarr.json").write_text("half")
    cut(store, "lean", uniform_px=8)
    assert_same_bytes(store, whole)


def test_a_finished_partition_is_left_alone(store):
    cut(store, "lean", thresholds=(1.0, float("inf")))
    before = {name: (store / name).stat().st_mtime_ns for name in files(store)}
    report = cut(store, "lean", thresholds=(1.0, float("inf")))
    assert (report.shards_written, report.committed) == (0, False)
    assert {name: (store / name).stat().st_mtime_ns for name in files(store)} == before
    with pytest.raises(StoreError, match=r"made by thresholds 1.0,inf, not by thresholds 1.0,2.0"):
        cut(store, "lean", thresholds=(1.0, 2.0))


def test_two_writers_are_refused(store):
    with exclusive(LocalObjects(store)), pytest.raises(LockedError, match="is being written"):
        cut(store, "lean", uniform_px=8)


def test_readers_take_a_partition_by_name(store):
    report = cut(store, "lean", tokens_per_tile=20)
    opened = open_store(store)
    assert opened.partitions("image") == ["default", "lean"]
    lean = opened.partition("lean")
    assert (lean.name, lean.rule, lean.thresholds) == ("lean", {"tokens_per_tile": 20}, None)
    assert opened.partition("default").rule == {"quantile": 0.5}
    assert lean.tokens.shape == (36, 3)
    assert lean.tokens.sum(1).max() == 20
    assert lean.tokens.sum() == pytest.approx(report.mean_tokens * 35)
    dataset = TileDataset(opened, partition="lean")
    numbers = [np.count_nonzero(~segments.is_missing(s)) for (s,) in all_scales(store, "lean")]
    assert dataset.batch(range(35)).num_tokens == sum(numbers)
    assert [
        np.count_nonzero(~segments.is_missing(dataset[i].scales[0])) for i in range(35)
    ] == numbers
    with pytest.raises(StoreError, match="no partition 'fat'; there are default, lean"):
        TileDataset(opened, partition="fat")
    with pytest.raises(StoreError, match="no partition 'fat'"):
        opened.read_frames("image", np.arange(2), "fat")


@pytest.mark.parametrize("name", ["scales/c/1", "counts/c/3", "ledger/000001.jsonl"])
def test_a_damaged_partition_is_no_data(store, name):
    cut(store, "lean", tokens_per_tile=20)
    path = store / "image" / "partitions" / "lean" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match="damaged"):
        open_store(store).partition("lean")
    with pytest.raises(IntegrityError, match="damaged"):
        all_scales(store, "lean")
    all_scales(store, "default")


def test_a_lost_score_map_is_not_taken_for_missing_pixels(store):
    (store / "image" / "score_8" / "c" / "2" / "0" / "0").unlink()
    with pytest.raises(IntegrityError, match="score_8/c/2/0/0 is missing"):
        cut(store, "lean", tokens_per_tile=20)
    with pytest.raises(IntegrityError, match="score_8/c/2/0/0 is missing"):
        store_curve(open_store(store), "image")


def test_xarray_opens_a_partition_without_a_warning(store):
    cut(store, "lean", tokens_per_tile=20)
    dataset = xr.open_zarr(store, group="image/partitions/lean")
    assert dataset["tokens"].dims == ("frame", "scale")
    listed = json.loads((store / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert "image/partitions/lean/scales" in listed


def test_timesteps_may_share_a_partition(two_frames):
    cut(two_frames, "alone", thresholds=(2.0, 2.3))
    for how in ("max", "mean"):
        report = cut(two_frames, how, thresholds=(2.0, 2.3), shared=how)
        opened = open_store(two_frames)
        counts = []
        for row in opened.manifest.to_pylist():
            tile = opened.tile(row["id"], partition=how)
            counts.append(sum(np.count_nonzero(~segments.is_missing(s)) for s in tile.scales))
            shared = partition_scales(shared_maps(tile.score_maps, how), (2.0, 2.3), tile.grid)
            for frame, scales in enumerate(tile.scales):
                np.testing.assert_array_equal(segments.levels(scales), segments.levels(shared))
                own = segments.leaf_scores(scales, tile.grid, [m[frame] for m in tile.score_maps])
                np.testing.assert_array_equal(segments.is_missing(scales), np.isnan(own))
        assert report.mean_tokens == pytest.approx(np.mean(counts))
    alone, together = (open_store(two_frames).partition(name).tokens for name in ("alone", "max"))
    assert (alone != together).any()


def test_a_shared_quantile_is_of_the_shared_scores(two_frames):
    cut(two_frames, "shared", quantile=0.5, shared="max")
    every = all_scales(two_frames, "shared")
    assert [len(scales) for scales in every] == [2] * 20 + [1] * 15
    for scales in every[:20]:
        np.testing.assert_array_equal(segments.levels(scales[0]), segments.levels(scales[1]))


def test_the_default_rule_of_a_series_is_that_of_each_date(two_frames):
    cut(two_frames, "again", quantile=0.5)
    for array in ("scales", "counts", "tokens"):
        first = two_frames / "image" / "partitions" / "default" / array
        assert_same_bytes(first, two_frames / "image" / "partitions" / "again" / array)


@pytest.mark.parametrize("shared", [None, "max", "mean"])
def test_the_mean_of_several_timesteps_is_per_tile(two_frames, shared):
    report = cut(two_frames, "mean", mean_tokens=40, shared=shared)
    curve = store_curve(open_store(two_frames), "image", shared)
    assert report.mean_tokens == curve.mean_tokens(curve.quantile_for(40)) <= 40
    assert report.mean_tokens > 30


def test_sharing_where_there_is_one_timestep_is_refused(store):
    with pytest.raises(ConfigError, match="shared max has no effect: every tile"):
        cut(store, "lean", tokens_per_tile=20, shared="max")


def count(nodes, thresholds, grid, maps):
    return sum(
        np.count_nonzero(
            ~segments.is_missing(partition_scales([m[f] for m in maps], thresholds, grid))
        )
        for f in range(len(nodes))
    )


@given(grids_and_maps(num_frames=3), st.floats(0, 1))
def test_the_curve_is_exact_at_every_quantile(case, quantile):
    grid, maps = case
    nodes = node_scores(maps, grid)
    curve = token_curve([(nodes, FrameRun(np.arange(3), np.arange(3)))], grid)
    tokens = count(nodes, curve.thresholds(quantile), grid, maps)
    assert curve.mean_tokens(quantile) == tokens / 3


@given(grids_and_maps(num_frames=3), st.floats(0, 1))
def test_calibration_takes_the_nearest_step_below(case, wish):
    grid, maps = case
    assume(grid.num_scales > 1)
    nodes = node_scores(maps, grid)
    curve = token_curve([(nodes, FrameRun(np.arange(3), np.arange(3)))], grid)
    fewest, most = curve.mean_tokens(1.0), curve.mean_tokens(0.0)
    wanted = min(most, fewest + wish * (most - fewest))
    got = curve.mean_tokens(curve.quantile_for(wanted))
    steps = {
        curve.mean_tokens(q)
        for n in (len(s) for s in curve.scores)
        for q in np.arange(n + 1) / max(1, n)
    }
    assert got <= wanted
    assert got == max(step for step in steps | {fewest} if step <= wanted)


def test_calibration_hits_the_mean_where_scores_differ():
    grid = BaseGrid(16, 16, 4, 3)
    rng = np.random.default_rng(0)
    maps = [rng.random((50, 16 >> s, 16 >> s)).astype(np.float32) for s in range(3)]
    nodes = node_scores(maps, grid)
    curve = token_curve([(nodes, FrameRun(np.arange(50), np.arange(50)))], grid)
    for wanted in (20, 64, 128, 250):
        thresholds = curve.thresholds(curve.quantile_for(wanted))
        assert 0.99 * wanted <= count(nodes, thresholds, grid, maps) / 50 <= wanted


@given(grids_and_maps(num_frames=4), st.sampled_from(["max", "mean"]), st.floats(0, 1))
def test_the_curve_of_shared_partitions_counts_each_frames_own_tokens(case, how, quantile):
    grid, maps = case
    nodes, starts = node_scores(maps, grid), np.array([0, 3])
    curve = token_curve([(nodes, FrameRun(np.arange(4), starts))], grid, how)
    together = shared_nodes(nodes, starts, how)
    splits = splits_by_thresholds(together, curve.thresholds(quantile), grid)
    made = leaves(np.repeat(splits, [3, 1], axis=0), nodes, grid)
    assert curve.mean_tokens(quantile) == made.tokens.sum() / 2


def test_a_ledger_without_its_head_is_damage(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"shard": 0, "objects": {}}\n')
    with pytest.raises(IntegrityError, match="does not say what partition"):
        PartitionLedger.read(LocalObjects(tmp_path), "ledger.jsonl")
