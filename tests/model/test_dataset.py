"""What a dataset reads of a store of several modalities, dates, resolutions and labels."""

import pickle
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from model import APTEncoder, EncoderConfig, TileDataset
from model.data import Augmentation
from model.data.frames import NewMemory, normalize
from model.embed import PixelNormalization
from model.packing import BandSetArrays
from pipeline import open_store, segments
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.jobs.job import run_job
from pipeline.jobs.repartition import repartition
from pipeline.rules import FurtherRule
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from sentinels import CONFIG, make_archive
from support import Watching

# Under this seed the north is for training, the south for validation.
SPLITS = "splits: {by: place, shares: {val: 0.5, train: 0.5}, seed: 4}\n"
ALL = {"s2": ("", "20m", "60m"), "s1": ("",), "dem": ("",)}
SOUTH = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    make_archive(folder / "archive")
    (folder / "config.yaml").write_text(CONFIG + SPLITS)
    config = load_config(PreprocessConfig, folder / "config.yaml", ["run.workers=1"])
    run_job(str(folder / "archive"), folder / "store", config, Watching())
    rule = FurtherRule(tokens_per_tile=40)
    repartition(folder / "store", "lean", rule, config.run, modality="s2", observer=Watching())
    return folder / "store"


@pytest.fixture(scope="module")
def dataset(path):
    return TileDataset(path)


def groups_of(batch):
    return [(m, b) for m, f in enumerate(batch.modalities) for b in range(len(f.band_sets))]


