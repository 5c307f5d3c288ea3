import math
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.settings.canonical import canonical_json
from pipeline.settings.config import DataConfig, PreprocessConfig
from pipeline.settings.loading import load_config


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


def test_an_override_reaches_into_one_of_several_modalities(tmp_path):
    config = load(
        tmp_path,
        "modalities: {s2: {source: old}, dem: {static: true, adaptive: false}}",
        "modalities.s2.source=new",
        "modalities.dem.partition.base_patch_size=8",
    )
    assert config.modalities["s2"].source == "new"
    assert config.settings_of("dem").partition.root_size_px == 8
    assert [settings.name for settings in config.all_modalities()] == ["s2", "dem"]


def test_what_a_modality_does_not_say_itself_is_shared(tmp_path):
    config = load(
        tmp_path,
        "scoring: {num_bins: 16}\n"
        "modalities: {a: {}, b: {scoring: {scorer: variance}}, c: {adaptive: false}}",
    )
    assert config.settings_of("a").scoring.num_bins == 16
    assert config.settings_of("b").scoring.scorer == "variance"
    assert config.settings_of("c").scoring is None
    assert config.settings_of("c").partition.root_size_px == config.partition.root_size_px


NAME = "expected a letter, then up to 63 letters, digits or _"
MISTAKES = {
    "partition: {treshold: [1]}": "unknown key 'partition.treshold'; did you mean 'thresholds'?",
    "colour: red": "unknown key 'colour'; known keys: modality, modalities, scoring, partition, store, ",
    "prset: s2_l2a": "unknown key 'prset'; did you mean 'preset'?",
    "partition: {thresholds: [0.5]}": "3 scales need 2, fine to coarse",
    "partition: {thresholds: [0.5, 9]}": "thresholds[1] is 9.0; a patch of 16 px scores at most 5 with",
    "partition: {base_patch_size: 5}": "tile_size_px is 128; it must be a multiple of the largest patch, "
    "20 px",
    "partition: {thresholds: [1, 1], quantile: 0.5}": "quantile has no effect beside thresholds",
    "partition: {num_scales: 0}": "partition.num_scales is 0; input should be greater than",
    "modality: {bands: [a, a]}": "modality: a band name occurs twice",
    "modality: {name: ../up}": f"modality.name is '../up'; {NAME}",
    "modality: {value_range: [5, 5]}": "modality: value_range (5.0, 5.0) is empty; give low < high",
    "modality: {bands: [a, b]}\nscoring: {bands: [c]}": "scoring.bands names ['c']; modality.bands has",
    "run: {workers: 2, scheduler: 'tcp://a:1'}": "run: run.workers has no effect beside",
    "preset: s2_l9": "preset 's2_l9' is not known; expected one of dem, landsat_c2_l2, naip, rgb, s1_rtc",
    "- a\n- b": "expected `key: value` lines",
    "a: [": "not a YAML file",
    "!!python/object/apply:os.system ['true']": "not a YAML file",
    "run: {workers: 1}\nrun: {workers: 2}": "line 2 gives 'run' again; give every key once",
    "run:\n  workers: 1\n  workers: 2": "line 3 gives 'workers' again",
    "x: &a [*a]": "unknown key 'x'",
    # Forms and tags: nothing of the library that validates.
    "modality: {value_range: [5]}": "modality.value_range is [5]; expected (low, high) in the archive's "
    "own numbers, or one pair per band",
    "modality: {value_range: [[0, 1], [2]]}": "modality.value_range is [[0, 1], [2]]; expected (low, high)",
    "scoring: {scorer: entrpy}": "scoring.scorer is 'entrpy'; did you mean 'entropy'?",
    "scoring: {scorer: 7}": "scoring.scorer is '7'; expected one of entropy, laplacian, ",
    "scoring: laplacian": "scoring is 'laplacian'; expected key: value lines below it",
    "scoring: {scorer: laplacian, num_bins: 3}": "unknown key 'scoring.num_bins'; known keys: scorer, ",
    "modality: {bands: B02}": "modality.bands is 'B02'; expected a list, such as [a, b]",
    "modality: {bands: [1b]}": f"modality.bands[0] is '1b'; {NAME}",
    "modality: {baseline: {offset: 1}}": "modality.baseline.since is not given; expected the first "
    "processing baseline with the offset, such as 04.00",
    "modality: {true: 3}": "modality: the key True is no text; put it in quotes",
    "modality: {assets: {2: b}}": "modality.assets: the key 2 is no text; put it in quotes",
    "grid: {shape: [1, 2, 3]}": "grid.shape is [1, 2, 3]; list should have at most 2 items, not 3",
    "preset: s2_l2a\nmodality: {bands: [[B02], 3]}": "modality.bands[0] is ['B02']; input should be",
    "preset: s2_l2a\nscoring: {scorer: [a]}": "scoring.scorer is \"['a']\"; expected one of entropy",
    # Several modalities.
    "modalities: {s2: {bnds: [a]}}": "unknown key 'modalities.s2.bnds'; did you mean 'bands'?",
    "modalities: {entropy: {scoring: {scorer: canny, sgma_px: 1}}}": "unknown key "
    "'modalities.entropy.scoring.sgma_px'; did you mean 'sigma_px'?",
    "modalities: {s2: {baseline: {snce: 1}}}": "unknown key 'modalities.s2.baseline.snce'; did you mean",
    "modalities: {s2: {value_range: 3}}": "modalities.s2.value_range is 3; expected (low, high)",
    "modalities: {s2: {name: s3}}": "modalities.s2.name is 's3'; a modality is named by its key",
    "modalities: {a b: {}}": f"modalities: 'a b' cannot be a name; {NAME}",
    "modalities: {s2: 3}": "modalities.s2 is 3; expected key: value lines below it",
    "modalities: {s2: {presets: s2_l2a}}": "unknown key 'modalities.s2.presets'; did you mean 'preset'?",
    "modalities: {s2: {preset: s2_l9}}": "modalities.s2.preset 's2_l9' is not known; expected one of",
    "modality: {preset: s2_l2a}": "modality.preset is at the wrong place; with one modality, preset "
    "stands at the top level",
    "preset: s2_l2a\nmodalities: {s2: {}}": "preset s2_l2a sets modality and the configuration modalities; "
    "to start one of several modalities from a preset, name it there, as modalities.<name>.preset",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_named_with_the_file_and_the_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert f"{tmp_path / 'aptile.yaml'}: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    for internal in (
        "pydantic",
        "tuple[",
        "_scorer_name",
        "EntropyConfig",
        "ModalityConfig",
        "[key]",
    ):
        assert internal not in str(error.value)


