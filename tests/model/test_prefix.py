"""Tokens in front of sequences, and what comes out of an encoder."""

import pytest
import torch
from torch.utils import _pytree as pytree

from model.config import EncoderOptions
from model.encoded import Encoded
from model.prefix import PrefixTokens


def prefix_of(**options):
    return PrefixTokens(EncoderOptions(width=64, **options))


@pytest.mark.parametrize("location", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("class_token", [False, True])
def test_parts_are_what_was_put_in_front(class_token, registers, location, make_scene):
    batch, tile = make_scene().pack(), torch.tensor([0, 0, 2, 3, 3])
    prefix = prefix_of(class_token=class_token, register_tokens=registers, location_token=location)
    rows = prefix(batch, tile)
    assert rows.shape == (5, class_token + registers + location, 64)
    classes, found = prefix.parts(rows)
    assert (classes is None, found is None) == (not class_token, not registers)
    if classes is not None:
        assert torch.equal(classes, prefix.learned[:1].expand(5, -1))
    if found is not None:
        learned = prefix.learned[int(class_token) :]
        assert torch.equal(found, learned.expand(5, -1, -1))
    if location:
        assert torch.equal(rows[:, -1], prefix.location(batch.location)[tile])


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"register_tokens": 2}])
def test_outputs_are_known_by_what_wraps_modules(options, make_scene, make_scene_encoder):
    """All tensors of an output are found in it, and an output can be built of others."""
    encoded = make_scene_encoder(**options)(make_scene().pack())
    leaves, form = pytree.tree_flatten(encoded)
    own = [value for value in vars(encoded).values() if value is not None]
    assert [id(leaf) for leaf in leaves] == [id(value) for value in own]
    again = pytree.tree_unflatten([leaf + 1 for leaf in leaves], form)
    assert isinstance(again, Encoded)
    assert torch.equal(again.tokens, encoded.tokens + 1)
    assert again.visible is None