def nearest(image, rows, cols):
    """[..., y, x] with a whole number of px per cell, by the pixel below each new px's centre."""
    for axis, cells in ((-2, rows), (-1, cols)):
        size = image.shape[axis]
        wanted = -(-size // cells) * cells
        image = np.take(image, ((np.arange(wanted) + 0.5) * size / wanted).astype(int), axis)
    return image


def test_every_modality_and_band_set_with_tokens_is_read(dataset):
    assert dataset.modalities == ALL
    batch = dataset.batch([0, SOUTH])
    assert [(f.name, tuple(s.name for s in f.band_sets)) for f in batch.modalities] == [
        *ALL.items()
    ]
    assert [s.pixels.shape for s in batch.modalities[0].band_sets] == [
        (5, 2, 96, 96), (5, 1, 48, 48), (5, 1, 16, 16),
    ]  # fmt: skip
    assert batch.modalities[0].band_sets[1].bands == ("B05",)
    assert (batch.normalized, batch.skipped, batch.labels) == (False, (), {})


def test_dates_come_from_the_manifest_and_static_frames_have_none(dataset):
    s2, s1, dem = dataset.batch([0, SOUTH]).modalities
    first, second, third = ([day, 0, 2020] for day in (1, 6, 11))
    assert s2.timestamps.tolist() == [first, third, first, second, third]
    assert s2.timestep.tolist() == [0, 2, 0, 1, 2]
    assert s1.timestamps.tolist() == [second, second]
    assert dem.timestamps.tolist() == [[-1, -1, -1]] * 2
    assert (dem.timestep.tolist(), dem.tile.tolist()) == ([0, 0], [0, 1])


def test_cells_are_the_pixels_of_the_tiles_cut_by_hand(dataset):
    """Of every token of every modality and band set, whole pixels per cell or not."""
    chosen = [SOUTH, 4, 0]
    batch = dataset.batch(chosen)
    for m, b in groups_of(batch):
        frames, (values, valid) = batch.modalities[m], batch.cells(m, b)
        grid, row = frames.grid, 0
        tiles = [dataset[i][frames.name] for i in chosen]
        of_set = [
            (tile.pixels, tile.valid) if b == 0 else tile.further[frames.band_sets[b].name]
            for tile in tiles
        ]
        pixels, there = (np.concatenate(arrays) for arrays in zip(*of_set, strict=True))
        pixels, there = (nearest(image, grid.rows, grid.cols) for image in (pixels, there))
        p = pixels.shape[-1] // grid.cols
        for token in batch.tokens_by_scale(m, b).tolist():
            y, x, scale, _ = batch.positions[token].tolist()
            frame = int(batch.frame[token])
            first = int(grid.storage_order.argsort()[y * grid.cols + x])
            for position in range(first, first + 4**scale):
                cell_y, cell_x = grid.cell_yx[position] * p
                window = np.s_[cell_y : cell_y + p, cell_x : cell_x + p]
                np.testing.assert_array_equal(values[row].numpy(), pixels[frame][:, *window])
                np.testing.assert_array_equal(valid[row].numpy(), there[frame][window])
                row += 1
        assert row == len(values) > 0


def test_tokens_are_as_many_as_the_manifest_says(dataset, path):
    batch = dataset.batch(range(len(dataset)))
    assert batch.cu_seqlens.diff().tolist() == dataset.token_counts.tolist()
    lean = TileDataset(path, "lean", {"s2": ["20m", ""]})
    assert lean.modalities == {"s2": ("20m", "")}
    batch = lean.batch(range(len(lean)))
    assert batch.cu_seqlens.diff().tolist() == lean.token_counts.tolist()
    assert max(batch.cu_seqlens.diff().tolist()) <= 2 * 3 * 40
    assert [s.name for s in batch.modalities[0].band_sets] == ["20m", ""]


def test_tiles_alone_are_what_they_are_together(dataset):
    chosen = [3, SOUTH, 1]
    batch, alone = dataset.batch(chosen), [dataset.batch([i]) for i in chosen]
    for field in ("scales", "positions", "modality", "band_set", "mask"):
        assert torch.equal(getattr(batch, field), torch.cat([getattr(one, field) for one in alone]))
    for m, b in groups_of(batch):
        for part in (0, 1):
            cells = torch.cat([stored(one, m, one.cells(m, b)[part]) for one in alone])
            assert torch.equal(stored(batch, m, batch.cells(m, b)[part]), cells)


def stored(batch, modality, rows):
    """Rows of base cells, frame after frame in storage order."""
    return rows[batch.cell_index(modality).argsort()]


def test_labels_are_rasters_of_the_store_and_numbers_given_per_tile(path):
    classes = np.arange(7) * 10
    dataset = TileDataset(path, modalities="dem", labels={"classes": None, "kind": classes})
    batch = dataset.batch([2, SOUTH])
    assert batch.labels["kind"].tolist() == [20, 60]
    raster = batch.labels["classes"]
    assert (raster.tile.tolist(), raster.ignore_index) == ([1], 255)
    expected = open_store(path).tile("south/r0c0", "classes")
    np.testing.assert_array_equal(raster.pixels.numpy(), expected.pixels)
    np.testing.assert_array_equal(raster.valid.numpy(), expected.valid)
    assert TileDataset(path, labels="classes").batch([0]).labels["classes"].pixels.shape[0] == 0


def test_a_split_holds_its_tiles_only(path, dataset):
    north, south = TileDataset(path, split="train"), TileDataset(path, split=["val"])
    assert (len(north), len(south)) == (6, 1)
    assert north.tile_ids.tolist() + south.tile_ids.tolist() == dataset.tile_ids.tolist()
    assert south.token_counts.tolist() == [dataset.token_counts[SOUTH]]
    assert south[0]["dem"].id == "south/r0c0"
    one, other = south.batch([0]), dataset.batch([SOUTH])
    assert torch.equal(one.positions, other.positions)
    assert (one.tile_indices.tolist(), other.tile_indices.tolist()) == ([0], [SOUTH])
    assert len(TileDataset(path, split=["val", "train"])) == 7
    assert north.manifest["place"].unique().to_pylist() == ["north"]


def test_normalised_pixels_are_what_the_encoder_would_make_of_them(path):
    chosen = {"s2": [""]}
    plain, normal = (
        TileDataset(path, modalities=chosen, normalize=n) for n in (None, "value_range")
    )
    torch.manual_seed(0)
    encoder = APTEncoder(EncoderConfig.for_store(plain.store, chosen))
    one, other = plain.batch(range(7)), normal.batch(range(7))
    assert (one.normalized, other.normalized) == (False, True)
    assert one.cells(0, 0)[0].dtype == torch.uint16
    assert torch.equal(encoder.pixels(one, 0, 0)[0], encoder.pixels(other, 0, 0)[0])
    assert torch.equal(encoder.pixels(one, 0, 0)[0], other.cells(0, 0)[0])
    assert torch.equal(encoder(one).tokens, encoder(other).tokens)
    half = TileDataset(path, modalities=chosen, normalize="value_range", dtype="float16")
    assert torch.equal(half.batch(range(7)).cells(0, 0)[0], other.cells(0, 0)[0].half())
    single = TileDataset(path, modalities=chosen, dtype="float32").batch([0])
    assert torch.equal(single.cells(0, 0)[0], plain.batch([0]).cells(0, 0)[0].float())


def test_an_encoder_for_a_store_reads_all_modalities_band_sets_and_dates(dataset):
    torch.manual_seed(0)
    encoder = APTEncoder(EncoderConfig.for_store(dataset.store, class_token=True))
    batch = dataset.batch(range(len(dataset)))
    encoded = encoder(batch)
    assert encoded.tokens.shape == (batch.num_tokens, 128)
    alone = [encoder(dataset.batch([row])) for row in range(len(dataset))]
    tokens = torch.cat([one.tokens for one in alone])
    torch.testing.assert_close(encoded.tokens, tokens, rtol=0, atol=1e-5)
    only = TileDataset(dataset.store, modalities={"s1": None, "s2": ["60m"]})
    assert encoder(only.batch([0])).tokens.isfinite().all()
    with pytest.raises(ConfigError, match="modality 'dem', which this encoder cannot read"):
        APTEncoder(EncoderConfig.for_store(dataset.store, ["s1", "s2"]))(batch)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_normalising_gives_the_encoders_numbers_bit_for_bit(dtype):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 200, (5, 2, 8, 8)).astype(dtype)
    valid = rng.random((5, 8, 8)) < 0.8
    valid[0] = True
    if pixels.dtype.kind == "f":
        pixels += rng.random(pixels.shape).astype(dtype)
        junk = rng.choice([np.nan, np.inf, np.finfo(dtype).max], pixels.shape)
        pixels = np.where(valid[:, None], pixels, junk).astype(dtype)
    present = np.ones((5, 2), bool)
    present[1, 0] = False
    ranges = np.array([[0.1, 171.3], [-7, 211]], np.float32)
    band_set = BandSetArrays("", ("a", "b"), pixels, valid, present)
    with np.errstate(all="ignore"):
        normalize(band_set, ranges, np.dtype("float32"), NewMemory())
    there = torch.from_numpy(valid[:, None] & present[:, :, None, None])
    expected = PixelNormalization(tuple(map(tuple, ranges.tolist())))(
        torch.from_numpy(pixels), there
    )
    assert torch.equal(torch.from_numpy(band_set.pixels), expected)


