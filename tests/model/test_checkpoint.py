"""Nested training state in one safetensors file, and nothing else in that file."""

import errno
import json
import math
import os
import pickle
import struct
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint import SafetensorsCheckpointIO, read_checkpoint
from pipeline.errors import StoreError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda shape, dtype, seed: torch.from_numpy(
        np.random.default_rng(seed).integers(0, 2**16, shape)
    ).to(dtype),
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
nested = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
states = st.dictionaries(keys, nested, max_size=4)


def same(a, b):
    """Equal, of the same types all the way down; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def save(state, path):
    SafetensorsCheckpointIO().save_checkpoint(state, path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint") / "c.safetensors"


@settings(max_examples=60)
@given(state=states)
def test_nested_state_comes_back_the_same(file, state):
    save(state, file)
    assert same(SafetensorsCheckpointIO().load_checkpoint(file), state)


@settings(max_examples=60)
@given(state=states)
def test_the_file_is_a_safetensors_header_in_json_and_the_tensors_bytes(file, state):
    """Nothing is left over that could be a pickle."""
    save(state, file)
    content = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    json.loads(header.pop("__metadata__")["aptile_state"])
    tensor_bytes = sum(end - begin for begin, end in (t["data_offsets"] for t in header.values()))
    assert len(content) == 8 + header_bytes + tensor_bytes


def test_a_whole_training_state_resumes_the_optimizer(file):
    """An optimiser that goes on from the file takes the same steps as one that was never stopped."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.arange(3.0)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    step(model, optimizer)

    other_model, other_optimizer = make()
    state = read_checkpoint(file)
    other_model.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    step(other_model, other_optimizer)
    assert torch.equal(other_model.weight, model.weight)


def test_tensors_that_share_memory_come_back_each_on_its_own(file):
    rows = torch.arange(6.0).view(2, 3)
    state = {"all": rows, "again": rows, "row": rows[1], "columns": rows.T}
    save(state, file)
    assert same(read_checkpoint(file), state)


def test_the_state_can_be_read_without_its_tensors(file):
    save({"global_step": 7, "weights": [torch.ones(2), None]}, file)
    state = read_checkpoint(file, with_tensors=False)
    assert state["global_step"] == 7
    assert isinstance(state["weights"][0], str)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", 1j, np.int64(1), np.zeros(2), Decimal(1), print],
    ids=lambda value: type(value).__name__,
)
def test_a_type_json_lacks_is_refused_and_the_last_checkpoint_stays(tmp_path, value):
    file = tmp_path / "c.safetensors"
    save({"step": 1}, file)
    with pytest.raises(TypeError, match=type(value).__name__):
        save({"step": 2, "deep": [{"down": value}]}, file)
    assert read_checkpoint(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_costs_the_new_checkpoint_not_the_last_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left on device")

    file = tmp_path / "c.safetensors"
    save({"step": 1}, file)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save({"step": 2}, file)
    assert read_checkpoint(file) == {"step": 1}


def test_a_checkpoint_replaces_the_last_one_and_can_be_removed(tmp_path):
    file = tmp_path / "new" / "c.safetensors"
    for step in (1, 2):
        save({"step": step}, file)
    assert read_checkpoint(file) == {"step": 2}
    assert list(file.parent.iterdir()) == [file]
    for _ in range(2):
        SafetensorsCheckpointIO().remove_checkpoint(file)
    assert not file.exists()


def with_metadata(state):
    return lambda path: save_file(
        {"000000": torch.zeros(2)}, path, metadata={"aptile_state": state}
    )


def truncated(keep):
    def write(path):
        save({"a": torch.zeros(1000), "b": [1, 2]}, path)
        path.write_bytes(path.read_bytes()[:keep])

    return write


def overwritten_header(path):
    save({"a": torch.zeros(10)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" * 20 + content[28:])


UNREADABLE = {
    "absent": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in the length": truncated(4),
    "cut in the header": truncated(40),
    "cut in the tensors": truncated(-100),
    "overwritten header": overwritten_header,
    "text": lambda path: path.write_text("step,loss\n0,1.5\n" * 20),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "torch.save": lambda path: torch.save({"global_step": 1}, path),
    "safetensors of something else": lambda path: save_file({"w": torch.zeros(2)}, path),
    "not JSON": with_metadata("global_step: 3"),
    "JSON without tags": with_metadata('{"global_step": 3}'),
    "unknown tag": with_metadata('["dict", [[["value", "a"], ["call", "os.system"]]]]'),
    "not a dict": with_metadata('["value", 3]'),
    "unhashable key": with_metadata('["dict", [[["list", []], ["value", 1]]]]'),
    "nested without end": with_metadata("[" * 100_000),
}


@pytest.mark.parametrize("write", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("with_tensors", [True, False])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, with_tensors, write):
    path = tmp_path / "strange.safetensors"
    write(path)
    with pytest.raises(StoreError, match=r"strange\.safetensors: not a checkpoint") as refused:
        read_checkpoint(path, with_tensors)
    assert "\n" not in str(refused.value)


def test_a_reference_to_a_tensor_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "strange.safetensors"
    with_metadata('["dict", [[["value", "a"], ["tensor", "000001"]]]]')(path)
    with pytest.raises(StoreError, match=r"strange\.safetensors: not a checkpoint"):
        read_checkpoint(path)
