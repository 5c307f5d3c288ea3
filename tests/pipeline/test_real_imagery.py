"""The laws of scores and partitions on crops of real scenes."""

import numpy as np
import pytest
import rasterio
import spyndex
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from pipeline import partition_image, score_maps, segments
from pipeline.quadtree import partition_scales
from pipeline.scorers.config import EntropyConfig

RANGE = (0.0, 10_000.0)
CHIP = spyndex.datasets.open("sentinel").transpose("band", "y", "x").values.astype(np.uint16)
corners = st.tuples(st.integers(0, 300 - 48), st.integers(0, 300 - 48))


def maps(image, p=4):
    return score_maps(image, base_patch_size=p, num_scales=3, value_range=RANGE)


@given(corners, st.sampled_from([2, 4]))
@settings(max_examples=10)
def test_scores_equal_the_definition(corner, p):
    image = np.ascontiguousarray(CHIP[:3, corner[0] :, corner[1] :][:, :48, :48])
    for scale, found in enumerate(maps(image, p)):
        valid = np.ones(image.shape[1:], np.bool_)
        expected = oracle.score_map(image, valid, p * 2**scale, 32, [RANGE] * 3)
        np.testing.assert_allclose(found, expected, atol=2e-6)


@given(corners, st.integers(0, 3), st.booleans())
@settings(max_examples=10)
def test_turning_the_image_turns_the_partition(corner, quarters, flip):
    image = CHIP[:3, corner[0] :, corner[1] :][:, :48, :48]

    def moved(array):
        turned = np.rot90(array, quarters, axes=(-2, -1))
        return np.ascontiguousarray(turned[..., ::-1] if flip else turned)

    def cell_scales(picture):
        partition = partition_image(
            picture, base_patch_size=4, num_scales=3, thresholds=(0.6, 1.1), value_range=RANGE
        )
        cells = np.empty(partition.grid.num_cells, np.uint8)
        runs = segments.run_lengths(partition.scales)
        cells[partition.grid.storage_order] = np.repeat(partition.scales, runs)
        return cells.reshape(partition.grid.rows, partition.grid.cols)

    np.testing.assert_array_equal(
        cell_scales(moved(image)), moved(cell_scales(np.ascontiguousarray(image)))
    )


@given(st.floats(0, 4), st.floats(0, 5))
@settings(max_examples=20)
def test_counts_from_stored_maps_equal_those_from_pixels(fine, coarse):
    partition = partition_image(
        CHIP[:3], base_patch_size=4, num_scales=3, thresholds=(fine, coarse), value_range=RANGE
    )
    again = partition_scales(maps(CHIP[:3]), (fine, coarse), partition.grid)
    np.testing.assert_array_equal(again, partition.scales)


@pytest.mark.parametrize("name", ["patch_445", "patch_502692", "patch_511198", "patch_57755"])
def test_every_scene_keeps_large_patches_where_it_is_flat(satclip, name):
    with rasterio.open(satclip / f"{name}.tif") as raster:
        image = raster.read([2, 3, 4])
    partition = partition_image(
        image, base_patch_size=4, num_scales=3, num_tokens=1024, value_range=RANGE
    )
    spread = image.astype(np.float64).reshape(3, 16, 16, 16, 16).std((2, 4)).mean(0)
    leaves = partition.descriptors
    large = leaves[leaves["scale"] == 2]
    kept = np.zeros((16, 16), np.bool_)
    kept[large["y"] // 4, large["x"] // 4] = True
    assert spread[kept].mean() < 0.7 * spread[~kept].mean()


@pytest.mark.full
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_bins", [2, 16, 32, 100, 512])
def test_all_pixels_of_all_scenes_score_as_defined(satclip, p, num_bins):
    for path in sorted(satclip.glob("*.tif")):
        with rasterio.open(path) as raster:
            image = raster.read([2, 3, 4])[:, :192, :192]
        config = EntropyConfig(num_bins=num_bins)
        found = score_maps(image, base_patch_size=p, num_scales=3, value_range=RANGE, scorer=config)
        valid = np.ones(image.shape[1:], np.bool_)
        for scale, level in enumerate(found):
            expected = oracle.score_map(image, valid, p * 2**scale, num_bins, [RANGE] * 3)
            np.testing.assert_allclose(
                level[: len(expected), : len(expected[0])], expected, atol=3e-6
            )
