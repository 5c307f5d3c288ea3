"""Several stores as one dataset: what a batch holds, whose tiles it has, and what cannot be mixed."""

import json
import pickle
import shutil
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import TokenBatch
from model.data import BatchStream, TileDataset, mix
from model.data.mixing import MixedDataset, _shares
from model.data.plan import BatchPlan
from pipeline.errors import ConfigError, StoreError
from streams import numbered
from support import aptile, save_scene, textured


def make_store(folder, name, *, modality="s2", bands=2, size=256, dtype="uint16", tile=64):
    save_scene(folder / name / "a.tif", textured((bands, size, size), len(name), dtype))
    config = folder / f"{name}.yaml"
    config.write_text(
        f"modality: {{name: {modality}, value_range: [0, 10000]}}\n"
        f"store: {{tile_size_px: {tile}}}\npartition: {{thresholds: [2.0, 3.0]}}\n"
    )
    store = folder / f"{name}_store"
    command = ["preprocess", folder / name, store, "--config", config, "--workers", 1]
    assert aptile(*command) == 0
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores of one modality, and one of another."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        "alps": make_store(folder, "alps"),
        "andes": make_store(folder, "andes", size=192),
        "radar": make_store(folder, "radar", modality="s1", bands=1, dtype="float32"),
    }


@pytest.fixture(scope="module")
def datasets(stores):
    return [TileDataset(store) for store in stores.values()]


@pytest.fixture(scope="module")
def mixed(datasets):
    return mix([(dataset, 1.0) for dataset in datasets])


def tile_of(batch: TokenBatch, tile: int):
    """Everything that a batch holds of one of its tiles, in plain numbers."""
    begin, end = batch.cu_seqlens[tile : tile + 2].tolist()
    tokens = slice(begin, end)
    names = [m.name for m in batch.modalities]
    frames = {
        m.name: [
            (s.name, s.pixels[m.tile == tile].tolist(), s.valid[m.tile == tile].tolist())
            for s in m.band_sets
        ]
        for m in batch.modalities
        if (m.tile == tile).any()
    }
    starts = {m.name: int((m.tile < tile).sum()) for m in batch.modalities}
    modality = [names[number] for number in batch.modality[tokens].tolist()]
    return {
        "scales": batch.scales[tokens].tolist(),
        "positions": batch.positions[tokens].tolist(),
        "modality": modality,
        "band_set": batch.band_set[tokens].tolist(),
        "frame": [
            frame - starts[name]
            for frame, name in zip(batch.frame[tokens].tolist(), modality, strict=True)
        ],
        "frames": frames,
    }


def test_a_mixed_batch_holds_what_its_datasets_hold(mixed, datasets):
    """Tile by tile, whatever stores the others come from."""
    edges = np.cumsum([0, *map(len, datasets)])
    chance = np.random.default_rng(0)
    for _ in range(10):
        chosen = chance.permutation(len(mixed))[: chance.integers(1, 12)]
        batch = mixed.batch(chosen)
        assert sorted(batch.tile_indices.tolist()) == sorted(chosen.tolist())
        assert [m.name for m in batch.modalities] == ["s2", "s1"]
        assert batch.num_tokens == mixed.token_counts[chosen].sum() == batch.modality.numel()
        assert batch.max_seqlen == mixed.token_counts[chosen].max()
        for place, index in enumerate(batch.tile_indices.tolist()):
            part = int(np.searchsorted(edges, index, "right")) - 1
            alone = datasets[part].batch([index - edges[part]])
            assert tile_of(batch, place) == tile_of(alone, 0)


def test_what_is_derived_of_a_mixed_batch_fits(mixed):
    batch = mixed.batch([0, 20, 30])
    for number, frames in enumerate(batch.modalities):
        values, valid = batch.cells(number, 0)
        assert len(values) == len(valid) == frames.num_covered
    assert sorted(batch.merge.token_order.tolist()) == list(range(batch.num_tokens))


