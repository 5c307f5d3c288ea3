"""Parameters and operations by formula, against the encoder itself and torch's own counting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.attention import per_sequence
from model.batch import DECODER, ONLINE
from model.config import BandSetConfig, EncoderConfig, ModalityConfig
from model.cost import Cost, GroupCounts, TokenCounts, count_flops, count_parameters
from model.encoder import APTEncoder
from model.masks import with_token_masks
from model.packing import BandSetArrays, TileArrays, pack

LEARNED = {"position": "learned", "position_cells": (4, 4)}
OPTIONS = {
    "default": {},
    "another kernel": {"kernel_px": 5},
    "learned positions": LEARNED,
    "learned positions of the grid": {"position": "learned", "position_cells": (8, 4)},
    "prefix": {"class_token": True, "register_tokens": 3, "location_token": True},
    "size position": {"size_position": True},
    "rotary": {"position": "rotary", "qk_norm": True},
    "per level": {"merge": "per_level", "merge_levels": 3},
    "zero": {"merge_init": "zero", "kernel_px": 3},
    "zero per level": {"merge_init": "zero", "merge": "per_level", "merge_levels": 2, **LEARNED},
    "swiglu": {"mlp": "swiglu", "mlp_ratio": 3.3, "layer_scale": 0.1},
    "per date": {"sequences": "date", "class_token": True, "width": 128},
    "windows": {"windows": 2, "global_every": 2, "depth": 3, "register_tokens": 1},
    "windows only": {"windows": 2},
}


def encoder_of(options):
    image = ModalityConfig(
        name="image",
        band_sets=(band_set("", "B0", "B1", "B2"), band_set("coarse", "B3")),
    )
    radar = ModalityConfig(name="radar", band_sets=(band_set("", "B0", "B1", "B2"),))
    given = {"width": 64, "depth": 2, "kernel_px": 2, **options}
    return APTEncoder(EncoderConfig(**given, modalities=(image, radar))).eval()


def band_set(name, *bands):
    return BandSetConfig(name=name, bands=bands, value_range=((0, 1000),) * len(bands))


@pytest.fixture(scope="module")
def batch(make_tiles):
    """Two modalities, one with a second band set of half the resolution."""
    tiles = [(2, 0.2), (1, 0.0), (3, 1.0)]
    image = make_tiles(seed=1, tiles=tiles, num_roots=(4, 2), num_scales=2).arrays()
    radar = make_tiles(seed=2, tiles=tiles, num_roots=(2, 2), base_patch_size=3).arrays()
    (fine,) = image.band_sets
    coarse = BandSetArrays(
        "coarse", ("B3",), fine.pixels[:, :1, ::2, ::2], fine.valid[:, ::2, ::2],
        fine.band_present[:, :1],
    )  # fmt: skip
    image = replace(image, band_sets=[fine, coarse])
    return pack(TileArrays(np.arange(3), [image, replace(radar, name="radar")]))


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_counted_one_by_one(name):
    encoder = encoder_of(OPTIONS[name])
    assert count_parameters(encoder.config) == parameters_by_part(encoder)


def parameters_by_part(encoder):
    part_of = {"embedding": "embed", "merge": "merge", "mlp": "mlp"}
    part_of |= dict.fromkeys(("qkv", "projection", "q_norm", "k_norm"), "attention")
    parts = dict.fromkeys(("embed", "merge", "attention", "mlp", "rest"), 0)
    for parameter, numbers in encoder.named_parameters():
        names = parameter.split(".")
        # Parts of the blocks have theirs at the fourth place.
        name = names[3] if names[:2] == ["stack", "blocks"] else names[0]
        parts[part_of.get(name, "rest")] += numbers.numel()
    return Cost(**parts)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_operations_are_those_torch_counts(name, masked, batch, monkeypatch):
    # torch does not count its kernel for the CPU, which the usual backend calls.
    monkeypatch.setattr("model.blocks.choose_attention", lambda *_: per_sequence)
    if masked:
        hidden = torch.arange(batch.num_tokens) % 3 == 0
        batch = with_token_masks(batch, torch.where(hidden, DECODER, ONLINE).to(torch.uint8))
    encoder = encoder_of(OPTIONS[name]).requires_grad_(False)
    # Nor, of itself, products added in place.
    added_in_place = {torch.ops.aten.addmm_: product_flops}
    counter = FlopCounterMode(display=False, custom_mapping=added_in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):
        encoder(batch)
    counted = count_flops(encoder.config, TokenCounts.of(batch, encoder.config))
    of_module = {n: sum(of.values()) for n, of in counter.get_flop_counts().items()}
    blocks = [f"APTEncoder.stack.blocks.{i}" for i in range(encoder.config.depth)]
    assert counted.mlp == sum(of_module[f"{block}.mlp"] for block in blocks)
    assert counted.attention == sum(of_module[block] for block in blocks) - counted.mlp
    assert counted.merge == of_module["APTEncoder.merge"]
    embeddings = [f for n, f in of_module.items() if n.startswith("APTEncoder.embedding.")]
    assert counted.embed == sum(embeddings)
    assert counted.total == counter.get_total_flops()


def product_flops(into, left, right, out_shape=None, **kwargs):
    """Of shapes."""
    return 2 * left[0] * left[1] * right[1]


def test_fewer_tokens_cost_less(make_tiles, make_encoder):
    """Embedding costs the same; attention, quadratic in tokens, falls faster than the MLP."""
    config = make_encoder().config
    uniform, adaptive = (
        count_flops(config, TokenCounts.of(make_tiles(tiles=[(1, 0.0)], split_share=s).pack(), config))
        for s in (1.0, 0.2)
    )  # fmt: skip
    assert adaptive.embed == uniform.embed
    assert uniform.merge == 0 < adaptive.merge
    assert adaptive.attention / uniform.attention < adaptive.mlp / uniform.mlp < 1


def test_counts_by_hand():
    """One frame of 2 x 2 cells of 1 px, one band, merged into one token, by one block 64 wide."""
    config = EncoderConfig(
        width=64,
        depth=1,
        kernel_px=1,
        modalities=(ModalityConfig(name="image", band_sets=(band_set("", "B0"),)),),
    )
    group = GroupCounts("image", 1, 1, (2, 2), (0, 1))
    flops = count_flops(config, TokenCounts((group,), 1, sequences=(1,)))
    # Pixel, validity, absent band and bias of 4 cells; 4 x 64 numbers to 64; q, k, v and out; scores.
    assert flops.embed == 2 * 4 * 4 * 64
    assert flops.merge == 2 * 4 * 64 * 64
    assert flops.attention == 2 * 4 * 64 * 64 + 4 * 64
    assert flops.mlp == 2 * 2 * 64 * 256
    assert flops.rest == 0
