from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError
from pipeline.planning.stacks import make_stacks
from pipeline.scenes import Grid
from pipeline.settings.config import DataConfig
from support import header

GRID = Grid(100, 200, "EPSG:32632", (10, 0, 5e5, 0, -10, 5e6))
SHIFTED = Grid(100, 200, "EPSG:32632", (10, 0, 500_003, 0, -10, 5e6))
COARSE = Grid(50, 100, "EPSG:32632", (20, 0, 5e5, 0, -20, 5e6))
ELSEWHERE = Grid(100, 200, "EPSG:32632", (10, 0, 6e5, 0, -10, 5e6))


def day(number):
    return f"2020-01-{number:02}T00:00:00Z"


def config(**sections):
    return DataConfig.model_validate(sections)


def two(**sections):
    return config(modalities={"s2": {}, "s1": sections.pop("s1", {})}, **sections)


def image(name, when=None, grid=GRID, **facts):
    facts = {"modality": "s2" if name.startswith("s2:") else "image", **facts}
    return header(name, grid=grid, datetime=when and day(when), **facts)


def of(stack, modality="image"):
    return [scene and scene.id for scene in stack.scenes[modality]]


def test_scenes_of_one_grid_are_one_place_with_all_their_dates():
    scenes = [image("b", 2), image("a", 9), image("c", 1), image("far", 1, ELSEWHERE)]
    sorting = make_stacks(config(), {"image": scenes})
    assert [(stack.name, of(stack)) for stack in sorting.stacks] == [
        ("c", ["c", "b", "a"]),
        ("far", ["far"]),
    ]
    assert sorting.stacks[0].datetimes == (day(1), day(2), day(9))
    assert sorting.refused == sorting.skipped == {}


def test_without_dates_every_scene_is_a_place_of_its_own():
    sorting = make_stacks(config(), {"image": [image("a"), image("b")]})
    assert [stack.name for stack in sorting.stacks] == ["a", "b"]
    assert sorting.stacks[0].datetimes == (None,)


def test_scenes_without_a_crs_belong_together_only_where_names_say_so():
    plain = Grid(64, 64, None, None)
    scenes = [image("a", 1, plain), image("b", 2, plain)]
    assert len(make_stacks(config(), {"image": scenes}).stacks) == 2
    named = [replace(scene, place="p") for scene in scenes]
    (stack,) = make_stacks(config(), {"image": named}).stacks
    assert (stack.name, of(stack)) == ("p", ["a", "b"])


def test_a_scene_on_another_grid_than_its_place_is_refused_with_both_grids():
    scenes = [image("a", 1, place="p"), image("b", 2, SHIFTED, place="p")]
    sorting = make_stacks(config(), {"image": scenes})
    assert of(sorting.stacks[0]) == ["a"]
    reason = sorting.refused["b"]
    assert "origin (500003, 5000000)" in reason
    assert "origin (500000, 5000000)" in reason
    assert "set grid.warp" in reason


def test_or_resampled_where_the_configuration_says_so():
    scenes = [image("a", 1, place="p"), image("b", 2, SHIFTED, place="p")]
    warp = {"grid": {"warp": True}, "modality": {"resampling": "cubic"}}
    (stack,) = make_stacks(config(**warp), {"image": scenes}).stacks
    first, second = (scene.assets[0] for scene in stack.scenes["image"])
    assert first.warp_onto is None
    assert (second.warp_onto, second.resampling, second.grid) == (GRID, "cubic", SHIFTED)


def test_a_named_grid_takes_what_overlaps_and_skips_the_rest():
    named = {"crs": "EPSG:32632", "origin": [500_500, 5e6], "pixel_size": 10, "shape": [64, 64]}
    scenes = [image("a", 1), image("b", 2, ELSEWHERE)]
    sorting = make_stacks(config(grid={"warp": True, **named}), {"image": scenes})
    assert (sorting.stacks[0].name, of(sorting.stacks[0])) == ("grid", ["a"])
    assert "does not overlap the named grid (64 x 64 px" in sorting.skipped["b"]
    refused = make_stacks(config(grid=named), {"image": scenes}).refused
    assert "lies on another grid" in refused["a"]


def test_scenes_of_one_place_and_date_are_all_refused():
    scenes = [image("a", 1), image("b", 1), image("c", 2)]
    sorting = make_stacks(config(), {"image": scenes})
    assert of(sorting.stacks[0]) == ["c"]
    assert (
        sorting.refused["a"] == f"has place a and date {day(1)} in common with b; keep one of them"
    )
    assert list(sorting.refused) == ["a", "b"]


def test_undated_scenes_of_a_place_with_others_are_refused():
    scenes = [image("a", None, place="p"), image("b", 2, place="p")]
    sorting = make_stacks(config(), {"image": scenes})
    assert of(sorting.stacks[0]) == ["b"]
    assert "has no date, and place p has 2 scenes; give {date}" in sorting.refused["a"]


def test_places_need_names_of_their_own():
    scenes = [image("a", 1, place="b"), image("b")]
    with pytest.raises(ArchiveError, match="two places are called 'b'"):
        make_stacks(config(), {"image": scenes})


def test_every_date_of_every_modality_is_a_timestep():
    s2 = [image("s2:a", 1), image("s2:b", 5)]
    s1 = [image("s1:a", 5, modality="s1"), image("s1:b", 7, modality="s1")]
    (stack,) = make_stacks(two(), {"s2": s2, "s1": s1}).stacks
    assert stack.datetimes == (day(1), day(5), day(7))
    assert of(stack, "s2") == ["s2:a", "s2:b", None]
    assert of(stack, "s1") == [None, "s1:a", "s1:b"]