def test_a_limit_keeps_part_of_a_tiles_leaves_whatever_the_batch(path, dataset):
    limited = TileDataset(path, max_tokens_per_tile=300)
    assert (limited.token_counts <= 300).all()
    small = dataset.token_counts <= 300
    assert (limited.token_counts == dataset.token_counts)[small].all()
    assert (limited.token_counts[~small] > 290).all()
    batch = limited.batch([SOUTH, 0, 2], draw=(3, 1))
    assert batch.cu_seqlens.diff().tolist() == limited.token_counts[[SOUTH, 0, 2]].tolist()
    whole = dataset.batch([SOUTH, 0, 2])
    kept, had = (
        [set(zip(*columns, strict=True)) for columns in columns_by_tile(b)] for b in (batch, whole)
    )
    assert all(a <= b for a, b in zip(kept, had, strict=True))
    assert kept[2] == had[2]
    again = limited.batch([0], draw=(3, 1))
    assert torch.equal(again.positions, batch.positions[batch.tile_of_token == 1])
    other = limited.batch([0], draw=(3, 2))
    assert not torch.equal(other.positions, again.positions)


def columns_by_tile(batch):
    ends = batch.cu_seqlens.tolist()
    for begin, end in pairwise(ends):
        rows = slice(begin, end)
        yield (
            batch.modality[rows].tolist(),
            batch.band_set[rows].tolist(),
            *batch.positions[rows].T.tolist(),
        )


