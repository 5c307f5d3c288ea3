import numpy as np
import pytest
import rasterio
import yaml

from pipeline.errors import ConfigError
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.presets import BAND_ALIASES, PRESETS, band_aliases

NAMES = ("s2_l1c", "s2_l2a", "s1_rtc", "landsat_c2_l2", "naip", "dem", "rgb")
NATIVE = ("s2_l1c_native", "s2_l2a_native")


def load(tmp_path, text, *overrides, preset=None):
    file = tmp_path / "aptile.yaml"
    file.write_text(text)
    return load_config(PreprocessConfig, file, overrides, preset)


def test_the_names_people_depend_on():
    assert set(PRESETS) == {*NAMES, *NATIVE}
    assert set(BAND_ALIASES) == set(NAMES)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration_at_the_top_and_in_an_entry(tmp_path, name):
    alone = load(tmp_path, "", preset=name)
    among = load(tmp_path, f"modalities: {{first: {{preset: {name}}}, second: {{}}}}")
    one, entry = alone.modality, among.modalities["first"]
    assert one.name == name.removesuffix("_native")
    assert entry.model_copy(update={"name": one.name, "scoring": None}) == one
    assert entry.scoring == alone.scoring
    assert set(alone.scoring.bands) <= set(one.bands)
    assert (one.scale is None) == (one.offset is None)
    assert one.assets is None
    assert one.mask is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_plain_yaml(tmp_path, name):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(PRESETS[name]))
    assert load(tmp_path, "preset: mine.yaml") == load(tmp_path, "", preset=name)


def test_sentinel_2_numbers(tmp_path):
    l1c, l2a = (load(tmp_path, "", preset=name).modality for name in ("s2_l1c", "s2_l2a"))
    numbers = ("01", "02", "03", "04", "05", "06", "07", "08", "8A", "09", "10", "11", "12")
    assert l1c.bands == tuple(f"B{number}" for number in numbers)
    assert l2a.bands == tuple(band for band in l1c.bands if band != "B10")
    assert len(l2a.wavelengths_nm) == 12
    by_band = dict(zip(l1c.bands, l1c.wavelengths_nm, strict=True))
    # Only B8A lies out of the order of wavelengths by name, and in it by place.
    assert sorted(by_band.values()) == list(by_band.values())
    assert (by_band["B02"], by_band["B8A"], by_band["B10"]) == (492.4, 864.7, 1373.5)
    for modality in (l1c, l2a):
        assert modality.nodata == 0
        low, high = (modality.scale * n + modality.offset for n in modality.value_range)
        assert (low, high) == pytest.approx((0, 1))
        assert (modality.baseline.since, modality.baseline.offset) == ("04.00", -0.1)


@pytest.mark.parametrize("name", NATIVE)
def test_native_grids_hold_every_band_once(tmp_path, name):
    modality = load(tmp_path, "", preset=name).modality
    assert list(modality.band_sets) == ["10m", "20m", "60m"]
    assert modality.band_sets["10m"] == ("B02", "B03", "B04", "B08")
    assert len(modality.band_sets["20m"]) == 6
    assert modality.ground_sample_distance_m is None


def test_landsat_range_is_reflectance_0_to_1(tmp_path):
    modality = load(tmp_path, "", preset="landsat_c2_l2").modality
    low, high = (modality.scale * n + modality.offset for n in modality.value_range)
    assert (low, high) == pytest.approx((0, 1), abs=modality.scale)


def test_bands_chosen_from_a_preset_keep_what_is_said_of_them(tmp_path):
    config = load(tmp_path, "preset: s2_l2a_native\nmodality: {bands: [B11, B08, B04, B02]}")
    assert config.modality.wavelengths_nm == (1613.7, 832.8, 664.6, 492.4)
    assert config.modality.band_sets == {"10m": ("B08", "B04", "B02"), "20m": ("B11",)}
    assert config.scoring.bands == ("B02", "B04")
    assert config.modality.value_range == (0, 10000)