def test_within_a_tolerance_each_timestep_takes_its_nearest_scene():
    s2 = [image(f"s2:{n}", n) for n in (1, 10, 20)]
    s1 = [image(f"s1:{n}", n, modality="s1") for n in (3, 4, 12, 28)]
    settings = two(pairing={"tolerance_days": 5})
    sorting = make_stacks(settings, {"s2": s2, "s1": s1})
    (stack,) = sorting.stacks
    assert stack.datetimes == (day(1), day(10), day(20))
    assert of(stack, "s1") == ["s1:3", "s1:12", None]
    assert list(sorting.skipped) == ["s1:28", "s1:4"] or set(sorting.skipped) == {"s1:4", "s1:28"}
    assert "near enough in time" in sorting.skipped["s1:4"]


days = st.lists(st.integers(1, 28), min_size=1, max_size=10, unique=True)


@given(days, days, st.integers(0, 10))
def test_pairs_are_mutually_nearest_and_no_scene_is_used_twice(own, others, tolerance):
    s2 = [image(f"s2:{n:02}", n) for n in own]
    s1 = [image(f"s1:{n:02}", n, modality="s1") for n in others]
    sorting = make_stacks(two(pairing={"tolerance_days": tolerance}), {"s2": s2, "s1": s1})
    (stack,) = sorting.stacks
    paired = [int(name[3:]) if name else None for name in of(stack, "s1")]
    used = [n for n in paired if n is not None]
    assert len(set(used)) == len(used)
    assert set(used) | {int(name[3:]) for name in sorting.skipped} == set(others)
    for when, taken in zip(sorted(own), paired, strict=True):
        # Of two timesteps that are equally near, a scene serves the earlier.
        serving = [n for n in others if min(own, key=lambda o: (abs(n - o), o)) == when]
        nearest = min((abs(n - when) for n in serving), default=99)
        if taken is not None:
            assert abs(taken - when) <= tolerance
            assert abs(taken - when) == nearest
    closest = min(abs(a - b) for a in own for b in others)
    assert bool(used) == (closest <= tolerance)


def test_a_static_modality_belongs_to_all_timesteps():
    s2 = [image("s2:a", 1), image("s2:b", 5)]
    dem = [image("s1:dem", None, COARSE, modality="s1")]
    (stack,) = make_stacks(two(s1={"static": True}), {"s2": s2, "s1": dem}).stacks
    assert (stack.datetimes, of(stack, "s1")) == ((day(1), day(5)), ["s1:dem"])


def test_modalities_without_crs_and_dates_meet_by_name():
    plain, coarse = Grid(64, 64, None, None), Grid(32, 32, None, None)
    s2 = [image(f"s2:S2/{name}", None, plain) for name in "ab"]
    s1 = [image("s1:S1/b", None, coarse, modality="s1")]
    sections = {"modalities": {"s2": {"source": "S2"}, "s1": {"source": "S1"}}}
    sorting = make_stacks(config(**sections), {"s2": s2, "s1": s1})
    assert [of(stack, "s1") for stack in sorting.stacks] == [[None], ["s1:S1/b"]]


def test_another_modality_on_another_grid_is_refused_and_one_far_away_skipped():
    s1 = [image("s1:b", 1, SHIFTED, modality="s1"), image("s1:c", 1, ELSEWHERE, modality="s1")]
    sorting = make_stacks(two(), {"s2": [image("s2:a", 1)], "s1": s1})
    assert (
        "lies on another grid (100 x 200 px, EPSG:32632, origin (500003" in sorting.refused["s1:b"]
    )
    assert list(sorting.skipped) == ["s1:c"]


def test_one_raster_may_be_resampled_onto_several_places():
    s2 = [image("s2:a", 1), image("s2:b", 1, ELSEWHERE)]
    world = Grid(400, 800, "EPSG:4326", (0.01, 0, 5, 0, -0.01, 47))
    dem = [image("s1:dem", None, world, modality="s1")]
    settings = two(s1={"static": True}, grid={"warp": True})
    sorting = make_stacks(settings, {"s2": s2, "s1": dem})
    targets = [stack.scenes["s1"][0].assets[0].warp_onto for stack in sorting.stacks]
    assert targets == [GRID, ELSEWHERE]
    assert sorting.refused == sorting.skipped == {}


def test_two_static_rasters_of_one_place_are_refused():
    dem = [image(f"s1:{n}", None, modality="s1") for n in "ab"]
    sorting = make_stacks(two(s1={"static": True}), {"s2": [image("s2:a", 1)], "s1": dem})
    assert of(sorting.stacks[0], "s1") == [None]
    assert "covers place a and so does s1:b" in sorting.refused["s1:a"]


def test_undated_scenes_of_a_modality_in_a_series_are_refused():
    sorting = make_stacks(two(), {"s2": [image("s2:a", 1)], "s1": [image("s1:x", modality="s1")]})
    assert "has no date, but place a is a time series" in sorting.refused["s1:x"]


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([GRID, SHIFTED, ELSEWHERE]),
                          st.sampled_from([None, "p"])), max_size=8))  # fmt: skip
def test_every_scene_is_used_refused_or_skipped(facts):
    scenes = [
        image(f"s{i}", when, grid, place=place) for i, (when, grid, place) in enumerate(facts)
    ]
    sorting = make_stacks(config(), {"image": scenes})
    used = [name for stack in sorting.stacks for name in of(stack) if name]
    parts = [*used, *sorting.refused, *sorting.skipped]
    assert sorted(parts) == sorted(scene.id for scene in scenes)
