"""Fixtures that make tiles, scenes and small encoders."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from model.batch import TokenBatch
from model.config import BandSetConfig, EncoderConfig, ModalityConfig
from model.encoder import APTEncoder
from pipeline.grid import BaseGrid
from scene_makers import Groups, Scene, build_groups, build_scene, change_group
from tile_makers import HIGHEST, NUM_BANDS, Leaf, Tiles, build_tiles, roots


def change_pixels(batch: TokenBatch, **changes: torch.Tensor) -> TokenBatch:
    """A batch of one modality and band set with other `pixels`, `valid` or `band_present`."""
    (frames,) = batch.modalities
    (band_set,) = frames.band_sets
    changed = replace(frames, band_sets=(replace(band_set, **changes),))
    return replace(batch, modalities=(changed,))


def build_encoder(kernel_px: int = 2, seed: int = 0, **options: Any) -> APTEncoder:
    """A small encoder of modality "image", whose every weight has moved away from its initial value."""
    torch.manual_seed(seed)
    band_set = BandSetConfig(
        bands=tuple(f"B{band}" for band in range(NUM_BANDS)),
        value_range=((0.0, HIGHEST),) * NUM_BANDS,
    )
    config = EncoderConfig(
        **{"width": 64, "depth": 2, "kernel_px": kernel_px, **options},
        modalities=(ModalityConfig(name="image", band_sets=(band_set,)),),
    )
    return moved(APTEncoder(config))


def moved(encoder: APTEncoder) -> APTEncoder:
    """The encoder with every weight moved away from its initial value."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def _band_set(name: str, bands: Sequence[str]) -> BandSetConfig:
    return BandSetConfig(name=name, bands=tuple(bands), value_range=((0.0, HIGHEST),) * len(bands))


def scene_config(**options: Any) -> EncoderConfig:
    """For the modalities of `Scene`."""
    first = _band_set("", [f"B{band}" for band in range(NUM_BANDS)])
    return EncoderConfig(
        **{"width": 64, "depth": 2, "kernel_px": 4, **options},
        modalities=(
            ModalityConfig(
                name="s2",
                band_sets=(first, _band_set("20m", ("C0", "C1"))),
                ground_sample_distance_m=10,
            ),
            ModalityConfig(name="s1", band_sets=(first,), ground_sample_distance_m=20),
            ModalityConfig(name="dem", band_sets=(first,), ground_sample_distance_m=160 / 6),
        ),
    )


def build_scene_encoder(seed: int = 0, **options: Any) -> APTEncoder:
    """A small encoder of the modalities of `Scene`, every weight moved."""
    torch.manual_seed(seed)
    return moved(APTEncoder(scene_config(**options)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On arrays this small, threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Session-wide, so that hypothesis may use them: each is a function or a strategy, never a state.


@pytest.fixture(scope="session")
def make_tiles() -> Callable[..., Tiles]:
    return build_tiles


@pytest.fixture(scope="session")
def with_pixels() -> Callable[..., TokenBatch]:
    return change_pixels


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., APTEncoder]:
    return build_encoder


@pytest.fixture(scope="session")
def roots_of() -> Callable[[BaseGrid], list[Leaf]]:
    return roots


@pytest.fixture(scope="session")
def tilesets() -> st.SearchStrategy[Tiles]:
    """Up to three tiles of up to three frames each; some have no token at all."""
    tile = st.tuples(st.integers(1, 3), st.sampled_from([0.0, 0.3, 1.0]))
    return st.builds(
        build_tiles,
        seed=st.integers(0, 2**32 - 1),
        tiles=st.lists(tile, min_size=1, max_size=3),
        num_roots=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        base_patch_size=st.sampled_from([1, 2, 3]),
        num_scales=st.integers(1, 3),
        split_share=st.sampled_from([0.0, 0.6, 1.0]),
    )


@pytest.fixture(scope="session")
def make_scene() -> Callable[..., Scene]:
    return build_scene


@pytest.fixture(scope="session")
def make_scene_encoder() -> Callable[..., APTEncoder]:
    return build_scene_encoder


@pytest.fixture(scope="session")
def make_scene_config() -> Callable[..., EncoderConfig]:
    return scene_config


@pytest.fixture(scope="session")
def with_group() -> Callable[..., TokenBatch]:
    return change_group


@pytest.fixture(scope="session")
def scenes() -> st.SearchStrategy[Scene]:
    """Up to three tiles of three modalities, each with few frames or none."""
    tile = st.tuples(
        st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, 0.3, 1.0])
    )
    return st.builds(
        build_scene,
        seed=st.integers(0, 2**32 - 1),
        tiles=st.lists(tile, min_size=1, max_size=3),
        split_share=st.sampled_from([0.0, 0.5, 1.0]),
    )


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., Groups]:
    return build_groups


@pytest.fixture(scope="session")
def groupsets() -> st.SearchStrategy[Groups]:
    """Up to three modalities of one to four scales, in one or two band sets, each maybe absent."""
    return st.builds(
        build_groups,
        seed=st.integers(0, 2**31),
        num_tiles=st.integers(1, 3),
        modalities=st.lists(
            st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 2)),
            min_size=1,
            max_size=3,
        ),
    )
