import math
from pathlib import Path

import pytest

from pipeline.config import DataConfig, PreprocessConfig, canonical_json, load_config
from pipeline.errors import ConfigError


def load(tmp_path: Path, text: str, *overrides: str, preset: str | None = None):
    file = tmp_path / "aptile.yaml"
    file.write_text(text)
    return load_config(PreprocessConfig, file, overrides, preset)


def test_later_sources_win(tmp_path):
    config = load(
        tmp_path,
        "preset: s2_l2a\npartition: {base_patch_size: 2, thresholds: [0.5, 0.8]}\n",
        "partition.thresholds=[0.4, .inf]",
    )
    assert config.modality.name == "s2_l2a"
    assert config.scoring.bands == ("B02", "B03", "B04")
    assert config.partition.base_patch_size == 2
    assert config.partition.thresholds == (0.4, math.inf)


def test_the_digest_depends_on_what_fixes_the_bytes_only(tmp_path):
    config = load(tmp_path, "")
    elsewhere = load(tmp_path, "run: {workers: 7}")
    other = load(tmp_path, "", "scoring.num_bins=16")
    assert config.data().digest() == elsewhere.data().digest() != other.data().digest()
    assert config.data() == DataConfig()


def test_infinities_survive_canonical_json():
    assert canonical_json({"b": (math.inf,), "a": -math.inf}) == b'{"a":"-inf","b":["inf"]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "partition: {treshold: [1]}",
            "unknown key 'partition.treshold'; did you mean 'thresholds'",
        ),
        (
            "colour: red",
            "unknown key 'colour'; known keys: modality, scoring, partition, store, run",
        ),
        ("partition: {thresholds: [0.5]}", "3 scales need 2, fine to coarse"),
        (
            "partition: {thresholds: [0.5, 9]}",
            r"thresholds\[1\] is 9.0; a patch of 16 px .* 5 with",
        ),
        ("partition: {base_patch_size: 5}", "tile_size_px is 128; it must be a multiple .* 20 px"),
        ("partition: {thresholds: [1, 1], quantile: 0.5}", "quantile has no effect beside"),
        ("partition: {num_scales: 0}", "partition.num_scales is 0; input should be greater than"),
        ("modality: {bands: [a, a]}", "band name occurs twice"),
        ("modality: {name: ../up}", "modality.name is '../up'"),
        ("modality: {value_range: [5, 5]}", "give low < high"),
        ("modality: {bands: [a, b]}\nscoring: {bands: [c]}", r"names \['c'\]"),
        ("run: {workers: 2, scheduler: tcp://a}", "run.workers has no effect beside"),
        ("preset: s2_l9", r"preset 's2_l9' is not known; expected one of \['s2_l2a'\]"),
        ("- a\n- b", "expected `key: value` lines"),
        ("a: [", "not a YAML file"),
        ("!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_mistakes_are_named_with_the_file_and_the_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["partition", "=3", "partition.thresholds=[1"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, "", override)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot read .* No such file"):
        load_config(PreprocessConfig, tmp_path / "nowhere.yaml")


def test_two_presets_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="give one of them"):
        load(tmp_path, "preset: s2_l2a", preset="other")
