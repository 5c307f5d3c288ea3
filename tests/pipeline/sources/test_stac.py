"""Static STAC catalogues: what is walked, what becomes a scene, what is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ArchiveError, ConfigError
from pipeline.readers.compare import compare_header
from pipeline.readers.rasters import read_header
from pipeline.scenes import Grid, Plane
from pipeline.settings.modality import ModalityConfig
from pipeline.sources.stac import MAX_DEPTH, files_of, list_stac
from stac_catalogues import (
    MODALITY,
    SHAPE,
    TRANSFORM,
    access_to,
    item_of,
    newer,
    write_catalogue,
    write_collection,
    write_json,
    write_rasters,
)
from support import save_scene, textured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An archive's folder; what is beside it may not be opened."""
    (tmp_path / "archive").mkdir()
    return tmp_path / "archive"


def listed(location: Path | str, folder: Path, modality: ModalityConfig = MODALITY):
    return list_stac(str(location), str(folder), modality, access_to(folder))


def nested(folder: Path) -> Path:
    """catalog.json -> two collections -> an item each, in STAC 1.0 and 1.1."""
    for name, item in (("a", item_of("one")), ("b", newer(item_of("two")))):
        write_rasters(folder / name / "items", item["id"])
        write_json(folder / name / "items" / f"{item['id']}.json", item)
        link = ("item", f"./items/{item['id']}.json")
        write_catalogue(
            folder / name / "collection.json", [("root", "../catalog.json"), link], "Collection"
        )
    children = [("self", "catalog.json"), ("child", "a/collection.json")]
    return write_catalogue(folder / "catalog.json", [*children, ("child", "b/collection.json")])


def test_a_nested_catalogue_becomes_scenes_without_opening_a_raster(folder):
    start = nested(folder)
    for raster in folder.rglob("*.tif"):
        raster.unlink()
    listing = listed(start, folder)
    assert [scene.id for scene in listing.scenes] == ["one", "two"]
    assert (listing.refused, listing.skipped, listing.notes) == ({}, {}, ())
    grid = Grid(*SHAPE, "EPSG:32632", tuple(map(float, TRANSFORM)))
    for scene in listing.scenes:
        assert (scene.modality, scene.datetime) == ("s2", "2023-07-01T10:46:30Z")
        assert (scene.place, scene.baseline, scene.mask) == ("31UFU", "05.09", None)
        assert [asset.planes for asset in scene.assets] == [
            (Plane(band, 0, 0.0, 0.0001, -0.1),) for band in ("B02", "B03")
        ]
        for asset in scene.assets:
            assert (asset.grid, asset.dtype, asset.header_seen) == (grid, "uint16", False)
            assert asset.fingerprint == "2023-07-02T01:49:17.191Z"
    assert listing.scenes[0].assets[0].href == str(folder / "a" / "items" / "one_B02.tif")
    # Equal grids and planes are one object: catalogues have millions of them.
    assert listing.scenes[0].assets[0].grid is listing.scenes[1].assets[1].grid
    assert listing.scenes[0].assets[0].planes is listing.scenes[1].assets[0].planes


def test_what_the_catalogue_states_is_what_the_headers_say(folder):
    listing = listed(nested(folder), folder)
    for scene in listing.scenes:
        for asset in scene.assets:
            compare_header(asset, read_header(asset.href, access_to(folder)))


def test_the_files_tell_when_a_catalogue_has_changed(folder):
    start = nested(folder)
    files = listed(start, folder).files
    names = {Path(name).relative_to(folder).as_posix() for name in files}
    assert names == {
        "catalog.json", "a/collection.json", "b/collection.json", "a/items/one.json", "b/items/two.json",
    }  # fmt: skip
    assert files_of(str(start), str(folder), MODALITY, access_to(folder)) == files
    item = json.loads((folder / "a/items/one.json").read_text())
    write_json(folder / "a/items/one.json", {**item, "changed": True})
    after = files_of(str(start), str(folder), MODALITY, access_to(folder))
    assert {name for name in files if files[name] != after[name]} == {
        str(folder / "a/items/one.json")
    }


