"""Merging runs of base tokens, against convolutions over the 2-D grid, token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d, linear
from torch.testing import assert_close

from model.config import EncoderConfig
from model.encoder import APTEncoder
from model.merge import RunMerge, average_runs
from pipeline.errors import ConfigError

WIDTH = 6
LEVELS = 3
SHARINGS = (("shared", None), ("per_level", LEVELS))
KINDS = [(*sharing, init) for sharing in SHARINGS for init in ("average", "kaiming", "zero")]


def grids_of_vectors(groups, seed=0):
    """Random float64 [frame, D, row, col] of every group."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            len(groups.modalities[m].leaves),
            WIDTH,
            groups.modalities[m].grid.rows,
            groups.modalities[m].grid.cols,
            generator=generator,
            dtype=torch.float64,
        ).requires_grad_()
        for m, _ in groups.numbers
    ]


def rows_of(groups, grids):
    """[M, D] of every group, in merging order."""
    found = []
    for (m, _), on_grid in zip(groups.numbers, grids, strict=True):
        at = torch.tensor(groups.modalities[m].rows(), dtype=torch.int64).reshape(-1, 3)
        found.append(on_grid[at[:, 0], :, at[:, 1], at[:, 2]])
    return found


def blocks(groups, grids):
    """(leaf, its vectors [D, side, side]) of every token, in the batch's order."""
    number = {group: i for i, group in enumerate(groups.numbers)}
    for m, b, frame, leaf in groups.tokens():
        side = 2**leaf.scale
        on_grid = grids[number[m, b]][frame]
        yield leaf, on_grid[:, leaf.y : leaf.y + side, leaf.x : leaf.x + side]


def convolved(merge, block, scale):
    """[D] of a block by 2x2 stride-2 convolutions."""
    for step in range(scale):
        # Stacks of 1, 2, 3, ... convolutions follow each other.
        which = 0 if merge.levels is None else scale * (scale - 1) // 2 + step
        kernel = merge.combine[which]
        # [out, (y, x), in] to [out, in, y, x]
        weight = kernel.weight.view(WIDTH, 2, 2, WIDTH).permute(0, 3, 1, 2)
        block = conv2d(block, weight, kernel.bias, stride=2)
    return block[:, 0, 0]


def merged_one_by_one(merge, groups, grids, resized):
    tokens = [torch.empty(0, WIDTH, dtype=torch.float64)]
    for number, (leaf, block) in enumerate(blocks(groups, grids)):
        token = convolved(merge, block, leaf.scale)
        if merge.init == "zero" and leaf.scale:
            residual = merge.residual[0 if merge.levels is None else leaf.scale - 1]
            token = resized[number] + linear(token, residual.weight, residual.bias)
        tokens.append(token[None])
    return torch.cat(tokens)


def random_merge(sharing, levels, init):
    torch.manual_seed(1)
    merge = RunMerge(WIDTH, sharing, levels, init).double()
    for parameter in merge.parameters():
        nn.init.normal_(parameter, std=0.5)
    return merge


