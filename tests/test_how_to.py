"""The how-to pages hold what the code does: every command, output, table and number, and every pixel.

The commands of a page run once, in order, as they stand there. Pixels in the store are compared with what
rasterio or xarray reads from the file that the manifest names.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy import ndimage

from how_to import FILES, HOW_TO, L2A, NEWER, OLDER, PAGES, Page, cube, read
from pipeline import Store, open_store
from support import aptile, save_scene


@pytest.fixture(scope="module")
def pages(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Page]:
    """A page by its name; its commands run when their results are first asked for."""
    return cache(lambda name: Page(name, real_data, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest, pages: Callable[[str], Page]) -> Page:
    return pages(request.param)


def test_every_configuration_is_printed_as_it_is():
    assert sorted(FILES) == PAGES == sorted(file.stem for file in HOW_TO.glob("*.yaml"))
    for name in PAGES:
        printed = re.findall(
            r"^```yaml\n(.*?)^```", (HOW_TO / f"{name}.md").read_text(), re.M | re.S
        )
        assert printed == [(HOW_TO / f"{name}.yaml").read_text()], name


def test_the_index_has_every_page_and_pages_every_picture():
    index = (HOW_TO / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[[^]]+\]\((.+)\.md\)", index, re.MULTILINE)) == PAGES
    shown = [
        p
        for n in PAGES
        for p in re.findall(r"\(pictures/(.+?)\)", (HOW_TO / f"{n}.md").read_text())
    ]
    pictures = list((HOW_TO / "pictures").iterdir())
    assert sorted(shown) == sorted(picture.name for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) < 1_500_000


def test_commands_come_out_as_the_page_says(page: Page):
    printed = re.findall(r"^```bash\n.*?^```\n(?:```text\n(.*?)^```)?", page.text, re.M | re.S)
    for expected, commands in zip(printed, page.done, strict=True):
        for done in commands:
            assert done.code == done.expected_code, (done.words, done.err)
        assert [line for done in commands for line in done.err] == expected.splitlines()


def test_pictures_are_drawn(page: Page):
    drawn = [d.words[-1] for commands in page.done for d in commands if "--png" in d.words]
    assert re.findall(r"\(pictures/(.+?)\)", page.text) == drawn
    for name in drawn:
        assert (page.folder / name).stat().st_size > 10_000


def test_token_tables_hold_what_the_store_has(page: Page):
    inspected = [done for commands in page.done for done in commands if done.inspected]
    for table, done in zip(page.tables("modality"), inspected, strict=True):
        store = page.store(done.inspected)
        assert table == token_rows(store)
        for row in table:
            assert f"tokens           {row['tokens']} of {row['base grid']} on " in done.out


def token_rows(store: Store) -> list[dict[str, str]]:
    """The numbers of every modality with tokens, from header and manifest."""
    rows = []
    for name, header in store.header["modalities"].items():
        if header["kind"] == "label":
            continue
        entries = store.manifest[name].to_pylist()
        tokens = np.array([entry["tokens"] for entry in entries])
        base_cells = sum(entry["base_cells"] for entry in entries)
        frames = [frame for entry in entries for frame in entry["frames"]]
        sizes = [header["base_patch_size"] * 2**scale for scale in range(header["num_scales"])]
        shares = {
            column: np.mean([v for e in entries for v in e[f"{key}_fraction"] if v is not None])
            for column, key in (("valid", "valid"), ("cloud", "cloud"), ("no data", "nodata"))
        }
        spread = tokens.sum(axis=1)
        rows.append(
            {
                "modality": name,
                "tiles": str(len(entries)),
                "frames": str(len(frames) - frames.count(None)),
                "missing": str(frames.count(None)),
                **{column: f"{share:.1%}" for column, share in shares.items()},
                "tokens": str(tokens.sum()),
                "base grid": str(base_cells),
                "kept": f"{tokens.sum() / base_cells:.1%}",
                "per tile": f"{spread.min()} / {np.median(spread):.0f} / {spread.max()}",
                **{f"{s} px": str(n) for s, n in zip(sizes, tokens.sum(axis=0), strict=True)},
            }
        )
    return rows


def test_pixels_equal_those_of_the_files(page: Page):
    store, files = page.store(), cache(FILES[page.name])
    compared = 0
    for index, row in enumerate(store.manifest.to_pylist()):
        for modality, header in store.header["modalities"].items():
            tile, scenes = store.tile_at(index, modality), row[modality]["scene_ids"]
            for frame, timestep in enumerate(tile.timesteps.tolist()):
                planes = files(page.archive, modality, scenes[timestep])
                for band_set in header["band_sets"]:
                    name, side = band_set["name"], band_set["tile_size_px"]
                    pixels, valid = tile.further[name] if name else (tile.pixels, tile.valid)
                    corner = row["row"] * side, row["col"] * side
                    assert_window(pixels[frame], valid[frame], *planes[name], corner)
                    compared += 1
    sets = sum(
        len(store.header["modalities"][name]["band_sets"])
        * sum(f is not None for e in store.manifest[name].to_pylist() for f in e["frames"])
        for name in store.modalities
    )
    assert compared == sets > 0


def assert_window(pixels, valid, whole, whole_valid, corner) -> None:
    """Numbers and validity of a tile are those of its part of the scene; beyond it nothing is valid."""
    assert pixels.dtype == whole.dtype
    side = valid.shape[0]
    part = tuple(slice(start, start + side) for start in corner)
    expected = np.zeros_like(valid)
    inside = tuple(slice(0, n) for n in whole_valid[part].shape)
    expected[inside] = whole_valid[part]
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_array_equal(pixels[:, valid], whole[:, *part][:, expected[inside]])


@pytest.mark.parametrize(
    ("name", "setting", "code", "line"),
    [
        ("s2cloudless", "modality.mask=null", 0, "refused cl_mask: has 1 band "),
        ("s2cloudless", "splits={shares: {a: 0.5, b: 0.5}, block_km: 5}", 2, "has no CRS"),
        ("ravaen", "modality.pattern=null", 0, "10 places, 185 tiles"),
        ("terramind", "modalities.s1_rtc.dates={tag: datetime}", 0, "1_3: 224 x 224 px"),
        ("eurosat", "splits={by: blocks, block_km: 5}", 2, "has no CRS"),
    ],
)
def test_other_settings_end_as_the_pages_say(pages, capsys, name, setting, code, line):
    page = pages(name)
    assert page.done
    command = "preprocess", page.folder / "archive", page.folder / "unused"
    config = HOW_TO / f"{name}.yaml"
    assert aptile(*command, "--config", config, "--set", setting, "--dry-run") == code
    assert line in capsys.readouterr().err


def test_offsets_in_the_files_own_headers_do_what_a_catalogue_does(pages, tmp_path):
    archive = pages("satclip").archive
    for name in (*NEWER, *OLDER):
        with rasterio.open(archive / f"{name}.tif") as given:
            save_scene(
                tmp_path / "archive" / f"{name}.tif",
                given.read(),
                crs=given.crs,
                transform=given.transform,
            )
        if name in NEWER:
            with rasterio.open(tmp_path / "archive" / f"{name}.tif", "r+") as stated:
                stated.scales, stated.offsets = (1e-4,) * 12, (-0.1,) * 12
    command = "preprocess", tmp_path / "archive", tmp_path / "store"
    assert aptile(*command, "--config", HOW_TO / "satclip.yaml", "--workers", 1) == 0
    stated, listed = open_store(tmp_path / "store"), pages("stac").store()
    for row in range(len(listed.manifest)):
        pair = [store.tile_at(row, "s2_l2a").pixels for store in (stated, listed)]
        np.testing.assert_array_equal(*pair)


def test_classes_have_the_counts_of_the_page(pages: Callable[[str], Page]):
    page = pages("eurosat")
    assert page.tables("class") == [class_rows(page.store())]


def class_rows(store: Store) -> list[dict[str, str]]:
    """Tokens per tile by class, the quietest first."""
    by_class: dict[str, list[int]] = {}
    for row in store.manifest.to_pylist():
        assert row["place"].startswith(f"{row['label']}/")
        by_class.setdefault(row["label"], []).append(sum(row["rgb"]["tokens"]))
    return [
        {
            "class": name,
            "tiles": str(len(counts)),
            "mean": f"{np.mean(counts):.0f}",
            "smallest": str(min(counts)),
            "largest": str(max(counts)),
        }
        for name, counts in sorted(by_class.items(), key=lambda item: np.mean(item[1]))
    ]


def test_dates_miss_the_frames_of_the_page(pages: Callable[[str], Page]):
    page = pages("ravaen")
    assert page.tables("place") == [date_rows(page)]
    found: dict[tuple[str, str], list[str | None]] = {}
    for row in page.store().manifest.to_pylist():
        for when, missing in zip(row["datetimes"], row["s2_l1c"]["missing"], strict=True):
            found.setdefault((row["place"], f"{when:%Y-%m-%d}"), []).append(missing)
    for row in date_rows(page):
        reasons = found.pop((row["place"], row["date"]))
        assert reasons.count(None) == int(row["frames"])
        assert reasons.count("too few valid pixels") == int(row["missing"])
    assert not found


def date_rows(page: Page) -> list[dict[str, str]]:
    """Frames per date with enough valid pixels, counted in the files."""
    side = page.config["store"]["tile_size_px"]
    least = page.config["validity"]["min_frame_valid_fraction"]
    rows = []
    for file in sorted(page.archive.glob("*/*.tif")):
        scene = f"{file.parent.name}/{file.stem}"
        valid = FILES["ravaen"](page.archive, "s2_l1c", scene)[""][1]
        height, width = (-(-n // side) for n in valid.shape)
        padded = np.zeros((height * side, width * side), np.bool_)
        padded[: valid.shape[0], : valid.shape[1]] = valid
        shares = padded.reshape(height, side, width, side).mean(axis=(1, 3))
        kept = int((shares >= least).sum())
        rows.append(
            {
                "place": file.parent.name,
                "date": file.stem,
                "tiles": str(shares.size),
                "frames": str(kept),
                "missing": str(shares.size - kept),
            }
        )
    return rows


def test_numbers_in_the_text_are_those_of_the_data(page: Page):
    for phrase in CLAIMS[page.name](page):
        assert phrase in page.words


def of_the_chips(page: Page) -> Iterator[str]:
    fields, ridges = (read(page.archive / f"{name}.tif") for name in ("patch_57755", "patch_445"))
    yield f"no number of `patch_57755` is below {fields.min()}"
    low = np.percentile(ridges, 1, axis=(1, 2))
    yield f"(1st percentile) of every band lie between {low.min():.0f} and {low.max():.0f}"
    zeros = (ridges == 0).sum(axis=(1, 2))
    yield f"Band {L2A[zeros.argmax()]} of `patch_445` is 0 at {zeros.sum()} pixels"
    yield f"{tokens_of(page, 'patch_57755/r1c0')} tokens"


def of_the_modalities(page: Page) -> Iterator[str]:
    places = "433D_629L_3_1", "637U_59R_1_3"
    cirrus = [read(page.archive / "S2L1C" / f"{place}.tif")[10] for place in places]
    there, other = (f"{band.min()} to {band.max()}" for band in cirrus)
    yield f"{there} there, {other} in the other place"
    radar = np.stack([read(page.archive / "S1RTC" / f"{place}.tif") for place in places], axis=1)
    vv, vh = np.percentile(radar.reshape(2, -1), (1, 99), axis=1).T
    yield f"VV {vv[0]:.1f} to {vv[1]:.1f}, VH {vh[0]:.1f} to {vh[1]:.1f}"
    assert (np.median(radar[0], axis=(1, 2)) > np.median(radar[1], axis=(1, 2))).all()
    ((low, high),) = page.store().header["modalities"]["dem"]["value_range"]
    yield f"{low:.0f} to {high:.0f} m"


def of_the_masked_scene(page: Page) -> Iterator[str]:
    pixels = read(page.archive / "s2_l1c_betsiboka_uint16.tif")
    zeros = np.flatnonzero((pixels == 0).any(axis=(1, 2)))
    names = " or ".join(
        page.store().header["modalities"]["s2_l1c"]["band_sets"][0]["bands"][b] for b in zeros
    )
    yield f"{(pixels == 0).any(axis=0).sum()} pixels hold a 0 in {names}"
    yield f"reaches {-pixels.shape[1] % 128} px beyond the scene"
    yield f"the {page.tables('modality')[0][0]['no data'].replace('%', ' %')} without data"
    assert page.store().manifest["geometry"].null_count == len(page.store().manifest)


def of_the_series(page: Page) -> Iterator[str]:
    larger, smaller = (
        read(page.archive / place / "2017-09-21.tif") for place in ("LAHINCH", "WATERVILLE")
    )
    edges = [np.isnan(bands).all(axis=0).sum() for bands in (larger, smaller)]
    yield f"{edges[0]} of the larger place's pixels and {edges[1]} of the smaller one's are NaN in all"
    there = np.isfinite(larger[0])
    assert not larger[13][there].any()
    yield f"{(larger[14][there] > 60).mean():.0%} have".replace("%", " %")


def of_the_cube(page: Page) -> Iterator[str]:
    dataset, row = cube(page.archive), page.store().manifest.to_pylist()[0]
    missing = [
        w for w, f in zip(row["datetimes"], row["s2_l2a"]["frames"], strict=True) if f is None
    ]
    yield f"In {' and '.join(f'{when:%B %Y}' for when in missing)} there is no Sentinel-2"
    assert not any("_FillValue" in v.attrs or "_FillValue" in v.encoding for v in dataset.values())
    clipped = np.any([v.values == 0 for k, v in dataset.items() if str(k).startswith("S2")], axis=0)
    yield f"to 0 ({clipped.sum()} pixels)"
    for name in ("elevation", "slope"):
        assert (dataset[name].values == dataset[name].values[0]).all()
    for name in ("AGERA5-PRECIP", "AGERA5-TMEAN"):
        assert (dataset[name].values == dataset[name].values[:, :1, :1]).all()
    for name in ("S1-SIGMA0-VV", "S1-SIGMA0-VH"):
        fours = dataset[name].values.reshape(12, 50, 2, 50, 2)
        assert (fours == fours[:, :, :1, :, :1]).all()
    tile = page.store().tile_at(0, "s2_l2a")
    leaves = tile.scales[tile.timesteps.tolist().index(8)]
    yield f"{np.count_nonzero(leaves < 128)} of 400 tokens"


def of_the_bordered_scene(page: Page) -> Iterator[str]:
    pixels = read(page.archive / "cog.tif")[0]
    assert pixels.all()
    assert ndimage.label(pixels == 1)[1] == 1
    yield f"{(pixels == 1).mean():.0%} are 1, in one piece".replace("%", " %")
    yield f"has {len(np.unique(pixels)) - 1} different numbers besides the border"
    store = page.store()
    low, high = store.header["modalities"]["cog"]["value_range"][0]
    yield f"{low:.0f} to {high:.0f}, the 1st to 99th percentile"
    left_out = store.commit.summary["tiles_left_out"]
    yield f"Of {len(store.manifest) + left_out} tiles {left_out} have less than 5 % left"
    yield f"{store.manifest['split'].null_count} of {len(store.manifest)} touch blocks of two splits"
    yield f"{tokens_of(page, 'cog/r8c7')} tokens"


def of_the_photographs(page: Page) -> Iterator[str]:
    yield f"{tokens_of(page, 'River/River_1553/r0c0')} tokens"
    splits = page.store().commit.summary["splits"]
    assert splits["test"] == splits["val"]
    yield f"{splits['val']} tiles are a tenth"
    out = io.StringIO()
    with redirect_stdout(out):
        assert aptile("inspect", page.folder / "store", "--curve", "--json") == 0
    (half,) = [step for step in json.loads(out.getvalue())["curve"] if step["quantile"] == 0.5]
    assert page.config["partition"]["thresholds"] == [round(t, 2) for t in half["thresholds"]]


def of_the_catalogue(page: Page) -> Iterator[str]:
    header = page.store().header["modalities"]["s2_l2a"]
    yield f"the store takes their offset, {header['offset']:g}, adds 1000"
    yield f"the value range becomes {header['value_range'][0][0]:.0f} to {header['value_range'][0][1]:.0f}"


def of_the_band_files(page: Page) -> Iterator[str]:
    sets = page.store().header["modalities"]["s2_l2a"]["band_sets"]
    assert [(s["name"], s["tile_size_px"]) for s in sets] == [("", 180), ("20m", 90), ("60m", 30)]
    yield f"{10980 // 180} x {10980 // 180} of them without padding"


def tokens_of(page: Page, tile: str) -> str:
    """`268 of 1024`: what the page's own command prints of a tile."""
    (done,) = [
        d for commands in page.done for d in commands if d.words[1:4] == ("inspect", "store", tile)
    ]
    return re.search(r"tokens +(\d+ of \d+)", done.out)[1]


CLAIMS: dict[str, Callable[[Page], Iterator[str]]] = {
    "satclip": of_the_chips,
    "terramind": of_the_modalities,
    "s2cloudless": of_the_masked_scene,
    "ravaen": of_the_series,
    "worldcereal": of_the_cube,
    "cog": of_the_bordered_scene,
    "eurosat": of_the_photographs,
    "stac": of_the_catalogue,
    "s2-native": of_the_band_files,
}