@pytest.mark.parametrize("location", ["", "catalog.json"])
def test_a_folder_with_a_catalogue_and_a_relative_location(folder, location):
    nested(folder)
    assert len(listed(location, folder).scenes) == 2
    assert len(listed(folder / location, folder).scenes) == 2


def test_a_folder_without_a_catalogue(folder):
    with pytest.raises(ArchiveError, match=r"holds no catalog\.json or collection\.json"):
        listed(folder, folder)


def test_a_single_item_and_an_item_collection(folder):
    items = [item_of("one"), newer(item_of("two"))]
    assert [s.id for s in listed(write_json(folder / "x.json", items[1]), folder).scenes] == ["two"]
    listing = listed(write_collection(folder / "all.json", items), folder)
    assert [scene.id for scene in listing.scenes] == ["one", "two"]
    assert list(listing.files) == [str(folder / "all.json")]


def test_one_page_of_a_search_says_that_there_are_more(folder):
    page = {"type": "FeatureCollection", "features": [item_of("one")], "links": [{"rel": "next"}]}
    (note,) = listed(write_json(folder / "page.json", page), folder).notes
    assert "next page was not asked for" in note


@pytest.mark.parametrize("link", ["../b/two.json", "./../b/../b/two.json", "FILE", "ABSOLUTE"])
def test_links_lead_up_and_across(folder, link):
    write_json(folder / "b/two.json", item_of("two"))
    given = {"FILE": f"file://{folder}/b/two.json", "ABSOLUTE": f"{folder}/b/two.json"}
    start = write_catalogue(folder / "a" / "catalog.json", [("item", given.get(link, link))])
    listing = listed(start, folder)
    assert [scene.id for scene in listing.scenes] == ["two"]
    assert listing.scenes[0].assets[0].href == f"{folder}/b/two_B02.tif"


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("../outside.json", "outside"),
        ("/etc/passwd", "outside"),
        ("file:///etc/passwd", "outside"),
        ("file://server/share/x.json", "prefix 'file:'"),
        ("https://elsewhere.example/x.json", "outside"),
        ("https://169.254.169.254/latest/meta-data", "outside"),
        ("ftp://elsewhere.example/x.json", "prefix 'ftp:'"),
        ("/vsicurl/https://elsewhere.example/x.json", "virtual file"),
        ("/vsizip/archive.zip/x.json", "virtual file"),
        ("link.json", "outside"),
        ("linked/x.json", "outside"),
        ("x\0.json", "control characters"),
        ("x\ud800.json", "control characters"),
        ("", "expected a path or URL"),
        (None, "expected a path or URL"),
        (["x.json"], "expected a path or URL"),
        ("absent.json", "cannot be read: No such file"),
        ("broken.json", "is not JSON"),
        ("deep.json", "nested too deeply"),
        ("number.json", "is of type None"),
        ("catalogue.json", "is of type 'Catalog'; expected the STAC type Feature"),
    ],
)
def test_a_bad_link_is_refused_by_name_and_the_rest_goes_on(folder, link, reason):
    write_json(folder.parent / "outside.json", item_of("outside"))
    (folder / "link.json").symlink_to(folder.parent / "outside.json")
    (folder / "linked").symlink_to(folder.parent)
    write_json(folder.parent / "x.json", item_of("outside"))
    (folder / "broken.json").write_text("{")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "number.json").write_text("12")
    write_catalogue(folder / "catalogue.json", [])
    write_json(folder / "good.json", item_of("good"))
    start = write_catalogue(folder / "catalog.json", [("item", link), ("item", "good.json")])
    listing = listed(start, folder)
    assert [scene.id for scene in listing.scenes] == ["good"]
    ((name, found),) = listing.refused.items()
    assert reason in found
    assert "\n" not in name + found
    assert name.startswith(str(folder))
    assert files_of(str(start), str(folder), MODALITY, access_to(folder)) == listing.files


