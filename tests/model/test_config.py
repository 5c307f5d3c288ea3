"""What an encoder can be told, what is refused, and configurations for stores."""

import numpy as np
import pytest
from pydantic import ValidationError

from made_stores import make_store
from model.config import (
    SIZES,
    BandSetConfig,
    EncoderConfig,
    EncoderOptions,
    ModalityConfig,
    group_name,
)
from model.data import TileDataset
from pipeline.errors import ConfigError
from pipeline.grid import BaseGrid
from pipeline.storage.layout import BandSet, StoreLayout
from pipeline.store import open_store

FIRST = BandSetConfig(bands=("B1", "B2"), value_range=((0, 1), (0, 10)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"position": "learned"}, "position is 'learned', which needs position_cells"),
        (
            {"position_cells": (4, 4)},
            "position_cells is (4, 4), which has no effect with position 'sincos'",
        ),
        (
            {"position": "learned", "position_cells": (0, 4)},
            "position_cells is (0, 4); it must be (rows, columns), at least 1 each",
        ),
        ({"merge": "per_level"}, "merge is 'per_level', which needs merge_levels"),
        ({"merge_levels": 2}, "merge_levels is 2, which has no effect with merge 'shared'"),
        ({"global_every": 2}, "global_every is 2, which has no effect without windows"),
        (
            {"windows": 2, "global_every": 5},
            "global_every is 5, and no block of 4 would be global; it must be at most depth, 4",
        ),
        ({"windows": 2, "class_token": True}, "windows is 2, and without a global block"),
        ({"windows": 2, "register_tokens": 1}, "windows is 2, and without a global block"),
        ({"windows": 2, "location_token": True}, "windows is 2, and without a global block"),
        ({"drop_path": 0.1, "depth": 1}, "drop_path is 0.1, which has no effect with depth 1"),
        ({"mlp_ratio": 0.001}, "mlp_ratio is 0.001, which leaves an MLP of width 128 nothing"),
    ],
)
def test_a_setting_without_effect_is_refused_in_words(options, expected):
    with pytest.raises(ValidationError) as refused:
        EncoderOptions(**options)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", 0), ("width", 32), ("width", 96), ("depth", 0), ("kernel_px", 0), ("windows", 1),
        ("global_every", 1), ("register_tokens", -1), ("merge_levels", 0), ("mlp_ratio", 0),
        ("mlp_ratio", float("inf")), ("layer_scale", 0), ("layer_scale", float("nan")),
        ("layer_scale", float("inf")), ("drop_path", 1), ("drop_path", -0.1), ("position", "none"),
        ("mlp", "relu"), ("breadth", 64),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ValidationError, match=key):
        EncoderOptions(**{key: value})


def test_every_option_says_what_it_is():
    fields = {**EncoderConfig.model_fields, **ModalityConfig.model_fields}
    assert all(field.description for field in fields.values())


def test_prefix_tokens_are_counted():
    assert EncoderOptions().num_prefix == 0
    options = EncoderOptions(class_token=True, register_tokens=3, location_token=True)
    assert options.num_prefix == 5


@pytest.mark.parametrize(
    ("bands", "value_range", "expected"),
    [
        (("B1", "B2"), ((0, 1),), "value_range has 1 pairs for 2 bands (B1, B2)"),
        (("B1", "B1"), ((0, 1), (0, 1)), "bands are B1, B1; name each once"),
        (("B1",), ((1, 1),), "value_range of B1 is (1.0, 1.0)"),
        (("B1",), ((2, 1),), "value_range of B1 is (2.0, 1.0)"),
        (("B1",), ((0, float("nan")),), "value_range of B1 is (0.0, nan)"),
        (("B1",), ((float("-inf"), 0),), "value_range of B1 is (-inf, 0.0)"),
    ],
)
def test_a_band_set_needs_a_range_per_band(bands, value_range, expected):
    with pytest.raises(ValidationError) as refused:
        BandSetConfig(bands=bands, value_range=value_range)
    assert expected in str(refused.value)


