"""Memory that is used again, and never while something still refers to it."""

import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data.buffers import BufferPool, _rounded

SHAPE = (4, 3, 128, 128)


def address(array):
    return array.__array_interface__["data"][0]


def taken(pool):
    """An array and where it lies; dropping the array gives its memory back."""
    array = pool.take(SHAPE, np.uint16)
    array[...] = 7
    return array, address(array)


def test_memory_comes_back_once_its_array_is_gone():
    pool = BufferPool()
    array, first = taken(pool)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == (SHAPE, np.uint16, True)
    assert array.flags.writeable
    other, second = taken(pool)
    assert second != first
    del array
    assert pool.free_bytes == other.nbytes
    assert taken(pool)[1] == first


DERIVED = {
    "the array": lambda a: a,
    "a slice": lambda a: a[2:3, 1, 5:7],
    "a slice of a slice": lambda a: a[1:][1:][..., 3],
    "another type": lambda a: a.view(np.uint8)[..., 1::2],
    "a transposed view": lambda a: a.transpose(3, 0, 1, 2)[4:],
    "a tensor": torch.from_numpy,
    "a slice of a tensor": lambda a: torch.from_numpy(a)[2:3, 1, 5:7],
    "a tensor of a slice": lambda a: torch.from_numpy(a[1:2])[0, 0, 0],
    "numpy of a tensor": lambda a: torch.from_numpy(a)[1:].numpy(),
    "numpy of a slice of a tensor": lambda a: torch.from_numpy(a)[3].numpy()[1:],
    "a tensor's other view": lambda a: torch.from_numpy(a).view(torch.uint8).permute(3, 2, 1, 0)[9],
    "a detached tensor": lambda a: torch.from_numpy(a)[0].detach(),
    "a tensor's storage": lambda a: torch.from_numpy(a).untyped_storage(),
    "through dlpack": lambda a: torch.from_dlpack(np.from_dlpack(a))[1],
    "a buffer": lambda a: memoryview(a[1]),
    "unbound": lambda a: torch.from_numpy(a).unbind()[2],
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_whatever_is_derived_from_an_array_keeps_its_memory(derive):
    pool = BufferPool()
    array, first = taken(pool)
    derived = derive(array)
    del array
    assert pool.free_bytes == 0
    _, second = taken(pool)
    assert second != first
    del derived
    assert first in {taken(pool)[1], *(address(block) for block in pool._free)}


def test_a_copy_lets_the_memory_go():
    pool = BufferPool()
    array, first = taken(pool)
    copies = [array.copy(), torch.from_numpy(array).clone(), pickle.loads(pickle.dumps(array))]  # noqa: S301
    del array
    assert taken(pool)[1] == first
    assert all((np.asarray(copy) == 7).all() for copy in copies)


def test_memory_in_a_reference_cycle_comes_back_with_the_garbage():
    pool = BufferPool()
    array, first = taken(pool)
    cycle = [torch.from_numpy(array)[1]]
    cycle.append(cycle)
    del array, cycle
    gc.collect()
    assert taken(pool)[1] == first


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30), limit=st.integers(0, 40))
def test_what_lies_idle_is_bounded(sizes, limit):
    mib = 1 << 20
    pool = BufferPool(max_free_bytes=limit * mib)
    arrays = [pool.take((size, mib // 8), np.uint8) for size in sizes]
    del arrays
    assert pool.free_bytes <= limit * mib
    assert pool.free_bytes == sum(block.nbytes for block in pool._free)


@given(nbytes=st.integers(1 << 17, 1 << 40))
def test_a_block_is_at_most_a_quarter_larger_than_asked_for(nbytes):
    assert nbytes <= _rounded(nbytes) < 1.25 * nbytes
    assert _rounded(_rounded(nbytes)) == _rounded(nbytes)


@pytest.mark.parametrize("shape", [(0, 3, 4), (), (5,), (2, 3, 128, 128)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "bool", "int64"])
def test_any_shape_and_type_can_be_had(shape, dtype):
    array = BufferPool().take(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.flags.c_contiguous
    assert array.flags.aligned


def test_threads_never_share_memory():
    """Every thread writes its own number and finds it again, while arrays die in other threads."""
    pool, wrong, passed_on = BufferPool(), [], []

    def work(number):
        for _ in range(300):
            array = pool.take((1 << 18,), np.uint8)
            array[:] = number
            tensor = torch.from_numpy(array)[1000:2000]
            del array
            passed_on.append(tensor)
            wrong.extend(t for t in passed_on[-3:] if t.unique().numel() != 1)
            if len(passed_on) > 8:
                passed_on.pop(0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_another_process_begins_with_an_empty_pool():
    pool = BufferPool(max_free_bytes=5 << 20)
    taken(pool)
    again = pickle.loads(pickle.dumps(pool))  # noqa: S301
    assert (again.max_free_bytes, again.pinned, again.free_bytes) == (5 << 20, False, 0)
    assert taken(again)[0].shape == SHAPE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_memory_is_pinned_and_not_reused_during_a_copy():
    pool = BufferPool(pinned=True)
    for number in range(50):
        array = pool.take((1 << 24,), np.uint8)
        array[:] = number
        tensor = torch.from_numpy(array)
        assert tensor.is_pinned()
        on_device = tensor.to("cuda", non_blocking=True)
        del array, tensor
        pool.take((1 << 24,), np.uint8)[:] = 255
        assert (on_device == number).all()
