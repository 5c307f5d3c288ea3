import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning

from pipeline.errors import ArchiveError, ConfigError
from pipeline.readers.rasters import DRIVERS
from pipeline.scenes import Listing, Plane
from pipeline.settings.modality import ModalityConfig
from pipeline.settings.run import RunConfig
from pipeline.sources import archive_access, list_scenes, source_files
from support import save_scene

PIXELS = np.arange(2 * 4 * 5, dtype=np.uint16).reshape(2, 4, 5)
BANDS_PATTERN = "{tile}_{date}_{band}.tif"


def listed(archive: Path | str, run: dict | None = None, **modality) -> Listing:
    """The listing of an archive, which has to tell the same files when nothing is opened."""
    config, access = (
        ModalityConfig(**modality),
        archive_access(str(archive), RunConfig(**run or {})),
    )
    listing = list_scenes(str(archive), config, access)
    assert source_files(str(archive), config, access) == listing.files
    assert list(listing.scenes) == sorted(listing.scenes, key=lambda scene: scene.id)
    return listing


def ids(listing: Listing) -> list[str]:
    return [scene.id for scene in listing.scenes]


def write(path: Path, bands: int = 2, tags: dict | None = None, **options) -> Path:
    """A small scene; the number of its bands is all that matters of its pixels."""
    save_scene(path, np.resize(PIXELS, (bands, 4, 5)), **options)
    if tags:
        with rasterio.open(path, "r+") as raster:
            raster.update_tags(**tags)
    return path


def write_bands(folder: Path, names: list[str], **options) -> None:
    for name in names:
        write(folder / f"{name}.tif", bands=1, **options)


def test_a_folder_holds_scenes_of_several_bands(tmp_path):
    for name in ("b.tif", "deep/er/a.TIFF", "a.tif", ".hidden/x.tif", ".y.tif", "cube.zarr/z.tif"):
        write(tmp_path / name)
    for name in ("notes.txt", "a.tif.aux.xml", "a.tif.ovr"):
        (tmp_path / name).touch()
    listing = listed(tmp_path)
    assert ids(listing) == ["a", "b", "deep/er/a"]
    assert list(listing.files) == ["a.tif", "b.tif", "deep/er/a.TIFF"]
    assert (listing.refused, listing.skipped, listing.notes) == ({}, {}, ())


def test_the_facts_of_a_scene(tmp_path):
    path = write(tmp_path / "a.tif", nodata=7, tiled=True, blockxsize=16, blockysize=32)
    (scene,) = listed(tmp_path, name="s2", scale=0.1).scenes
    (asset,) = scene.assets
    assert (scene.modality, scene.datetime, scene.place, scene.mask) == ("s2", None, None, None)
    assert (asset.href, asset.kind, asset.dtype) == (str(path), "raster", "uint16")
    assert (asset.block_shape, asset.header_seen) == ((32, 16), True)
    assert asset.grid.in_words().startswith("4 x 5 px, EPSG:32632, origin (500000, 5000000)")
    assert asset.planes == (Plane("band_1", 0, 7), Plane("band_2", 1, 7))
    status = path.stat()
    assert asset.fingerprint == f"{status.st_size}-{status.st_mtime_ns}"


def test_names_say_place_date_label_split_and_baseline(tmp_path):
    write(tmp_path / "train/Forest/T32_20170918_N0400.tif")
    (scene,) = listed(tmp_path, pattern="{split}/{label}/{tile}_{date}_N{baseline}.tif").scenes
    assert (scene.id, scene.place) == ("train/Forest/T32_20170918_N0400", "T32")
    assert (scene.datetime, scene.baseline) == ("2017-09-18T00:00:00Z", "04.00")
    assert (scene.label, scene.split) == ("Forest", "train")


