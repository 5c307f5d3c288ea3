"""Masks of tokens and of cells, against a reading cell by cell."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import DECODER, MISSING, ONLINE, TARGET_ONLY
from model.masks import with_cell_masks, with_token_masks
from pipeline.errors import ConfigError


def mask_by_hand(masks):
    """The rule, in words: the highest that is not MISSING; MISSING if all are."""
    there = [mask for mask in masks if mask != MISSING]
    return max(there) if there else MISSING


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_token_has_the_highest_mask_of_its_cells(data, groupsets, seed):
    groups, rng = data.draw(groupsets), np.random.default_rng(seed)
    batch = groups.pack()
    own = torch.from_numpy(rng.integers(0, 4, batch.num_tokens, np.uint8))
    masks = {}
    for m, tiles in enumerate(groups.modalities):
        if rng.random() < 0.7:
            shape = (len(tiles.leaves), tiles.grid.rows, tiles.grid.cols)
            shares = rng.dirichlet([0.3] * 4)
            masks[f"m{m}"] = torch.from_numpy(rng.choice(4, shape, p=shares).astype(np.uint8))
    masked = with_cell_masks(with_token_masks(batch, own), masks)
    for number, (m, _, frame, leaf) in enumerate(groups.tokens()):
        expected = int(own[number])
        if f"m{m}" in masks:
            expected = mask_by_hand([int(masks[f"m{m}"][frame, y, x]) for y, x in leaf.cells()])
        assert int(masked.mask[number]) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([ONLINE] * 4, ONLINE),
        ([ONLINE, ONLINE, TARGET_ONLY, ONLINE], TARGET_ONLY),
        ([DECODER, TARGET_ONLY, ONLINE, MISSING], DECODER),
        ([MISSING, ONLINE, MISSING, MISSING], ONLINE),
        ([MISSING] * 4, MISSING),
    ],
)
def test_the_rule(make_tiles, roots_of, cells, expected):
    tiles = make_tiles(tiles=[(1, 0.0)], num_roots=(1, 1), num_scales=2)
    batch = tiles.with_leaves([roots_of(tiles.grid)]).pack()
    mask = torch.tensor(cells, dtype=torch.uint8).view(1, 2, 2)
    assert with_cell_masks(batch, {"image": mask}).mask.tolist() == [expected]


def test_a_mask_changes_nothing_else(make_tiles):
    batch = make_tiles().pack()
    cells, plan = batch.cells(0, 0), batch.merge
    mask = torch.full((batch.num_tokens,), DECODER, dtype=torch.uint8)
    masked = with_token_masks(batch, mask)
    assert not batch.masked
    assert not batch.mask.any()
    assert masked.masked
    assert masked.mask is mask
    # Neither cut nor planned again.
    assert masked.cells(0, 0)[0] is cells[0]
    assert masked.merge is plan
    assert pickle.loads(pickle.dumps(masked)).masked  # noqa: S301


def test_what_is_derived_is_the_same_after_masking(make_groups):
    groups = make_groups(6, 3, [(3, 2, 2), (2, 1, 2)])
    before, after = groups.pack(), groups.pack()
    after = with_token_masks(after, torch.ones(after.num_tokens, dtype=torch.uint8))
    for m, b in groups.numbers:
        assert torch.equal(after.token_rows(m, b), before.token_rows(m, b))
        assert torch.equal(after.covering(m, b), before.covering(m, b))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), r"mask is torch.uint8 of shape \[3\]; expected"),
        (torch.zeros(1, dtype=torch.int64), r"mask is torch.int64 of shape \[1\]; expected"),
        (torch.tensor([4], dtype=torch.uint8), "mask holds 4; expected numbers from 0 to 3"),
    ],
)
def test_a_mask_that_is_none_is_refused_in_words(make_tiles, roots_of, mask, message):
    tiles = make_tiles(tiles=[(1, 0.0)], num_roots=(1, 1))
    batch = tiles.with_leaves([roots_of(tiles.grid)]).pack()
    with pytest.raises(ConfigError, match=message):
        with_token_masks(batch, mask)


def test_a_mask_of_cells_of_another_grid_is_refused_in_words(make_tiles):
    batch = make_tiles(tiles=[(1, 0.0)]).pack()
    for name, message in (("image", "mask of image is"), ("radar", "it has image")):
        with pytest.raises(ConfigError, match=message):
            with_cell_masks(batch, {name: torch.zeros(1, 3, 3, dtype=torch.uint8)})