class Recording:
    def __init__(self):
        self.taken = []

    def take(self, shape, dtype):
        self.taken.append(np.empty(shape, dtype))
        return self.taken[-1]


def test_pixels_are_decoded_into_the_memory_that_a_batch_keeps(dataset):
    buffers = Recording()
    batch = dataset.batch([0, 3], buffers=buffers)
    kept = [
        array.numpy()
        for frames in batch.modalities
        for s in frames.band_sets
        for array in (s.pixels, s.valid)
    ]
    assert len(buffers.taken) == len(kept) == 10
    pairs = zip(buffers.taken, kept, strict=True)
    assert all(np.shares_memory(taken, array) for taken, array in pairs)


def test_a_transform_has_the_last_word(path):
    doubled = TileDataset(path, modalities="dem", transform=double)
    assert doubled.batch([0]).mask.unique().tolist() == [2]
    with pytest.raises(ConfigError, match="transform gave int; it must give a TokenBatch"):
        TileDataset(path, modalities="dem", transform=len_of).batch([0])


def double(batch):
    return replace(batch, mask=batch.mask + 2)


def len_of(batch):
    return batch.num_tokens


def test_a_pickled_dataset_gives_the_same_batches(path):
    dataset = TileDataset(
        path, modalities=["s1", "s2"], split="train", normalize="value_range", labels={"n": range(6)},
        max_tokens_per_tile=100, augment=Augmentation(flips=True), transform=double,
    )  # fmt: skip
    content = pickle.dumps(dataset)
    again = pickle.loads(content)  # noqa: S301
    assert again.fingerprint == dataset.fingerprint
    one, other = (d.batch([5, 0], draw=(1, 2)) for d in (dataset, again))
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.cells(1, 2)[0], other.cells(1, 2)[0])
    assert torch.equal(one.labels["n"], other.labels["n"])
    assert len(content) < 10_000


def test_the_fingerprint_tells_data_and_settings_apart(path, dataset):
    others = [
        {},
        {"modalities": "s2"},
        {"modalities": {"s2": [""]}},
        {"modalities": {"s2": [""]}, "partition": "lean"},
        {"modalities": ["s1", "s2"]},
        {"split": "train"},
        {"max_tokens_per_tile": 50},
        {"normalize": "value_range"},
        {"labels": ["classes"]},
        {"augment": Augmentation(flips=True)},
        {"augment": Augmentation(rotations=True)},
        {"commit": 1},
    ]
    prints = [TileDataset(path, **settings).fingerprint for settings in others]
    # The second commit only added a partition.
    assert prints[0] == dataset.fingerprint == prints[-1]
    assert len(set(prints)) == len(others) - 1


def test_hints_and_order_follow_the_slots(dataset, path):
    order = dataset.store_order
    slots = [open_store(path).frame_table("s2").of(np.array([tile]))[0][0] for tile in order]
    assert slots == sorted(slots)
    assert dataset.will_read([0, 5]) is None


def damage(store, tile, array="s2/pixels_20m"):
    """Flip one bit of the shard object that holds a tile's frames."""
    opened = open_store(store)
    modality = array.partition("/")[0]
    slot = opened.frame_table(modality).of(np.array([tile]))[0][0]
    shard = slot // opened.layouts[modality].shard_capacity
    (found,) = [p for p in (store / array / "c" / str(shard)).rglob("*") if p.is_file()]
    content = bytearray(found.read_bytes())
    content[5] ^= 1
    found.write_bytes(content)
    return found