def test_one_file_per_band_on_grids_of_their_own(tmp_path):
    write_bands(tmp_path / "R10m", ["T32_20170918_B02", "T32_20170921_B02", "T33_20170918_B02"])
    coarse = [f"T32_20170918_{band}" for band in ("B05", "SCL", "AOT")]
    write_bands(tmp_path / "R20m", coarse, crs="EPSG:32633")
    write_bands(tmp_path / "R20m", ["T33_20170918_B05", "T33_20170918_SCL"])
    (tmp_path / "R10m/preview.jpg").touch()
    listing = listed(
        tmp_path, pattern=BANDS_PATTERN, bands=["blue", "B05"], assets={"blue": "B02"},
        mask={"band": "SCL", "cloud": [8]},
    )  # fmt: skip
    assert ids(listing) == ["R10m/T32_20170918", "R10m/T33_20170918"]
    assert listing.refused == {"R10m/T32_20170921": "lacks the bands B05, SCL; it has B02"}
    assert list(listing.skipped) == ["R10m/preview.jpg"]
    assert listing.notes == ("some or all files of these bands are not used: AOT",)
    assert len(listing.files) == 9
    first = listing.scenes[0]
    assert [(a.planes[0].band, a.planes[0].key) for a in first.assets] == [("blue", 0), ("B05", 0)]
    assert [a.grid.crs for a in first.assets] == ["EPSG:32632", "EPSG:32633"]
    assert first.mask is not None
    assert first.mask.planes == (Plane("SCL", 0),)
    assert (first.place, first.datetime) == ("T32", "2017-09-18T00:00:00Z")


def test_bands_are_known_by_the_names_that_products_use(tmp_path):
    write_bands(tmp_path / "R10m", ["T32_20170918_B02_10m"])
    write_bands(tmp_path / "R20m", ["T32_20170918_B02_20m", "T32_20170918_B05_20m"])
    listing = listed(tmp_path, pattern=f"R*/{BANDS_PATTERN}", bands=["B05", "B02"])
    hrefs = [Path(asset.href).name for asset in listing.scenes[0].assets]
    assert hrefs == ["T32_20170918_B05_20m.tif", "T32_20170918_B02_10m.tif"]
    assert ids(listing) == ["R20m/T32_20170918"]
    assert listing.notes == ("some or all files of these bands are not used: B02_20m",)


def test_bands_that_nobody_names_are_those_of_all_scenes(tmp_path):
    write_bands(tmp_path / "x", ["B3", "B2"])
    write_bands(tmp_path / "y", ["B3", "B2"])
    listing = listed(tmp_path, pattern="*/{band}.tif")
    assert ids(listing) == ["x", "y"]
    assert [a.planes[0].band for a in listing.scenes[0].assets] == ["B2", "B3"]
    write_bands(tmp_path / "y", ["B4"])
    with pytest.raises(
        ArchiveError, match=r"B2, B3 \(as x/B2.tif\) and B2, B3, B4 .*modality.bands"
    ):
        listed(tmp_path, pattern="*/{band}.tif")
    write_bands(tmp_path / "z", ["2"])
    with pytest.raises(ArchiveError, match="'2' cannot be the name of a band"):
        listed(tmp_path / "z", pattern="{band}.tif")


def test_two_files_of_one_band_are_not_chosen_from(tmp_path):
    write_bands(tmp_path, ["a/T1_2017-09-18_B2", "b/T1_2017-09-18_B2", "b/T2_2017-09-18_B2"])
    listing = listed(tmp_path, pattern=BANDS_PATTERN, bands=["B2"])
    assert ids(listing) == ["b/T2_2017-09-18"]
    (reason,) = listing.refused.values()
    assert reason.startswith("has 2 files of band B2, such as a/T1_2017-09-18_B2.tif and b/T1_")


def test_one_bad_file_refuses_its_scene_and_no_other(tmp_path):
    write_bands(tmp_path, ["T1_201709_B2", "T1_201709_B3", "T2_201709_B2", "T2_201713_B2"])
    write(tmp_path / "T2_201709_B3.tif", bands=3)
    write(tmp_path / "T2_201713_B3.tif", bands=1)
    write(tmp_path / "T3_201709_B2.tif", bands=1)
    (tmp_path / "T3_201709_B3.tif").write_bytes(b"no raster")
    listing = listed(tmp_path, pattern=BANDS_PATTERN, bands=["B2", "B3"])
    assert ids(listing) == ["T1_201709"]
    assert listing.refused["T2_201709"].startswith("its file of band B3: has 3 bands; expected one")
    assert listing.refused["T2_201713"].startswith("its date '201713' cannot be read")
    assert "T3_201709_B3.tif' not recognized" in listing.refused["T3_201709"]


