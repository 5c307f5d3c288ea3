"""Scenes of different offsets brought to one: which number is added to which, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.planning.harmonize import apply_shift, baseline_finding, harmonize
from pipeline.scenes import Asset, Grid, Plane, Scene
from pipeline.settings.modality import BaselineConfig, ModalityConfig

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int64", "uint64", "float32", "float64"]
SENTINEL2 = BaselineConfig(since="04.00", offset=-0.1)
DECAMETRES = ModalityConfig(name="s2", scale=1e-4, baseline=SENTINEL2)


def scene(name, baseline=None, scale=None, offset=None, datetime=None) -> Scene:
    """A scene of two assets; `scale` and `offset` of both, or one per band."""
    scales, offsets = (x if isinstance(x, tuple) else (x, x) for x in (scale, offset))
    grid = Grid(8, 8, None, None)
    assets = tuple(
        Asset(f"/a/{name}_{b}.tif", "raster", grid, "uint16", (Plane(b, 0, 0, s, o),), (8, 8), "f")
        for b, s, o in zip(("red", "nir"), scales, offsets, strict=True)
    )
    return Scene(name, "s2", assets, datetime, baseline=baseline)


def shifts(harmonized):
    return {scene.id: scene.shift for scene in harmonized.scenes}


def test_what_is_older_than_the_baseline_gets_the_number_that_the_baseline_adds():
    scenes = [scene("a", "05.09"), scene("b", "03.01"), scene("c", "04.00"), scene("d", "02.14")]
    found = harmonize(scenes, DECAMETRES)
    assert shifts(found) == {"a": 0, "b": 1000, "c": 0, "d": 1000}
    assert (found.scale, found.offset, found.refused) == (1e-4, -0.1, {})
    assert found.notes == (
        "2 scenes of baseline 04.00 or later (offset -0.1); 2 scenes of baseline before 04.00 (offset 0), "
        "to whose numbers 1000 is added: the store has scale 0.0001, offset -0.1",
    )
    assert [replace(s, shift=0) for s in found.scenes] == scenes


def test_scenes_of_one_baseline_are_left_alone():
    old = harmonize([scene("a", "03.01"), scene("b", "02.09")], DECAMETRES)
    new = harmonize([scene("a", "05.00")], DECAMETRES)
    assert (shifts(old), old.offset) == ({"a": 0, "b": 0}, 0.0)
    assert (shifts(new), new.offset) == ({"a": 0}, -0.1)


@pytest.mark.parametrize(
    ("baseline", "since"),
    [
        ("04.00", True), ("4.0", True), ("N0400", True), ("0400", True), ("05.10", True), ("5.1", True),
        ("03.99", False), ("N0301", False), ("02.14", False), ("99.99", True), ("4", True),
    ],
)  # fmt: skip
def test_baselines_compare_as_versions(baseline, since):
    assert harmonize([scene("a", baseline)], DECAMETRES).offset == (-0.1 if since else 0.0)


@pytest.mark.parametrize("baseline", [None, "", "unknown", "x04.00", "04.00.1", "2022-01-25"])
def test_an_unknown_baseline_is_what_the_configuration_says(baseline):
    rules = {
        way: SENTINEL2.model_copy(update={"unknown": way}) for way in ("before", "since", "refuse")
    }
    modalities = {way: DECAMETRES.model_copy(update={"baseline": r}) for way, r in rules.items()}
    scenes = [scene("a", baseline, datetime="2023-01-01T00:00:00Z"), scene("b", "05.00")]
    assert shifts(harmonize(scenes, modalities["before"])) == {"a": 1000, "b": 0}
    assert shifts(harmonize(scenes, modalities["since"])) == {"a": 0, "b": 0}
    refused = harmonize(scenes, modalities["refuse"])
    assert shifts(refused) == {"b": 0}
    assert "baseline.unknown is refuse" in refused.refused["a"]
    assert (
        "unknown baseline, taken for before 04.00"
        in harmonize(scenes, modalities["before"]).notes[0]
    )
    said = any("is no version" in note for note in harmonize(scenes, modalities["before"]).notes)
    assert said == bool(baseline)


def test_the_sensing_date_decides_nothing():
    for year in ("2016", "2021", "2024"):
        scenes = [scene("a", "05.00", datetime=f"{year}-06-01T00:00:00Z"), scene("b", "03.01")]
        assert shifts(harmonize(scenes, DECAMETRES)) == {"a": 0, "b": 1000}


def test_a_stated_offset_counts_before_the_baseline_and_the_contradiction_is_told():
    scenes = [scene("a", "05.00", 1e-4, 0.0), scene("b", "05.00", 1e-4, -0.1), scene("c", "05.00")]
    found = harmonize(scenes, DECAMETRES)
    assert shifts(found) == {"a": 1000, "b": 0, "c": 0}
    assert (
        "1 scene with a stated offset that is not their baseline's (for example a)"
        in found.notes[1]
    )


def test_without_a_baseline_rule_the_configured_offset_fills_in():
    modality = ModalityConfig(name="s2", scale=1e-4, offset=-0.2)
    found = harmonize([scene("a"), scene("b", offset=0.0)], modality)
    assert (shifts(found), found.offset) == ({"a": 0, "b": 2000}, -0.2)
    nothing = harmonize([scene("a"), scene("b")], ModalityConfig(name="s2"))
    assert (shifts(nothing), nothing.scale, nothing.offset) == ({"a": 0, "b": 0}, None, None)


def test_an_offset_read_as_float32_is_the_same_offset():
    rounded = float(np.float32(-0.1)), float(np.float32(1e-4))
    scenes = [scene("a", None, rounded[1], rounded[0]), scene("b", None, 1e-4, 0.0)]
    found = harmonize([*scenes, scene("c", None, 1e-4, -0.1)], ModalityConfig(name="s2"))
    assert shifts(found) == {"a": 0, "b": 1000, "c": 0}


def test_a_shift_that_is_no_whole_number_refuses_with_both_offsets():
    offsets = {"a": -0.1, "b": -0.05, "c": -0.00005}
    scenes = [scene(name, None, 1e-4, offset) for name, offset in offsets.items()]
    found = harmonize(scenes, ModalityConfig(name="s2"))
    assert shifts(found) == {"a": 0, "b": 500}
    assert found.refused["c"].startswith(
        "has offset -5e-05, others -0.1; at scale 0.0001 they are 999.5"
    )


def test_offsets_that_differ_need_a_scale():
    scenes = [scene("a", "05.00"), scene("b", "03.01")]
    found = harmonize(scenes, ModalityConfig(name="s2", baseline=SENTINEL2))
    assert shifts(found) == {"a": 0}
    assert "give modality.scale" in found.refused["b"]


def test_the_minority_of_another_scale_is_refused_with_both_and_a_tie_is_an_error():
    scenes = [
        scene("a", None, 1e-4, 0.0),
        scene("b", None, 1e-3, 0.0),
        scene("c", None, 1e-4, -0.1),
    ]
    found = harmonize(scenes, ModalityConfig(name="s2"))
    assert shifts(found) == {"a": 1000, "c": 0}
    assert found.refused == {
        "b": "has scale 0.001 with an offset; most scenes of modality s2 have scale 0.0001 with an offset"
    }
    with pytest.raises(
        ArchiveError, match=r"scale 0\.0001 .*for example a.* and scale 0\.001 .*example b"
    ):
        harmonize(scenes[:2], ModalityConfig(name="s2"))


def test_scenes_that_state_no_offset_do_not_join_those_that_do():
    scenes = [scene("a", None, 1e-4, 0.0), scene("b", None, 1e-4, -0.1), scene("c", None, 1e-4)]
    found = harmonize(scenes, ModalityConfig(name="s2"))
    assert shifts(found) == {"a": 1000, "b": 0}
    assert "without a known offset" in found.refused["c"]


def test_bands_that_differ_are_refused_unless_all_scenes_have_them_so():
    thermal = {"scale": (2.75e-5, 0.00341802), "offset": (-0.2, 149.0)}
    alike = harmonize([scene("a", **thermal), scene("b", **thermal)], ModalityConfig(name="l8"))
    assert (shifts(alike), alike.scale, alike.offset) == ({"a": 0, "b": 0}, None, None)
    assert "nir scale 0.00341802, offset 149" in alike.notes[0]
    plain = {"scale": 2.75e-5, "offset": -0.2}
    mixed = [scene("a", **thermal), scene("b", **plain), scene("c", **plain)]
    found = harmonize(mixed, ModalityConfig(name="l8"))
    assert shifts(found) == {"b": 0, "c": 0}
    assert found.refused["a"].startswith(
        "has bands that differ (nir scale 0.00341802, offset 149; red"
    )


def test_a_baseline_that_is_no_version_is_a_configuration_error():
    modality = ModalityConfig(name="s2", baseline=BaselineConfig(since="four", offset=-0.1))
    with pytest.raises(ConfigError, match=r"baseline\.since is 'four'"):
        harmonize([scene("a")], modality)


def test_no_scenes_at_all():
    assert harmonize([], DECAMETRES).scenes == ()


@given(st.lists(st.sampled_from([0.0, -0.1, -0.05, 0.02]), min_size=1, max_size=8))
def test_physical_values_stay_and_no_shift_is_negative(offsets):
    scenes = [scene(f"s{n}", None, 1e-4, offset) for n, offset in enumerate(offsets)]
    found = harmonize(scenes, ModalityConfig(name="s2"))
    assert found.refused == {}
    assert found.offset == min(offsets)
    for offset, harmonized in zip(offsets, found.scenes, strict=True):
        assert harmonized.shift >= 0
        assert (100 + harmonized.shift) * 1e-4 + found.offset == pytest.approx(100 * 1e-4 + offset)


@given(st.sampled_from(DTYPES), st.integers(0, 70_000), st.integers(0, 2**32 - 1))
def test_a_shift_adds_exactly_or_fails_and_never_wraps(dtype, shift, seed):
    rng = np.random.default_rng(seed)
    limits = (-1000, 1000)
    if np.dtype(dtype).kind != "f":
        limits = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    corner, other = (limits[number] for number in rng.integers(0, 2, 2))
    pixels = np.array([[[corner, 5, 17], [0, 100, other]]], dtype)
    valid = rng.random((2, 3)) < 0.5
    before = pixels.copy()
    expected = [int(v) + shift for v in before[:, valid].ravel()]
    fits = np.dtype(dtype).kind == "f" or max(expected, default=0) <= np.iinfo(dtype).max
    if not fits:
        with pytest.raises(SceneError, match=f"does not fit {dtype}"):
            apply_shift(pixels, valid, shift)
        return
    found = apply_shift(pixels, valid, shift)
    assert found.dtype == pixels.dtype
    assert [int(v) for v in found[:, valid].ravel()] == expected
    assert (found[:, ~valid] == before[:, ~valid]).all()
    assert (pixels == before).all()


def test_invalid_pixels_keep_their_numbers():
    pixels = np.array([[[65535, 0, 10]]], np.uint16)
    found = apply_shift(pixels, np.array([[False, False, True]]), 1000)
    assert found.tolist() == [[[65535, 0, 1010]]]
    floats = np.array([[[np.nan, 1.0]]], np.float32)
    assert np.isnan(apply_shift(floats, np.array([[False, True]]), 7)[0, 0, 0])


def finding(name, pixels, baseline):
    return baseline_finding(scene(name, baseline), DECAMETRES, pixels)


def test_findings_name_their_numbers():
    low, high = np.full(100, 200, np.uint16), np.full(100, 1100, np.uint16)
    assert finding("a", low, "03.01") is None
    assert finding("a", high, "05.00") is None
    assert (
        finding("a", np.full(100, 700), "03.01") is finding("a", np.full(100, 700), "05.00") is None
    )
    said = finding("a", low, "05.00")
    assert said.startswith("is said to have offset -0.1, which adds 1000, but percentile 1 of its")
    assert "is 200: the offset may have been removed already" in said
    assert "is said to have offset 0, but percentile 1 of its numbers is 1100" in finding(
        "a", high, "03.01"
    )
    assert "modality.zero_border" in finding("a", np.zeros(100), "05.00")
    assert finding("a", np.zeros(0), "05.00") is None
    assert baseline_finding(scene("a"), ModalityConfig(name="s2", scale=1e-4), high) is None


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    "folder", ["satclip", "terramind/S2L1C", "terramind/S2L2A", "s2cloudless", "ravaen"]
)
def test_real_scenes_with_and_without_the_added_thousand_are_told_apart(real_data, folder):
    # Those that have it: red over forest, and the shortwave infrared over water, cannot be 0.1 and more.
    added = {"patch_445", "patch_57755", "433D_629L_3_1"}
    paths = [p for p in sorted((real_data / folder).rglob("*.tif")) if p.stem != "cl_mask"]
    assert paths
    for path in paths:
        with rasterio.open(path) as raster:
            pixels = raster.read(range(1, min(raster.count, 13) + 1))
        valid = pixels[:, np.isfinite(pixels).all(axis=0)]
        assert (finding(path.stem, valid, "03.01") is not None) == (path.stem in added)
        assert (finding(path.stem, valid, "05.00") is None) == (path.stem in added)