def test_names_are_given_once():
    modality = ModalityConfig(name="s2", band_sets=(FIRST,))
    with pytest.raises(ValidationError, match="modalities are s2, s2; name each once"):
        EncoderConfig(modalities=(modality, modality))
    # Weights of the first set, which has no name, are named so.
    named = FIRST.model_copy(update={"name": "first"})
    with pytest.raises(ValidationError, match="band_sets are first, first; name each once"):
        ModalityConfig(name="s2", band_sets=(FIRST, named))
    assert group_name("s2", "") == "s2/first"


def test_a_config_comes_back_from_json():
    config = EncoderConfig(
        modalities=(ModalityConfig(name="s2", band_sets=(FIRST,), ground_sample_distance_m=10),),
        position="learned",
        position_cells=(3, 4),
        data_digest="abc",
    )
    assert EncoderConfig.model_validate_json(config.model_dump_json()) == config


def layout(**sets):
    band_sets = tuple(BandSet(name, bands, "uint16", 16) for name, bands in sets.items())
    return StoreLayout("s2", band_sets, BaseGrid(4, 4, 4, 2), 1, 2, "zstd")


@pytest.fixture
def plain_store(tmp_path):
    """A store whose modality has two band sets and no value range."""
    shape = layout(**{"": ("B1", "B2"), "20m": ("B5",)})
    return make_store(tmp_path / "store", shape, {})


def with_ranges(store, ranges, **entry):
    store.header = {
        **store.header,
        "config_digest": "d1",
        "modalities": {"s2": {**store.header["modalities"]["s2"], "value_range": ranges, **entry}},
    }
    return store


def test_a_config_for_a_store_has_its_band_sets_and_their_ranges(plain_store):
    store = with_ranges(plain_store, [[0, 1], [0, 2], [5, 9]], ground_sample_distance_m=10.0)
    config = EncoderConfig.for_store(store, size="tiny", class_token=True)
    assert config == EncoderConfig(
        width=192,
        depth=12,
        class_token=True,
        data_digest="d1",
        modalities=(
            ModalityConfig(
                name="s2",
                ground_sample_distance_m=10,
                band_sets=(
                    BandSetConfig(bands=("B1", "B2"), value_range=((0, 1), (0, 2))),
                    BandSetConfig(name="20m", bands=("B5",), value_range=((5, 9),)),
                ),
            ),
        ),
    )
    only = EncoderConfig.for_store(store, {"s2": ["20m"]}).modalities[0]
    assert only.band_sets == (config.modalities[0].band_sets[1],)


def test_a_store_without_value_ranges_is_refused_in_words(plain_store):
    with pytest.raises(ConfigError, match="'s2' has no value ranges.*set modality.value_range"):
        EncoderConfig.for_store(with_ranges(plain_store, []))


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_that_are_published(size, chip_store):
    config = EncoderConfig.for_store(open_store(chip_store), size=size)
    assert (config.width, config.depth) == SIZES[size]
    assert config.width == 64 * config.num_heads


def test_a_config_for_a_real_store(chip_store):
    dataset = TileDataset(chip_store)
    config = EncoderConfig.for_store(dataset.store, dataset.modalities, width=64)
    (modality,) = config.modalities
    (band_set,) = modality.band_sets
    header = dataset.store.header
    assert (config.width, config.depth) == (64, SIZES["nano"][1])
    assert band_set.bands == dataset.store.layout_of("image").bands
    np.testing.assert_array_equal(
        band_set.value_range, header["modalities"]["image"]["value_range"]
    )
    assert config.data_digest == header["config_digest"]


def test_names_the_store_lacks_are_refused_in_words(chip_store):
    store = open_store(chip_store)
    with pytest.raises(ConfigError, match="size is 'huge'; it must be one of nano, tiny, small"):
        EncoderConfig.for_store(store, size="huge")
    with pytest.raises((ConfigError, ValueError), match="'palsar'"):
        EncoderConfig.for_store(store, "palsar")
