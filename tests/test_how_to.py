"""The how-to pages hold what the code does: every command, output, table and number, and every pixel.

The commands of a page run once, in order, as they stand there. Pixels in the store are compared with what
rasterio or xarray reads from the file that the manifest names.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from how_to import FILES, HOW_TO, PAGES, Page
from pipeline import Store

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
        printed = re.findall(r"^```yaml\n(.*?)^```", (HOW_TO / f"{name}.md").read_text(), re.M | re.S)
        assert printed == [(HOW_TO / f"{name}.yaml").read_text()], name


def test_the_index_has_every_page_and_pages_every_picture():
    index = (HOW_TO / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[[^]]+\]\((.+)\.md\)", index, re.MULTILINE)) == PAGES
    shown = [p for n in PAGES for p in re.findall(r"\(pictures/(.+?)\)", (HOW_TO / f"{n}.md").read_text())]
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