def test_links_in_a_circle_are_followed_once(folder):
    write_json(folder / "one.json", item_of("one"))
    (folder / "again").symlink_to(folder)
    links = [
        ("child", "b.json"),
        ("child", "catalog.json"),
        ("item", "one.json"),
        ("item", "./one.json"),
    ]
    start = write_catalogue(folder / "catalog.json", links)
    write_catalogue(
        folder / "b.json", [("child", "again/catalog.json"), ("item", "again/one.json")]
    )
    listing = listed(start, folder)
    assert [scene.id for scene in listing.scenes] == ["one"]
    assert listing.refused == {}


def test_depth_is_bounded(folder):
    for number in range(MAX_DEPTH + 2):
        links = [("child", f"{number + 1}.json"), ("item", f"item{number}.json")]
        write_catalogue(folder / f"{number}.json", links)
        write_json(folder / f"item{number}.json", item_of(f"{number:03d}"))
    listing = listed(folder / "0.json", folder)
    assert [scene.id for scene in listing.scenes] == [f"{n:03d}" for n in range(MAX_DEPTH)]
    assert len(listing.refused) == 2
    assert all("links away" in reason for reason in listing.refused.values())


def test_two_items_of_one_id_name_both_files(folder):
    for name in ("x", "y"):
        write_json(folder / f"{name}.json", item_of("one"))
    start = write_catalogue(folder / "catalog.json", [("item", "x.json"), ("item", "y.json")])
    with pytest.raises(
        ArchiveError, match=r"two items have the id 'one': in .*x\.json and in .*y\.json"
    ):
        listed(start, folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ('{"type": "Nothing"}', "is of type 'Nothing'"),
        ('{"type": "Catalog"}', "has no list of links"),
        ('{"type": "Catalog", "links": [1]}', "has no list of links"),
        ('{"type": "FeatureCollection", "features": 1}', "has no list of features"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "is not JSON"),
    ],
)
def test_a_start_that_is_no_stac_document(folder, content, reason):
    (folder / "start.json").write_text(content)
    with pytest.raises(ArchiveError, match=reason):
        listed("start.json", folder)


def test_a_start_outside_the_roots_or_absent(folder):
    write_json(folder.parent / "x.json", item_of("x"))
    with pytest.raises(ArchiveError, match="outside"):
        listed("../x.json", folder)
    with pytest.raises(ArchiveError, match="No such file"):
        listed("absent.json", folder)


def test_items_of_another_kind_are_skipped_and_incomplete_ones_refused(folder):
    radar, half = item_of("radar", bands=("VV",)), item_of("half", bands=("B02",))
    listing = listed(write_collection(folder / "x.json", [radar, half, item_of("one")]), folder)
    assert [scene.id for scene in listing.scenes] == ["one"]
    assert listing.skipped == {"radar": "has none of the bands ['B02', 'B03']"}
    assert listing.refused == {
        "half": "lacks ['B03']; it has the assets 'B02', 'thumbnail'; give modality.assets, by band the "
        "asset key"
    }


def test_an_id_that_is_skipped_elsewhere_keeps_both_entries(folder):
    items = [item_of("one", bands=("VV",)), item_of("one")]
    listing = listed(write_collection(folder / "x.json", items), folder)
    assert [scene.id for scene in listing.scenes] == ["one"]
    assert list(listing.skipped) == [f"one in {folder}/x.json"]


def test_items_without_a_usable_id_are_counted(folder):
    items = [{**item_of("x"), "id": bad} for bad in (None, "", 3, "a\nb", "x" * 600)]
    listing = listed(write_collection(folder / "x.json", [*items, 7, item_of("one")]), folder)
    assert [scene.id for scene in listing.scenes] == ["one"]
    assert list(listing.refused) == [f"item {n} in {folder}/x.json" for n in range(1, 7)]


