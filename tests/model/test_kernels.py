"""Kernels of any patch size: a resized kernel answers a resized patch as before."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate
from torch.testing import assert_close

from model.kernels import bilinear_resize, resize_kernel

SIZES = st.integers(1, 16)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resized(patches, size):
    """By torch's own bilinear resize, which averages where it makes a patch smaller."""
    return interpolate(patches, (size, size), mode="bilinear", antialias=True)


def answers(patches, weight):
    """Of every kernel [D, C, s, s] to every patch [n, C, s, s]."""
    return torch.einsum("ncyx,dcyx->nd", patches, weight)


def slow_resize(row, size):
    """A row of pixels resized by the definition: triangles around the new pixels' centres."""
    ratio = len(row) / size
    reach = max(ratio, 1.0)
    new = []
    for place in range(size):
        centre = (place + 0.5) * ratio
        weights = [max(0.0, 1 - abs(i + 0.5 - centre) / reach) for i in range(len(row))]
        new.append(sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights))
    return new


@given(side=SIZES, size=st.integers(1, 32), seed=st.integers(0, 99))
def test_the_resize_is_bilinear(side, size, seed):
    row = drawn(side, seed=seed)
    assert_close(bilinear_resize(side, size) @ row.numpy(), np.array(slow_resize(row, size)))
    patches = drawn(2, 3, side, side, seed=seed)
    matrix = torch.from_numpy(bilinear_resize(side, size))
    assert_close(matrix @ patches @ matrix.T, resized(patches, size), rtol=0, atol=1e-6)


@given(side=SIZES, more=st.integers(0, 15), seed=st.integers(0, 99))
def test_a_larger_kernel_answers_a_larger_patch_exactly_as_before(side, more, seed):
    weight, patches = drawn(4, 3, side, side, seed=seed), drawn(5, 3, side, side, seed=seed + 1)
    size = side + more
    matrix = torch.from_numpy(bilinear_resize(side, size))
    after = answers(matrix @ patches @ matrix.T, resize_kernel(weight, size))
    assert_close(after, answers(patches, weight), rtol=0, atol=1e-10)


@given(side=SIZES, size=SIZES, seed=st.integers(0, 99))
def test_no_other_kernel_is_closer_over_patches_of_noise(side, size, seed):
    """A smaller kernel cannot say all; of its gradient by least squares nothing is left."""
    weight = drawn(2, 1, side, side, seed=seed)
    matrix = torch.from_numpy(bilinear_resize(side, size))
    new = resize_kernel(weight, size).requires_grad_()
    # Over independent pixels, the mean square of an answer is the sum of its squared weights.
    (matrix.T @ new @ matrix - weight).square().sum().backward()
    assert new.grad.abs().max() < 1e-9


@given(side=SIZES, size=SIZES)
def test_every_size_gives_a_kernel_and_larger_ones_weigh_a_constant_alike(side, size):
    weight = drawn(3, 2, side, side)
    new = resize_kernel(weight, size)
    assert new.shape == (3, 2, size, size)
    assert new.isfinite().all()
    if size >= side:
        assert_close(new.sum((2, 3)), weight.sum((2, 3)))


def test_the_same_size_is_the_weight_itself():
    weight = drawn(3, 2, 8, 8)
    assert resize_kernel(weight, 8) is weight


def test_there_and_back_is_the_same_kernel():
    weight = drawn(3, 2, 4, 4)
    matrix = torch.from_numpy(bilinear_resize(4, 9))
    assert_close(matrix.T @ resize_kernel(weight, 9) @ matrix, weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_gradients_reach_the_stored_kernel(size):
    weight = drawn(2, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: resize_kernel(w, size), weight)


def test_a_resize_first_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        resize_kernel(drawn(1, 1, 15, 15), 13)
    weight = drawn(1, 1, 15, 15).requires_grad_()
    resize_kernel(weight, 13).sum().backward()
    assert weight.grad.ne(0).any()


def test_autocast_leaves_the_kernel_in_full_precision():
    weight = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = resize_kernel(weight, 4)
    assert torch.equal(inside, resize_kernel(weight, 4))