def test_masks_are_files_named_like_the_scenes(tmp_path):
    for name in ("s2/x/a.tif", "s2/x/b.tif", "s2/c.tif", "s2/d.tif"):
        write(tmp_path / name)
    write(tmp_path / "masks/x/a.TIF", bands=1, nodata=255)
    write(tmp_path / "masks/c.tif", bands=2)
    (tmp_path / "masks/d.tif").symlink_to("none.tif")
    listing = listed(tmp_path, source="s2", mask={"source": "masks", "cloud": [1]})
    assert ids(listing) == ["s2/x/a"]
    mask = listing.scenes[0].mask
    assert mask is not None
    assert (mask.href, mask.planes) == (str(tmp_path / "masks/x/a.TIF"), (Plane("mask", 0, 255.0),))
    assert listing.refused == {
        "s2/x/b": "has no mask; expected a file named x/b in modality.mask.source masks",
        "s2/c": "its mask masks/c.tif: has 2 bands; expected one",
        "s2/d": "its mask masks/d.tif: is a broken link",
    }
    assert "masks/x/a.TIF" in listing.files


def test_masks_below_the_scenes_are_no_scenes(tmp_path):
    for name in ("a.tif", "masks/a.tif"):
        write(tmp_path / name, bands=1)
    assert ids(listed(tmp_path, mask={"source": "masks/*.tif", "cloud": [1]})) == ["a"]


def test_a_single_mask_belongs_to_a_single_scene(tmp_path):
    write(tmp_path / "a.tif")
    write(tmp_path / "clouds.tif", bands=1)
    listing = listed(tmp_path, mask={"source": "clouds.tif", "cloud": [1]})
    assert ids(listing) == ["a"]
    assert listing.scenes[0].mask is not None
    write(tmp_path / "b.tif")
    with pytest.raises(ArchiveError, match="names one file, clouds.tif, for 2 scenes"):
        listed(tmp_path, mask={"source": "clouds.tif", "cloud": [1]})


def test_masks_that_differ_in_the_suffix_only_are_refused(tmp_path):
    for name in ("s2/a.tif", "m/a.tif", "m/a.tiff"):
        write(tmp_path / name, bands=1)
    with pytest.raises(ArchiveError, match="remove one, masks belong to scenes by it"):
        listed(tmp_path, source="s2", mask={"source": "m", "cloud": [1]})


def test_dates_from_a_tag(tmp_path):
    write(tmp_path / "a.tif", tags={"datetime": "2020-04-08T14:37:29.000000000"})
    write(tmp_path / "b.tif", tags={"acquired": "x"})
    write(tmp_path / "c.tif", tags={"datetime": "last week"})
    listing = listed(tmp_path, dates={"tag": "datetime"})
    assert [(s.id, s.datetime) for s in listing.scenes] == [("a", "2020-04-08T14:37:29Z")]
    assert listing.refused["b"] == (
        "has no tag datetime, which modality.dates.tag names; it has AREA_OR_POINT, acquired"
    )
    assert listing.refused["c"].startswith("its date 'last week' cannot be read")


def test_dates_of_a_scenes_files_have_to_agree(tmp_path):
    for name, day in (("x/B2", "1"), ("x/B3", "1"), ("y/B2", "1"), ("y/B3", "2")):
        write(tmp_path / f"{name}.tif", bands=1, tags={"day": f"2020-01-0{day}"})
    listing = listed(tmp_path, pattern="*/{band}.tif", dates={"tag": "day"})
    assert [(s.id, s.datetime) for s in listing.scenes] == [("x", "2020-01-01T00:00:00Z")]
    assert listing.refused["y"].startswith("its files state different dates in tag day: 2020-01-01")