def test_bands_a_preset_does_not_know_lose_their_wavelengths(tmp_path):
    entry = "{preset: s2_l2a, bands: [B08, CLOUD]}"
    settings = load(tmp_path, f"modalities: {{s2: {entry}}}").settings_of("s2")
    assert settings.config.wavelengths_nm is None
    assert settings.config.bands == ("B08", "CLOUD")
    assert settings.scoring.bands is None


def test_ranges_per_band_follow_the_bands(tmp_path):
    (tmp_path / "db.yml").write_text(
        "modality: {bands: [VV, VH], value_range: [[-25, 5], [-32, -2]]}\nscoring: {bands: [VV, VH]}"
    )
    text = "modalities: {s1: {preset: db.yml, bands: [%s]}}"
    assert load(tmp_path, text % "VH, VV").modalities["s1"].value_range == ((-32, -2), (-25, 5))
    assert load(tmp_path, text % "VH").modalities["s1"].value_range == ((-32, -2),)
    assert load(tmp_path, text % "VH, HH").modalities["s1"].value_range is None


def test_own_settings_win_and_null_takes_back(tmp_path):
    config = load(
        tmp_path,
        "preset: s2_l2a\nmodality: {nodata: null, baseline: {offset: 0}}",
        "modality.value_range=[0, 4000]",
    )
    assert config.modality.nodata is None
    assert config.modality.value_range == (0, 4000)
    assert (config.modality.baseline.since, config.modality.baseline.offset) == ("04.00", 0)


def test_a_preset_in_an_entry_lies_over_the_shared_scoring_and_under_its_own(tmp_path):
    config = load(
        tmp_path,
        "scoring: {scorer: variance, statistic: std}\n"
        "partition: {base_patch_size: 8}\n"
        "modalities:\n"
        "  shared: {preset: s2_l2a}\n"
        "  own: {preset: s1_rtc, scoring: {num_bins: 16}}\n"
        "  other: {preset: rgb, scoring: {scorer: external, folder: scores}}\n"
        "  flat: {preset: dem, adaptive: false}\n",
    )
    shared = config.modalities["shared"].scoring
    assert (shared.scorer, shared.statistic, shared.bands) == (
        "variance",
        "std",
        ("B02", "B03", "B04"),
    )
    own = config.modalities["own"].scoring
    assert (own.scorer, own.num_bins, own.bands) == ("entropy", 16, ("VV", "VH"))
    assert config.modalities["other"].scoring.folder == "scores"
    assert config.modalities["flat"].scoring is None
    assert config.modalities["flat"].static
    assert {config.settings_of(name).partition.base_patch_size for name in config.modalities} == {
        8,
        32,
    }


def test_a_scorer_without_bands_takes_no_bands_from_a_preset(tmp_path):
    config = load(tmp_path, "preset: s2_l2a\nscoring: {scorer: external, folder: scores}")
    assert config.scoring.folder == "scores"


def test_a_preset_may_set_scorer_and_partition(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "modality: {bands: [a, b]}\n"
        "scoring: {scorer: variance, statistic: std, bands: [a]}\n"
        "partition: {num_scales: 2, thresholds: [0.5]}\n"
    )
    config = load(
        tmp_path,
        "scoring: {num_bins: 16}\npartition: {quantile: 0.2, base_patch_size: 2}\n"
        "modalities: {x: {preset: mine.yaml}, y: {preset: mine.yaml, partition: {uniform_px: 4},"
        " scoring: {scorer: entropy}}}",
    )
    x, y = config.modalities["x"], config.modalities["y"]
    assert (x.scoring.scorer, x.scoring.statistic, x.scoring.bands) == ("variance", "std", ("a",))
    assert (x.partition.thresholds, x.partition.quantile) == ((0.5,), None)
    assert (x.partition.num_scales, x.partition.base_patch_size) == (2, 2)
    assert (y.partition.uniform_px, y.partition.thresholds, y.partition.num_scales) == (4, None, 2)
    assert (y.scoring.scorer, y.scoring.bands) == ("entropy", ("a",))
    alone = load(tmp_path, "preset: mine.yaml\npartition: {quantile: 0.2}")
    assert (alone.partition.quantile, alone.partition.thresholds) == (0.2, None)