def test_a_modality_must_name_its_bands(folder):
    nested(folder)
    with pytest.raises(ConfigError, match=r"give modality\.bands"):
        listed("catalog.json", folder, ModalityConfig(name="s2"))


def test_missing_facts_come_from_the_header(folder):
    write_rasters(folder, "one")
    item = item_of("one")
    del item["assets"]["B03"]["raster:bands"]
    listing = listed(write_collection(folder / "x.json", [item]), folder)
    (scene,) = listing.scenes
    stated, seen = scene.assets
    assert (stated.header_seen, seen.header_seen) == (False, True)
    assert replace(seen.grid) == stated.grid
    assert (seen.dtype, seen.planes) == ("uint16", (Plane("B03", 0, 0.0),))
    assert seen.block_shape != stated.block_shape
    (note,) = listing.notes
    assert "headers of their files were read" in note


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("proj:shape", [16, 25], "has size 16 x 24 px in its file, 16 x 25 px in its catalogue"),
        ("proj:transform", [20, 0, 5e5, 0, -20, 5e6], "has transform"),
        ("proj:epsg", 32633, "has CRS EPSG:32632 in its file, EPSG:32633 in its catalogue"),
        ("raster:bands", [{"nodata": 9}], "has nodata of band 'B03' 0.0 in its file, 9.0 in its"),
        ("eo:bands", [{"name": "B03"}, {"name": "B04"}], "has 1 bands in its file, 2 in its"),
        ("href", "absent.tif", "No such file"),
    ],
)
def test_a_header_that_contradicts_the_catalogue_is_refused_with_both_values(
    folder, field, value, reason
):
    write_rasters(folder, "one")
    item = item_of("one")
    del item["assets"]["B03"]["raster:bands"]
    item["assets"]["B03"][field] = value
    listing = listed(write_collection(folder / "x.json", [item]), folder)
    assert listing.scenes == ()
    assert reason in listing.refused["one"]
    assert listing.refused["one"].startswith("asset 'B03'")


def test_a_file_of_several_bands_that_the_catalogue_does_not_list(folder):
    save_scene(folder / "one_B02.tif", textured((2, *SHAPE)))
    item = item_of("one", bands=("B02",))
    for field in ("eo:bands", "raster:bands"):
        del item["assets"]["B02"][field]
    file = write_collection(folder / "x.json", [item])
    listing = listed(file, folder, ModalityConfig(name="s2", bands=("B02",)))
    assert listing.refused["one"].startswith(
        "asset 'B02' has 2 bands in its file, and its catalogue does"
    )


def test_real_scenes_of_twelve_bands_in_one_file(satclip, tmp_path):
    rasters = sorted(satclip.glob("*.tif"))
    bands = [f"B{n:02d}" for n in range(1, 9)] + ["B8A", "B09", "B11", "B12"]
    items = []
    for raster in rasters:
        item = item_of(raster.stem, bands=())
        del item["properties"]["proj:epsg"]
        names = [{"name": band} for band in bands]
        item["assets"]["data"] = {"href": str(raster), "bands": names}
        items.append(item)
    file = write_collection(tmp_path / "x.json", items)
    asked = ModalityConfig(name="s2", bands=("B8A", "B02"))
    access = replace(access_to(tmp_path), roots=(str(tmp_path), str(satclip.resolve())))
    listing = list_stac(str(file), str(tmp_path), asked, access)
    assert [scene.id for scene in listing.scenes] == [raster.stem for raster in rasters]
    for scene, raster in zip(listing.scenes, rasters, strict=True):
        header = read_header(str(raster), access)
        (asset,) = scene.assets
        assert [(plane.band, plane.key) for plane in asset.planes] == [("B8A", 8), ("B02", 1)]
        assert (asset.grid, asset.dtype, asset.block_shape) == (
            header.grid,
            "uint16",
            header.block_shape,
        )