def test_dates_from_a_table(tmp_path):
    for name in ("s2/a.tif", "s2/b.tif", "s2/c.tif"):
        write(tmp_path / name)
    (tmp_path / "dates.csv").write_text("scene,datetime\ns2/a.tif,18.09.2017\ns2/b,2017\n")
    listing = listed(tmp_path, source="s2", dates={"csv": "dates.csv", "format": "%d.%m.%Y"})
    assert [(s.id, s.datetime) for s in listing.scenes] == [("s2/a", "2017-09-18T00:00:00Z")]
    assert listing.refused["s2/c"] == "is not in modality.dates.csv dates.csv; add a line for it"
    assert "expected %d.%m.%Y" in listing.refused["s2/b"]
    assert "dates.csv" in listing.files


def test_without_a_pattern_no_date_is_taken_from_a_name(tmp_path):
    write(tmp_path / "20170918.tif")
    assert listed(tmp_path).scenes[0].datetime is None


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        ({"pattern": "{date}.tif", "dates": {"tag": "day"}}, "no effect beside {date}"),
        ({"dates": {"format": "%Y"}}, "dates.format has no effect without"),
        ({"dates": {"tag": "day", "format": "%d"}}, "expected %Y or %y"),
        ({"pattern": "{tiel}.tif"}, "{tiel} is not known"),
        ({"bands": ["a", "m"], "mask": {"band": "m", "cloud": [1]}}, "mask.band m is one of"),
        ({"bands": ["a"], "assets": {"b": "2"}}, "expected bands of modality.bands"),
        ({"assets": {"a": "2", "b": "2"}}, "each with a text of its own"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path, modality, message):
    write(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path, **modality)


def test_images_without_georeference(tmp_path):
    image = {"width": 9, "height": 8, "count": 3, "dtype": "uint8"}
    for name in ("a.jpg", "b.png"):
        with (
            pytest.warns(NotGeoreferencedWarning),
            rasterio.open(tmp_path / name, "w", driver=DRIVERS[name[1:]], **image) as raster,
        ):
            raster.write(np.zeros((3, 8, 9), np.uint8))
    listing = listed(tmp_path)
    assert ids(listing) == ["a", "b"]
    assert [(s.assets[0].grid.crs, len(s.assets[0].planes)) for s in listing.scenes] == [
        (None, 3)
    ] * 2