def test_paths_of_presets_count_from_the_configuration(tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "base.yaml").write_text("modality: {nodata: 7}")
    (tmp_path / "presets" / "pair.yaml").write_text("modalities: {a: {preset: base.yaml}, b: {}}")
    assert load(tmp_path, "preset: presets/base.yaml").modality.nodata == 7
    assert load(tmp_path, "preset: presets/pair.yaml").modalities["a"].nodata == 7


def test_the_command_line_may_name_a_preset(tmp_path):
    assert load(tmp_path, "", "preset=dem").modality.static
    assert load(tmp_path, "", "modalities.a.preset=dem").modalities["a"].static


@pytest.mark.parametrize(
    ("content", "text", "message"),
    [
        ("modality: {nodta: 7}", "preset: p.yaml", "p.yaml: unknown key 'modality.nodta'; did you mean"),
        ("preset: dem", "preset: p.yaml", "p.yaml: a preset cannot name another preset"),
        ("store: {codec: zstd}", "modalities: {a: {preset: p.yaml}}", "p.yaml sets store, without effect"),
        ("modalities: {a: {}}", "preset: p.yaml\nmodality: {nodata: 1}", "sets modalities and the"),
        ("", "preset: q.yaml", "q.yaml: cannot read the configuration: No such file"),
        ("!!python/name:os.system", "preset: p.yaml", "p.yaml: not a YAML file"),
        ("", "modalities: {a: {preset: [1]}}", "modalities.a.preset [1] is not known"),
    ],
)  # fmt: skip
def test_mistakes_in_presets_are_named(tmp_path, content, text, message):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_may_leave_something_to_the_configuration(tmp_path):
    (tmp_path / "p.yaml").write_text("scoring: {scorer: external}")
    assert load(tmp_path, "preset: p.yaml\nscoring: {folder: x}").scoring.folder == "x"
    with pytest.raises(ConfigError, match=r"scoring.folder is not given"):
        load(tmp_path, "preset: p.yaml")


def test_aliases_name_one_band_each():
    for preset, bands in BAND_ALIASES.items():
        names = [name for band, aliases in bands.items() for name in {band, *aliases}]
        assert len(set(names)) == len(names), preset
        assert set(PRESETS[preset]["modality"]["bands"]) <= set(bands)


@pytest.mark.parametrize(
    ("band", "names"),
    [
        ("B02", ("blue", "B2", "B02_10m", "b02")),
        ("B8A", ("nir08", "b8a", "B8A_20m")),
        ("SR_B5", ("nir08", "B5", "sr_b5")),
        ("VV", ("vv",)),
        ("nir", ("N", "NIR")),
        ("QA_PIXEL", ("qa_pixel",)),
    ],
)
def test_aliases_in_common_use(band, names):
    assert set(names) <= set(band_aliases(band))


def test_a_band_of_no_preset_has_no_alias():
    assert band_aliases("B99") == ()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_zero_is_hardly_ever_a_true_number_of_sentinel_2(real_data):
    """What `nodata: 0` costs in scenes that do not state nodata."""
    zero = pixels = 0
    for pattern in (
        "satclip/*.tif",
        "s2cloudless/s2*.tif",
        "terramind/S2*/*.tif",
        "ravaen/*/*.tif",
    ):
        for file in real_data.glob(pattern):
            with rasterio.open(file) as scene:
                # The last two of ravaen are masks.
                bands = scene.read(range(1, min(scene.count, 13) + 1))
            valid = np.isfinite(bands).all(axis=0)
            zero += np.count_nonzero((bands == 0).any(axis=0) & valid)
            pixels += np.count_nonzero(valid)
    assert 0 < zero <= 2e-5 * pixels