def resized_for(merge, batch):
    """Random rows of all tokens; of those of scale 0 they must not matter."""
    if merge.init != "zero":
        return None
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(batch.num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    return rows.requires_grad_()


@pytest.mark.parametrize(("sharing", "levels", "init"), KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_merging_is_a_recursive_2x2_convolution_with_stride_2(
    data, groupsets, sharing, levels, init
):
    """Values, and gradients of the base rows, the resized patches and every weight."""
    groups = data.draw(groupsets)
    batch, grids = groups.pack(), grids_of_vectors(groups)
    merge = random_merge(sharing, levels, init)
    resized = resized_for(merge, batch)
    tokens = merge(rows_of(groups, grids), batch, resized)
    expected = merged_one_by_one(merge, groups, grids, resized)
    assert_close(tokens, expected, rtol=1e-9, atol=1e-9)
    inputs = [*grids, *merge.parameters(), *([] if resized is None else [resized])]
    weights = torch.linspace(-1, 1, tokens.numel(), dtype=torch.float64).view_as(tokens)
    found = torch.autograd.grad((tokens * weights).sum(), inputs, materialize_grads=True)
    wanted = (torch.zeros_like(value) for value in inputs)
    if len(expected):
        wanted = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)
    assert_close(found, tuple(wanted), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("sharing", "levels"), SHARINGS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_fresh_merge_gives_the_mean_of_the_base_tokens(data, groupsets, sharing, levels):
    groups = data.draw(groupsets)
    batch, grids = groups.pack(), grids_of_vectors(groups)
    rows = rows_of(groups, grids)
    means = [block.mean((1, 2))[None] for _, block in blocks(groups, grids)]
    means = torch.cat([torch.empty(0, WIDTH, dtype=torch.float64), *means])
    assert_close(average_runs(rows, batch), means)
    merge = RunMerge(WIDTH, sharing, levels, "average").double()
    assert_close(merge(rows, batch), means)
    # In float32 too, as models are trained.
    single = RunMerge(WIDTH, sharing, levels)([of.float() for of in rows], batch)
    assert_close(single, means.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sharing", "levels"), SHARINGS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_fresh_zero_merge_gives_the_resized_patches_to_the_last_bit(
    data, groupsets, sharing, levels
):
    groups = data.draw(groupsets)
    batch = groups.pack()
    rows = [of.float() for of in rows_of(groups, grids_of_vectors(groups))]
    merge = RunMerge(WIDTH, sharing, levels, "zero")
    resized = resized_for(merge, batch).float()
    tokens = merge(rows, batch, resized)
    coarse = batch.scales > 0
    assert torch.equal(tokens[coarse], resized[coarse])
    means = average_runs(rows, batch)
    assert torch.equal(tokens[~coarse], means[~coarse])


@pytest.mark.parametrize(("sharing", "levels", "init"), KINDS)
def test_base_tokens_pass_unchanged(make_groups, sharing, levels, init):
    groups = make_groups(6, 3, [(3, 2, 2), (1, 1, 2), (2, 1, 1)])
    batch, grids = groups.pack(), grids_of_vectors(groups)
    merge = random_merge(sharing, levels, init)
    tokens = merge(rows_of(groups, grids), batch, resized_for(merge, batch))
    seen = 0
    for number, (leaf, block) in enumerate(blocks(groups, grids)):
        if leaf.scale == 0:
            assert torch.equal(tokens[number], block[:, 0, 0])
            seen += 1
    assert 0 < seen < len(tokens)


def test_tokens_of_one_scale_of_one_group_are_in_order_already(make_tiles):
    uniform = make_tiles(split_share=1.0, tiles=[(2, 0.3), (1, 0.0)]).pack()
    assert uniform.merge.token_order is None
    assert make_tiles().pack().merge.token_order is not None


@pytest.mark.parametrize(("sharing", "levels", "init"), KINDS)
def test_every_weight_has_a_gradient_whatever_the_batch_holds(make_tiles, sharing, levels, init):
    """Else data parallel training would wait for those that do not come."""
    merge = random_merge(sharing, levels, init)
    for num_scales, missing in ((1, 0.0), (2, 0.0), (2, 1.0)):
        batch = make_tiles(tiles=[(1, missing)], num_scales=num_scales).pack()
        rows = torch.ones(len(batch.cell_index(0)), WIDTH, dtype=torch.float64)
        merge.zero_grad()
        merge([rows], batch, resized_for(merge, batch)).sum().backward()
        assert all(parameter.grad is not None for parameter in merge.parameters())


def test_how_many_weights_a_merge_has():
    """One convolution, or stacks of 1, 2, ... of them; a linear map per stack for "zero"."""
    combine, residual = WIDTH * 4 * WIDTH + WIDTH, WIDTH * WIDTH + WIDTH
    for args, expected in (
        (("shared", None, "average"), combine),
        (("shared", None, "zero"), combine + residual),
        (("per_level", 3, "average"), 6 * combine),
        (("per_level", 3, "zero"), 6 * combine + 3 * residual),
    ):
        assert sum(p.numel() for p in RunMerge(WIDTH, *args).parameters()) == expected


def test_kaiming_keeps_the_variance():
    torch.manual_seed(0)
    merge = RunMerge(256, init="kaiming")
    assert_close(
        merge.combine[0](torch.randn(2000, 1024)).var(), torch.tensor(1.0), rtol=0.05, atol=0
    )
    assert not merge.combine[0].bias.any()


def test_more_scales_than_levels_are_refused_in_words(make_tiles):
    batch = make_tiles(num_scales=3).pack()
    merge = RunMerge(WIDTH, "per_level", 1)
    with pytest.raises(
        ConfigError, match="merge_levels is 1, the batch .* scales up to 2"
    ) as error:
        merge([torch.ones(len(batch.cell_index(0)), WIDTH)], batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sharing", "levels"), [("shared", 2), ("per_level", None)])
def test_levels_belong_to_merging_per_level(sharing, levels):
    with pytest.raises(ValueError, match="give levels with 'per_level' and only then"):
        RunMerge(WIDTH, sharing, levels)


@pytest.mark.parametrize(("init", "given_it"), [("zero", False), ("average", True)])
def test_resized_patches_belong_to_zero(make_tiles, init, given_it):
    batch = make_tiles().pack()
    rows = torch.ones(len(batch.cell_index(0)), WIDTH)
    resized = torch.ones(batch.num_tokens, WIDTH) if given_it else None
    with pytest.raises(ValueError, match="resized"):
        RunMerge(WIDTH, init=init)([rows], batch, resized)


def test_every_base_row_gets_its_share_of_the_gradient(make_tiles):
    tiles = make_tiles()
    rows = torch.randn(len(tiles.rows()), WIDTH).requires_grad_()
    RunMerge(WIDTH)([rows], tiles.pack()).sum().backward()
    share = [4.0**-leaf.scale for _, leaf in tiles.merging_order() for _ in leaf.cells()]
    assert_close(rows.grad, torch.tensor(share)[:, None].expand_as(rows))


def shrunk_tiles(make_tiles, tiles, factor):
    """Tiles of roots only as tiles of base cells that are as large, their pixels averaged."""
    p = tiles.grid.base_patch_size
    squares = tiles.frames.pixels.astype(np.float32)
    for axis in (2, 3):
        squares = squares.reshape(*squares.shape[:axis], -1, factor, *squares.shape[axis + 1 :])
        squares = squares.mean(axis + 1)
    roots = tuple(n // factor for n in (tiles.grid.rows, tiles.grid.cols))
    small = make_tiles(
        tiles=[(int(n), 0.0) for n in tiles.frames_per_tile],
        num_roots=roots, base_patch_size=p, num_scales=1,
    )  # fmt: skip
    valid = np.ones(small.frames.valid.shape, bool)
    return replace(small, frames=replace(small.frames, pixels=squares, valid=valid))


@pytest.mark.parametrize("sharing", SHARINGS, ids=["shared", "per_level"])
def test_a_fresh_zero_encoder_gives_the_embedding_of_the_shrunk_image(
    make_tiles, make_encoder, sharing
):
    """Of an image of four times the pixel size, embedded as base cells."""
    tiles = make_tiles(tiles=[(2, 0.0), (1, 0.0)], num_scales=3, split_share=0.0)
    tiles = replace(
        tiles, frames=replace(tiles.frames, valid=np.ones(tiles.frames.valid.shape, bool))
    )
    merge, levels = sharing
    options = make_encoder().config.model_dump()
    options |= {"merge": merge, "merge_levels": levels, "merge_init": "zero"}
    encoders = []
    for metres in (10.0, 40.0):
        options["modalities"][0]["ground_sample_distance_m"] = metres
        torch.manual_seed(4)
        encoders.append(APTEncoder(EncoderConfig(**options)))
    adaptive, uniform = encoders
    found = adaptive.embed(tiles.pack())
    expected = uniform.embed(shrunk_tiles(make_tiles, tiles, 4).pack())
    assert len(found) == 6
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(make_encoder().embed(tiles.pack()), expected, atol=0.01)