def test_jpeg_2000_is_opened_on_request_only(tmp_path):
    with rasterio.open(
        tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", count=1, height=64, width=64, dtype="uint8",
        crs="EPSG:32632", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as raster:  # fmt: skip
        raster.write(np.zeros((1, 64, 64), np.uint8))
    listing = listed(tmp_path)
    assert listing.refused["a"].endswith("set run.jpeg2000 to read it anyway")
    assert not listing.notes
    listing = listed(tmp_path, run={"jpeg2000": True})
    assert ids(listing) == ["a"]
    assert "about 13 MB/s per core, against about 330 MB/s for DEFLATE" in listing.notes[0]


def test_complex_pixels_and_links_out_are_refused(tmp_path):
    write(tmp_path / "outside.tif")
    write(tmp_path / "elsewhere/a.tif")
    archive = tmp_path / "archive"
    save_scene(archive / "complex.tif", PIXELS.astype("complex64"))
    (archive / "link.tif").symlink_to(tmp_path / "outside.tif")
    (archive / "gone.tif").symlink_to(archive / "none.tif")
    (archive / "round.tif").symlink_to("round.tif")
    (archive / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(archive / "pipe.tif")
    listing = listed(archive)
    assert not listing.scenes
    reasons = {scene: reason.split(";")[0] for scene, reason in listing.refused.items()}
    assert reasons.pop("link").startswith(f"points to {tmp_path}/outside.tif, outside {archive}")
    assert reasons.pop("folder/").startswith(f"points to {tmp_path}/elsewhere, outside")
    assert reasons.pop("round").startswith(("cannot be looked at", "is a broken link"))
    assert reasons == {
        "complex": "its pixels are complex64",
        "gone": "is a broken link",
        "pipe": "is no regular file",
    }
    found = listed(archive, run={"allow": [str(tmp_path)]})
    assert ids(found) == ["folder/a", "link"]


def test_links_in_circles_have_an_end(tmp_path):
    write(tmp_path / "a/x.tif")
    for link, target in (("a/up", ".."), ("b", "a"), ("a/self", ".")):
        (tmp_path / link).symlink_to(target)
    listing = listed(tmp_path)
    assert ids(listing) == ["a/x"]
    assert len(listing.notes) == 3
    assert f"b is a link to {tmp_path / 'a'}, where scenes are looked for anyway" in listing.notes


@pytest.mark.parametrize(
    "name", ["new\nline", "\x1b[2J", "\u2028", b"\xff".decode("utf-8", "surrogateescape")]
)
def test_hostile_names_are_refused_in_printable_words(tmp_path, name):
    write(tmp_path / "good.tif")
    os.replace(write(tmp_path / "bad.tif"), os.fsencode(tmp_path / f"{name}.tif"))  # noqa: PTH105
    listing = listed(tmp_path)
    assert ids(listing) == ["good"]
    ((scene, reason),) = listing.refused.items()
    assert "rename it" in reason
    text = " ".join((scene, *listing.files))
    assert text.isprintable()
    assert len(listing.files) == 2


@pytest.mark.parametrize(
    "name", ["Zürich 東京", "x" * 240, "a.b.c", "100%", "a'b\"c", "{tile}", "a:b"]
)
def test_unusual_names_are_names(tmp_path, name):
    write(tmp_path / f"{name}.tif")
    assert ids(listed(tmp_path)) == [name]


def test_scenes_that_differ_in_the_suffix_only_are_refused(tmp_path):
    write(tmp_path / "a.tif")
    write(tmp_path / "a.tiff")
    with pytest.raises(
        ArchiveError, match=r"a.tif and .*a.tiff have the same name but for the suffix"
    ):
        listed(tmp_path)
    listing = listed(tmp_path, pattern="*.tiff")
    assert (ids(listing), list(listing.skipped)) == (["a"], ["a.tif"])
    assert listing.skipped["a.tif"] == "is not named like modality.pattern *.tiff"


KINDS = {
    "good": lambda path: write(path, bands=3),
    "other bands": lambda path: write(path, bands=2),
    "broken": lambda path: path.write_bytes(b"II*\0 and no more"),
    "empty": lambda path: path.write_bytes(b""),
    "link out": lambda path: path.symlink_to("/etc/hostname"),
}
names = st.tuples(
    st.sampled_from("ab"),
    st.sampled_from(["2017-09-18", "2017-13", "x"]),
    st.sampled_from(["tif", "txt"]),
)
entries = st.dictionaries(names, st.sampled_from(sorted(KINDS)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(entries)
def test_every_file_is_a_scene_refused_or_skipped_and_never_two_of_them(tmp_path_factory, entries):
    archive = tmp_path_factory.mktemp("archive")
    for (tile, date, suffix), kind in entries.items():
        (archive / tile).mkdir(exist_ok=True)
        KINDS[kind](archive / tile / f"{date}.{suffix}")
    rasters = {key: kind for key, kind in entries.items() if key[2] == "tif"}
    matching = {key for key in rasters if key[1] != "x"}
    good = {key for key in matching if rasters[key] == "good" and key[1] == "2017-09-18"}
    if not matching:
        with pytest.raises(ArchiveError, match="no scene found|is named like modality.pattern"):
            listed(archive, pattern="{tile}/{date}.tif", bands=["r", "g", "b"])
        return
    listing = listed(archive, pattern="{tile}/{date}.tif", bands=["r", "g", "b"])
    assert set(ids(listing)) == {f"{tile}/{date}" for tile, date, _ in good}
    assert set(listing.refused) == {f"{tile}/{date}" for tile, date, _ in matching - good}
    assert set(listing.skipped) == {f"{t}/{d}.tif" for t, d, _ in set(rasters) - matching}
    assert set(listing.files) == {f"{tile}/{date}.tif" for tile, date, _ in rasters}
