"""Damaged TIFFs through a whole job: what raises is quarantined, what a checksum knows is detected."""

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning

from pipeline.errors import ArchiveError, SceneError
from pipeline.jobs.job import JobReport, run_job
from pipeline.planning.bands import conform
from pipeline.planning.inputs import plan_job
from pipeline.readers.assets import open_asset
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from stac_catalogues import item_of
from support import Watching, header, save_scene, textured

pytestmark = pytest.mark.usefixtures("kept_workers")

SIDE = 96
LAYOUTS = {
    "raw": {},
    "lzw": {"compress": "lzw", "predictor": 2},
    "deflate": {},
    "zstd": {"compress": "zstd", "tiled": True, "blockxsize": 32, "blockysize": 32},
}


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, a range zeroed, the end cut off, or a range put twice."""
    damaged = bytearray(content)
    start = int(rng.integers(len(content)))
    length = int(rng.integers(1, 200))
    match rng.integers(4):
        case 0:
            for at in rng.integers(len(content), size=int(rng.integers(1, 20))):
                damaged[at] ^= int(rng.integers(1, 256))
        case 1:
            damaged[start : start + length] = bytes(len(damaged[start : start + length]))
        case 2:
            del damaged[start:]
        case 3:
            damaged[start:start] = damaged[start : start + length]
    return bytes(damaged)


def outcome_of(path: Path, original: np.ndarray) -> str:
    """What GDAL alone makes of a damaged file: raises, harmless or silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, driver="GTiff") as raster:
                pixels = raster.read()
    except (rasterio.errors.RasterioError, CPLE_BaseError):
        return "raises"
    return "harmless" if np.array_equal(pixels, original) else "silent"


def originals(folder: Path) -> dict[str, tuple[bytes, np.ndarray]]:
    """Per layout the bytes of a good file, and its pixels."""
    pixels, found = textured((2, SIDE, SIDE)), {}
    for name, options in LAYOUTS.items():
        path = save_scene(folder / f"{name}.tif", pixels, **options)
        if name == "deflate":
            plain = path.rename(folder / "plain.tif")
            rasterio.shutil.copy(plain, path, driver="COG", compress="deflate", blocksize=128)
        found[name] = path.read_bytes(), pixels
    return found


def write_mutations(folder: Path, count: int) -> dict[str, str]:
    """Damaged files `<layout>_<number>.tif`, `count` of each layout; what GDAL makes of each, by name."""
    found = {}
    for layout, (content, pixels) in originals(folder.parent / "good").items():
        rng = np.random.default_rng(len(layout))
        for number in range(count):
            name = f"{layout}_{number:03}"
            damaged = content
            while damaged == content:
                damaged = mutate(content, rng)
            path = folder / f"{name}.tif"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged)
            found[name] = outcome_of(path, pixels)
    return found


def config(*overrides: str) -> PreprocessConfig:
    base = ["modality.bands=[B02, B03]", "modality.value_range=[0, 10000]", "run.workers=2"]
    return load_config(PreprocessConfig, None, [*base, f"store.tile_size_px={SIDE}", *overrides])


def stated(name: str, content: bytes) -> dict:
    """An item that states grid, type and checksum of a good file."""
    item = item_of(name, bands=("B02",))
    asset = item["assets"].pop("B02")
    item["assets"] = {"data": {
        **asset, "href": f"{name}.tif", "proj:shape": [SIDE, SIDE],
        "file:checksum": "1220" + hashlib.sha256(content).hexdigest(),
        "eo:bands": [{"name": band} for band in ("B02", "B03")],
        "raster:bands": [{"data_type": "uint16"}] * 2,
    }}  # fmt: skip
    return item


def check_report(report: JobReport, found: dict[str, str]) -> None:
    """The job finished; its numbers add up; what raises is quarantined with a reason of one line."""
    assert report.inputs == len(found) + 1
    assert report.inputs == report.done + len(report.quarantined) + len(report.skipped)
    raising = {name for name, outcome in found.items() if outcome == "raises"}
    assert raising <= set(report.quarantined)
    assert all(why and why.isprintable() for why in report.quarantined.values())
    assert "good" not in report.quarantined


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.full)])
def test_damaged_files_are_quarantined_and_the_rest_is_done(tmp_path, count):
    archive = tmp_path / "archive"
    found = write_mutations(archive, count)
    save_scene(archive / "good.tif", textured((2, SIDE, SIDE)))
    report = run_job(str(archive), tmp_path / "store", config(), Watching())
    check_report(report, found)
    counts = Counter(found.values())
    left = sum(found[name] != "raises" for name in report.quarantined)
    print(
        f"\n{len(found)} damaged files without checksum: {counts['raises']} raise and are quarantined, "
        f"{counts['harmless']} are harmless, {counts['silent']} read other pixels, {left} of these "
        "quarantined as contradictions"
    )


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.full)])
def test_a_known_checksum_detects_every_damaged_file(tmp_path, count):
    archive = tmp_path / "archive"
    found = write_mutations(archive, count)
    good = originals(tmp_path / "good")
    save_scene(archive / "good.tif", textured((2, SIDE, SIDE)))
    items = [stated(name, good[name.split("_")[0]][0]) for name in found]
    items.append(stated("good", (archive / "good.tif").read_bytes()))
    for number, item in enumerate(items):
        day, hour = divmod(number, 24)
        item["properties"]["datetime"] = f"{2000 + day // 28}-01-{1 + day % 28:02}T{hour:02}:00:00Z"
    catalogue = archive / "items.json"
    catalogue.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    settings = config()
    report = run_job(str(catalogue), tmp_path / "store", settings, Watching())
    check_report(report, found)
    assert set(report.quarantined) == set(found)
    silent = sum(outcome == "silent" for outcome in found.values())
    print(f"\n{len(found)} damaged files with checksum: {len(report.quarantined)} detected, of which "
          f"{silent} would have read other pixels")  # fmt: skip