def test_a_mixed_dataset_is_numbered_store_after_store(mixed, datasets):
    assert len(mixed) == sum(map(len, datasets)) == 16 + 9 + 16
    assert mixed.tile_ids.tolist() == [t for dataset in datasets for t in dataset.tile_ids]
    assert sorted(mixed.store_order.tolist()) == list(range(len(mixed)))
    assert np.array_equal(mixed[20].pixels, datasets[1][4].pixels)
    with pytest.raises(IndexError, match="tiles 0 ... 40"):
        mixed[41]


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=4),
    number=st.integers(4, 400),
    seed=st.integers(0, 99),
)
def test_every_store_has_its_share_of_every_epoch_and_every_tile_its_part(weights, number, seed):
    sizes = [5 + 7 * part for part in range(len(weights))]
    parts = [numbered(size, seed=size) for size in sizes]
    shares = _shares(np.array(weights), number)
    edges = np.cumsum([0, *sizes])
    sampling = numbered_mix(parts, weights, number)
    assert sum(shares) == number
    for epoch in range(3):
        drawn = Counter(sampling.draw(np.arange(edges[-1]), seed, epoch).tolist())
        for part, (begin, end) in enumerate(pairwise(edges)):
            copies = [drawn[tile] for tile in range(begin, end)]
            exact = number * weights[part] / sum(weights)
            assert sum(copies) == shares[part]
            # One that would get nothing gets a tile from the largest.
            assert abs(shares[part] - exact) < 1 or min(shares) == 1
            expected = shares[part] / sizes[part]
            assert set(copies) <= {int(np.floor(expected)), int(np.ceil(expected))}


def numbered_mix(parts, weights, number):
    return MixedDataset(tuple(parts), tuple(weights), number).sampling


def test_weights_decide_how_often_a_store_is_read(datasets):
    mixed = mix([(datasets[0], 3), (datasets[2], 1)], epoch_tiles=40)
    stream = BatchStream(mixed, batch_tiles=8)
    for _ in range(2):
        tiles = [tile for batch in stream for tile in batch.tile_indices.tolist()]
        assert len(tiles) == 40
        assert sum(tile < 16 for tile in tiles) == 30
    stream.close()


def test_a_mixed_run_that_was_stopped_goes_on_alike(datasets):
    def stream():
        return BatchStream(mix([(datasets[0], 2), (datasets[1], 1)]), batch_tiles=5, seed=1)

    whole = [batch.tile_indices.tolist() for batch in stream()]
    first, second = stream(), stream()
    seen = [batch.tile_indices.tolist() for batch in islice(first, 2)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert seen + [batch.tile_indices.tolist() for batch in second] == whole
    other = BatchStream(mix([(datasets[0], 1), (datasets[1], 1)]), batch_tiles=5, seed=1)
    with pytest.raises(StoreError, match="made over other data"):
        other.load_state_dict(first.state_dict())


def test_a_mixed_dataset_goes_to_another_process(mixed):
    again = pickle.loads(pickle.dumps(mixed))  # noqa: S301
    assert again.fingerprint == mixed.fingerprint
    assert torch.equal(again.batch([1, 30]).scales, mixed.batch([1, 30]).scales)


def test_a_store_that_cannot_be_read_is_skipped_and_the_others_are_not(stores, datasets, tmp_path):
    broken = shutil.copytree(stores["radar"], tmp_path / "broken")
    parts = mix([(datasets[0], 1), (TileDataset(broken), 1)])
    for shard in (broken / "s1" / "pixels").rglob("*"):
        if shard.is_file() and shard.name != "zarr.json":
            shard.write_bytes(shard.read_bytes()[:-100])
    fresh = mix([(datasets[0], 1), (datasets[2], 1)])
    fresh.datasets = (datasets[0], TileDataset(broken))
    with pytest.raises(StoreError, match="broken"):
        fresh.batch([0, 20])
    batch = fresh.batch([0, 20, 21], on_error="skip-tile")
    assert batch.tile_indices.tolist() == [0]
    assert len(batch.skipped) == 2
    with pytest.raises(StoreError, match="broken"):
        fresh.batch([20], on_error="skip-tile")
    assert len(parts) == 32


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ({"bands": 3}, "bands"),
        ({"dtype": "float32"}, "types"),
        ({"tile": 128}, "base grid"),
    ],
)
def test_stores_that_do_not_fit_are_named(stores, tmp_path, difference, said):
    other = make_store(tmp_path, "other", **difference)
    with pytest.raises(ConfigError, match=f"s2: {said} .*alps_store.*other_store") as refused:
        mix([(TileDataset(stores["alps"]), 1), (TileDataset(other), 1)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("weights", "settings", "said"),
    [
        ([1, 0], {}, "its weight is 0"),
        ([1, float("nan")], {}, "its weight is nan"),
        ([1, 1], {"epoch_tiles": 1}, "epoch_tiles is 1"),
        ([], {}, "given no dataset"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(datasets, weights, settings, said):
    with pytest.raises(ConfigError, match=said):
        mix(list(zip(datasets[: len(weights)], weights, strict=True)), **settings)


def test_the_plan_takes_the_sampling_of_a_mix(mixed):
    plan = BatchPlan(mixed.token_counts, batch_tiles=4, sampling=mixed.sampling)
    assert plan.epoch(0).num_tiles == mixed.sampling.tiles_per_epoch
