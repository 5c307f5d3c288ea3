import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid, covering_grid, pad_to_grid

grids = st.builds(
    lambda rows, cols, p, scales: BaseGrid(
        rows * 2 ** (scales - 1), cols * 2 ** (scales - 1), p, scales
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 4),
)


def test_storage_order_of_two_roots_is_row_of_roots_then_z_order():
    grid = BaseGrid(rows=4, cols=8, base_patch_size=4, num_scales=3)
    assert grid.cell_yx[:16].tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
        [2, 0], [2, 1], [3, 0], [3, 1], [2, 2], [2, 3], [3, 2], [3, 3],
    ]  # fmt: skip
    assert grid.cell_yx[16].tolist() == [0, 4]


@given(grids)
def test_storage_order_is_a_permutation(grid):
    assert sorted(grid.storage_order.tolist()) == list(range(grid.num_cells))


@given(grids)
def test_every_node_is_one_run_of_cells(grid):
    for scale in range(grid.num_scales):
        node = grid.cell_yx >> scale
        runs = node.reshape(-1, 4**scale, 2)
        assert (runs == runs[:, :1]).all()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 6), st.integers(1, 4))
def test_any_image_is_covered_by_whole_roots_and_no_more(height, width, p, num_scales):
    grid = covering_grid(height, width, p, num_scales)
    for covered, size in zip(grid.shape_px, (height, width), strict=True):
        assert covered % grid.root_size_px == 0
        assert covered - grid.root_size_px < size <= covered


def test_padding_keeps_the_image_and_adds_zeros():
    grid = covering_grid(5, 7, 2, 2)
    image = np.ones((3, 5, 7))
    padded = pad_to_grid(image, grid)
    assert padded.shape == (3, 8, 8)
    assert padded.sum() == image.sum()
    assert (padded[:, :5, :7] == 1).all()


def test_part_of_a_root_is_refused():
    with pytest.raises(ConfigError, match="multiple of 16 px"):
        BaseGrid(rows=6, cols=8, base_patch_size=4, num_scales=3)