def test_a_list_of_checksums_detects_every_damaged_file(tmp_path):
    archive = tmp_path / "archive"
    found = write_mutations(archive, 10)
    good = {name: content for name, (content, _) in originals(tmp_path / "good").items()}
    save_scene(archive / "good.tif", textured((2, SIDE, SIDE)))
    files = {f"{name}.tif": good[name.split("_")[0]] for name in found}
    files["good.tif"] = (archive / "good.tif").read_bytes()
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in files.items()]
    (archive / "SHA256SUMS").write_text("\n".join(lines))
    settings = config("run.checksums=SHA256SUMS")
    report = run_job(str(archive), tmp_path / "store", settings, Watching())
    check_report(report, found)
    assert set(report.quarantined) == set(found)
    (archive / "SHA256SUMS").write_text(lines[-1].replace("  ", " *./"))
    with pytest.raises(ArchiveError, match="SHA256SUMS was changed"):
        run_job(str(archive), tmp_path / "store", settings, Watching())
    refused = plan_job(str(archive), settings).refused
    assert "is not in" in refused["raw_000"]
    print(f"\n{len(found)} damaged files with SHA256SUMS: {len(report.quarantined)} detected")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"abc  a.tif", "line 1: 'abc  a.tif' is no checksum"),
        (b"\xff", "cannot be read: not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_lists_of_checksums_that_are_none(tmp_path, content, told):
    save_scene(tmp_path / "archive/a.tif", textured((2, SIDE, SIDE)))
    if content is not None:
        (tmp_path / "archive/SUMS").write_bytes(content)
    with pytest.raises(ArchiveError, match=told):
        plan_job(str(tmp_path / "archive"), config("run.checksums=SUMS"))
    with pytest.raises(ArchiveError, match=r"run.checksums ../SUMS points to .* outside"):
        plan_job(str(tmp_path / "archive"), config("run.checksums=../SUMS"))


def test_a_file_that_changes_after_planning_is_noticed(tmp_path):
    """Whatever the change: size and time tell, where bytes do not."""
    noticed, changes = 0, 0
    pixels = textured((2, SIDE, SIDE))
    for options in LAYOUTS.values():
        path = save_scene(tmp_path / "archive/a.tif", pixels, **options)
        content = path.read_bytes()
        job = plan_job(str(tmp_path / "archive"), config())
        (scene,) = job.plan.lead.scenes
        rng = np.random.default_rng(0)
        for _ in range(25):
            path.write_bytes(mutate(content, rng))
            changes += 1
            with pytest.raises(SceneError, match="was changed since the job was planned"):  # noqa: SIM117
                with open_asset(scene.assets[0], job.access):
                    noticed += 1
            noticed += 1
    assert noticed == changes == 100
    print(f"\n{changes} changes between planning and reading: {noticed} noticed by size and time")


def test_one_stray_among_very_many_is_refused_and_a_mixture_stops_the_job():
    settings = config("modality.bands=[band_1]").data().all_modalities()[0]
    strays = [header(f"stray_{number}", dtype="uint8") for number in range(2)]
    many = [header(f"s_{number:03}") for number in range(99)]
    accepted, refused = conform(settings, [*many, strays[0]])
    assert accepted == many
    assert "has the pixel type uint8; nearly all" in refused["stray_0"]
    with pytest.raises(ArchiveError, match="differ in their pixel type"):
        conform(settings, [*many, *strays])


def test_a_file_that_lost_the_list_of_its_blocks_is_not_read_as_zeros(tmp_path):
    path = save_scene(tmp_path / "archive" / "lost.tif", textured((2, SIDE, SIDE)))
    save_scene(tmp_path / "archive" / "good.tif", textured((2, SIDE, SIDE)))
    content = bytearray(path.read_bytes())
    # Tag StripByteCounts, of 16-bit numbers that lie elsewhere: its last byte is the offset's highest.
    tag = content.index(b"\x17\x01\x03\x00")
    content[tag + 11] = 0x9D
    path.write_bytes(content)
    report = run_job(str(path.parent), tmp_path / "store", config(), Watching())
    assert "TIFF tag 279" in report.quarantined.pop("lost")
    assert not report.quarantined