def test_a_damaged_shard_costs_its_tiles_and_no_others(path, dataset, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(path, store)
    found = damage(store, 2)
    broken = TileDataset(store)
    everything = range(len(broken))
    with pytest.raises(IntegrityError, match=str(found.relative_to(store).parts[-1])):
        broken.batch(everything)
    batch = broken.batch(everything, on_error="skip-tile")
    lost = sorted(set(everything) - set(batch.tile_indices.tolist()))
    assert 2 in lost
    assert len(lost) < len(broken)
    ids = [line.partition(": ")[0] for line in batch.skipped]
    assert ids == [broken.tile_ids[tile] for tile in lost]
    assert all("20m" in line and "\n" not in line for line in batch.skipped)
    expected = dataset.batch(batch.tile_indices.tolist())
    assert torch.equal(batch.positions, expected.positions)
    assert torch.equal(batch.cells(0, 1)[0], expected.cells(0, 1)[0])
    with pytest.raises(StoreError, match=r"none of the batch's 1 tiles can be read: north/r0c2: "):
        broken.batch([2], on_error="skip-tile")
    print(f"1 bit flipped: {len(lost)} of {len(broken)} tiles skipped, the others equal")


WRONG = {
    "modality": ({"modalities": "radar"}, "no modality 'radar' with tokens; it has s2, s1, dem"),
    "label raster": ({"modalities": ["classes"]}, r"give it as labels=\['classes'\]"),
    "no modality": ({"modalities": []}, "modalities is empty"),
    "twice": ({"modalities": ["s2", "s2"]}, "modalities names s2 more than once"),
    "band set": ({"modalities": {"s2": ["10m"]}}, "no band set '10m'; it has '', '20m', '60m'"),
    "no band set": ({"modalities": {"s2": []}}, "modality s2 has no band set"),
    "partition": ({"partition": "fat"}, "no partition 'fat'"),
    "partition of one": (
        {"partition": "lean"},
        "no partition 'lean'; there are default for modality s1",
    ),
    "split": ({"split": "test"}, "no tile is in split 'test'; its splits are train, val"),
    "no split": ({"split": []}, "no tile is in split"),
    "normalize": ({"normalize": "minmax"}, "normalize is 'minmax'; it must be 'value_range'"),
    "dtype": ({"dtype": "float64"}, "dtype is 'float64'; it must be one of float16, float32"),
    "rounding": ({"dtype": "float16"}, "would round or overflow the uint16 pixels of modality s2"),
    "limit": ({"max_tokens_per_tile": 0}, "max_tokens_per_tile is 0; it must be at least 1"),
    "labels": ({"labels": ["landuse"]}, "no label raster 'landuse'; it has classes"),
    "no labels": ({"labels": []}, "labels is empty"),
    "label count": (
        {"labels": {"n": [1, 2]}},
        r"labels\['n'\] has 2 where the dataset has 7 tiles",
    ),
    "label type": ({"labels": {"n": ["a"] * 7}}, r"labels\['n'\] holds <U1; give numbers"),
    "labels of a split": ({"split": "val", "labels": {"n": range(7)}}, "the dataset has 1 tiles"),
    "commit": ({"commit": 9}, "commit 9|000009"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_store_does_not_have_is_refused_in_one_line(path, wrong):
    settings, message = WRONG[wrong]
    with pytest.raises((ConfigError, StoreError), match=message) as error:
        TileDataset(path, **settings)
    assert "\n" not in str(error.value)


def test_a_commit_beside_an_open_store_must_be_its_own(path):
    store = open_store(path)
    assert TileDataset(store, commit=store.commit.number).store is store
    with pytest.raises(ConfigError, match="commit is 1, but the store that was given is open at"):
        TileDataset(store, commit=1)


@pytest.mark.parametrize("indices", [[], [7], [-1], [[0, 1]]])
def test_tiles_that_are_not_there_are_refused(dataset, indices):
    with pytest.raises(IndexError, match="give at least one index in 0 ... 6"):
        dataset.batch(indices)


def test_an_unknown_way_to_take_errors_is_refused(dataset):
    with pytest.raises(
        ConfigError, match="on_error is 'ignore'; it must be 'raise' or 'skip-tile'"
    ):
        dataset.batch([0], on_error="ignore")


def test_looking_at_a_tile_shows_each_modality_as_stored(dataset, path):
    tile = dataset[SOUTH]
    assert list(tile) == ["s2", "s1", "dem"]
    one = TileDataset(path, modalities="s1")[SOUTH]
    np.testing.assert_array_equal(one.pixels, tile["s1"].pixels)
    assert len(one.descriptors()) == sum(len(scales) for scales in one.scales)
    assert segments.is_missing(one.scales[0]).sum() == one.descriptors()["missing"].sum()
    assert Path(path).is_dir()