def test_several_mistakes_stand_in_one_line(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "run: {workers: 0}\nmodalities: {s2: {value_range: [1], bnds: 1}}")
    assert [part.split(": ", 1)[1].split(" ")[0] for part in str(error.value).split("; ")[::2]] == [
        "modalities.s2.value_range",
        "unknown",
        "run.workers",
    ]


@pytest.mark.parametrize(
    "override", ["partition", "=3", "partition.thresholds=[1", "a..b=1", ".a=1"]
)
def test_an_override_that_is_no_assignment_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, "", override)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot read .* No such file"):
        load_config(PreprocessConfig, tmp_path / "nowhere.yaml")


def test_two_presets_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="give one of them"):
        load(tmp_path, "preset: s2_l2a", preset="other")


KEYS = st.sampled_from([
    "preset", "modality", "modalities", "scoring", "partition", "scorer", "bands", "band_sets", "a", "name",
    "value_range", "wavelengths_nm", "mask", "baseline", "adaptive", "kind", "thresholds", "store",
])  # fmt: skip
VALUES = st.sampled_from(
    [
        "s2_l2a",
        "s2_l1c_native",
        "dem",
        "label",
        "laplacian",
        "B02",
        "B04",
        "",
        None,
        True,
        3,
        -1.5,
        math.nan,
    ]
)
CONTENTS = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | VALUES, inner, max_size=4),
    max_leaves=12,
)
SECTIONS = st.sampled_from(["preset", "modality", "modalities", "scoring", "partition"])


@given(st.dictionaries(SECTIONS, VALUES | CONTENTS, max_size=4))
def test_whatever_a_file_holds_the_answer_is_a_configuration_or_one_line(content):
    with NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_text(yaml.safe_dump(content))
        refusal = None
        try:
            load_config(PreprocessConfig, Path(file.name))
        except ConfigError as error:
            refusal = str(error)
    assert refusal is None or refusal.startswith(f"{file.name}: ")
    assert "\n" not in (refusal or "")
