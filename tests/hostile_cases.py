"""Archives made to lead elsewhere or to run something: links, addresses, sidecars, tags, pickles.

Each case writes an archive into a folder and returns what is preprocessed, with settings. What it is
after lies in `outside`: rasters and tables full of a number and a word that occur nowhere else.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cost import CANARY
from cubes import save_array
from stac_catalogues import item_of
from support import save_scene

WORD = "CANARY-7f3a"
DEAD = "http://127.0.0.1:9"  # nobody listens at port 9
SIDE = 64
Case = Callable[[Path, Path], tuple[str, list[str]]]


class Bomb:
    """Unpickling this leaves a folder behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def secrets(outside: Path) -> Path:
    """What nobody may see."""
    secret = np.full((1, SIDE, SIDE), CANARY, np.uint16)
    outside.mkdir(parents=True)
    save_scene(outside / "secret.tif", secret)
    save_scene(outside / "folder/a.tif", secret)
    save_array(outside / "secret.zarr", secret[0], ("y", "x"), chunks=(SIDE, SIDE))
    with h5py.File(outside / "secret.nc", "w") as file:
        file["image"] = secret[0]
    (outside / "secret.raw").write_bytes(secret.tobytes())
    (outside / "secret.csv").write_text(f"scene,datetime,label,split\na,{WORD},{WORD},{WORD}\n")
    item = item_of(WORD, bands=("B02",))
    (outside / "item.json").write_text(json.dumps(item))
    (outside / "config.yaml").write_text(f"{WORD}: 1\n")
    return outside


def good(folder: Path, name: str = "a.tif") -> Path:
    """A harmless scene beside what is not."""
    return save_scene(folder / name, np.full((1, SIDE, SIDE), 7, np.uint16))


def vrt(target: Path | str) -> str:
    """A virtual raster of one source."""
    return (
        f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><VRTRasterBand dataType="UInt16" band="1">'
        f"<SimpleSource><SourceFilename>{target}</SourceFilename><SourceBand>1</SourceBand>"
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def raster(name: str, content: Callable[[Path], str | bytes]) -> Case:
    """A file of this name instead of a raster, beside a good one."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        good(folder, "good.tif")
        found = content(outside)
        (folder / name).write_bytes(found.encode() if isinstance(found, str) else found)
        return str(folder), ["run.jpeg2000=true"]

    return make


def beside(name: str, content: Callable[[Path], str | bytes]) -> Case:
    """A file beside the good a.tif."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        good(folder)
        found = content(outside)
        (folder / name).write_bytes(found.encode() if isinstance(found, str) else found)
        return str(folder), []

    return make


def zipped(folder: Path, outside: Path) -> tuple[str, list[str]]:
    good(folder, "good.tif")
    with zipfile.ZipFile(folder / "a.tif", "w") as archive:
        archive.writestr("a.tif", vrt(outside / "secret.tif"))
    return str(folder), []


def source(text: str) -> Case:
    """A source as it stands; {out} is what lies outside."""
    return lambda folder, outside: (text.format(out=outside, here=folder), [])


def setting(*texts: str) -> Case:
    """A good archive with settings; {out} is what lies outside."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        good(folder)
        return str(folder), [text.format(out=outside, up=f"../{outside.name}") for text in texts]

    return make


def linked(name: str, target: str, *settings: str) -> Case:
    """A link beside the good scene; `target` counts from what lies outside."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        good(folder, "good.tif")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(outside / target if target else folder / name)
        return str(folder), list(settings)

    return make


def special(folder: Path, outside: Path) -> tuple[str, list[str]]:
    good(folder, "good.tif")
    os.mkfifo(folder / "pipe.tif")
    (folder / "folder.tif").mkdir()
    return str(folder), []


def named(name: bytes) -> Case:
    """A raster whose name is not plain text."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        good(folder, "good.tif").rename(os.fsdecode(os.fsencode(folder) + b"/" + name))
        (folder / "bad.tif").write_bytes(b"no raster")
        return str(folder), []

    return make


def tagged(text: str) -> Case:
    """A GeoTIFF whose metadata is XML with an entity that names a file."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        path = good(folder)
        import rasterio

        with rasterio.open(path, "r+") as opened:
            opened.update_tags(A="x" * 400)
        content = path.read_bytes()
        filled = text.format(out=outside).encode()
        start = content.index(b"<GDALMetadata>")
        path.write_bytes(content[:start] + filled.ljust(420) + content[start + 420 :])
        return str(folder), ["modality.dates.tag=A"]

    return make


def stac(**asset: Any) -> Case:
    """An item collection whose one asset is changed; {out} is what lies outside."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        item = item_of("one", bands=("B02",))
        good(folder, "one_B02.tif")
        held = item["assets"]["B02"]
        held |= {"proj:shape": [SIDE, SIDE], **asset}
        held["href"] = held["href"].format(out=outside, up=f"../{outside.name}")
        content = {"type": "FeatureCollection", "features": [item]}
        (folder / "items.json").write_text(json.dumps(content))
        return str(folder / "items.json"), ["modality.bands=[B02]"]

    return make


def link(href: str) -> Case:
    """A catalogue with a link."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        to = href.format(out=outside, up=f"../{outside.name}")
        links = [{"rel": rel, "href": to} for rel in ("item", "child")]
        content = {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "links": links}
        (folder / "catalog.json").write_text(json.dumps(content))
        return str(folder / "catalog.json"), ["modality.bands=[B02]"]

    return make


def item_id(name: str) -> Case:
    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        (folder / "item.json").write_text(json.dumps(item_of(name, bands=("B02",))))
        return str(folder / "item.json"), ["modality.bands=[B02]"]

    return make


def pickled_column(folder: Path, outside: Path) -> tuple[str, list[str]]:
    """An extension type that old versions of pyarrow unpickled while reading the schema."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(outside / "executed")),
    }
    ids = pa.field("id", pa.string(), metadata=metadata)
    assets = pa.array([{"B02": {"href": str(outside / "secret.tif")}}])
    schema = pa.schema([ids, ("assets", assets.type)])
    table = pa.Table.from_arrays([pa.array(["a"]), assets], schema=schema)
    pq.write_table(table, folder / "items.parquet")
    return str(folder / "items.parquet"), ["modality.bands=[B02]"]


def zarr(change: Callable[[Path, Path], None], *settings: str) -> Case:
    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        store = save_array(
            folder / "a.zarr", np.full((SIDE, SIDE), 7, np.uint16), ("y", "x"), chunks=(SIDE, SIDE)
        )
        change(store, outside)
        return str(store), ["modality.bands=[image]", *(s.format(out=outside) for s in settings)]

    return make


def with_link(name: str, target: str) -> Callable[[Path, Path], None]:
    def change(store: Path, outside: Path) -> None:
        path = store / name
        path.rename(path.with_name("kept"))
        path.symlink_to(outside / target)

    return change


def netcdf(change: Callable[[h5py.File, Path], None]) -> Case:
    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        with h5py.File(folder / "a.nc", "w") as file:
            change(file, outside)
            if "image" in file and isinstance(file.get("image", getlink=True), h5py.HardLink):
                for axis, dim in enumerate("yx"):
                    file[dim] = np.arange(SIDE)
                    file[dim].make_scale(dim)
                    file["image"].dims[axis].attach_scale(file[dim])
        return str(folder / "a.nc"), ["modality.bands=[image]"]

    return make


def external_link(file: h5py.File, outside: Path) -> None:
    file["image"] = h5py.ExternalLink(str(outside / "secret.nc"), "/image")


def external_data(file: h5py.File, outside: Path) -> None:
    where = (str(outside / "secret.raw"), 0, 2 * SIDE**2)
    file.create_dataset("image", (SIDE, SIDE), "u2", external=[where])


def virtual_data(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout((SIDE, SIDE), "u2")
    layout[:] = h5py.VirtualSource(str(outside / "secret.nc"), "image", (SIDE, SIDE))
    file.create_virtual_dataset("image", layout)


def config(text: str) -> Case:
    """A configuration file."""

    def make(folder: Path, outside: Path) -> tuple[str, list[str]]:
        good(folder)
        file = folder / "config.yaml"
        file.write_text(text.format(out=outside))
        return str(folder), [f"--config={file}"]

    return make


def _entity(out: Path) -> str:
    return (
        f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file://{out}/secret.csv">]>'
        "<PAMDataset><Metadata><MDI key='A'>&x;</MDI></Metadata></PAMDataset>"
    )


HREFS = {
    "absolute": "{out}/secret.tif",
    "upwards": "{up}/secret.tif",
    "upwards in the middle": "./x/../{up}/secret.tif",
    "file://": "file://{out}/secret.tif",
    "file://localhost": "file://localhost{out}/secret.tif",
    "file://host": "file://host{out}/secret.tif",
    "file:///../": "file:///..{out}/secret.tif",
    "encoded file://": "file:///%2e%2e{out}/secret.tif",
    "UNC": "\\\\server\\share\\secret.tif",
    "UNC with slashes": "//127.0.0.1:9/share/secret.tif",
    "/vsicurl/": f"/vsicurl/{DEAD}/secret.tif",
    "/vsizip/": "/vsizip/{out}/secret.zip/secret.tif",
    "/vsi upwards": "x/../../vsifile{out}/secret.tif",
    "vrt://": "vrt://{out}/secret.tif",
    "GTIFF_DIR": "GTIFF_DIR:1:{out}/secret.tif",
    "NETCDF": 'NETCDF:"{out}/secret.nc":image.tif',
    "http": f"{DEAD}/secret.tif",
    "https with credentials": "https://user:password@127.0.0.1:9/secret.tif",
    "metadata address": "http://169.254.169.254/latest/secret.tif",
    "s3": "s3://bucket/secret.tif",
    "gs": "gs://bucket/secret.tif",
    "ftp": "ftp://127.0.0.1:9/secret.tif",
    "data": "data:image/tiff;base64,SUkqAA.tif",
    "NUL": "one_B02.tif\0{out}/secret.tif",
    "newline": "one_B02.tif\n{out}/secret.tif",
    "sent through a query": "one_B02.tif?/../{up}/secret.tif",
}
LINKS = ["{out}/item.json", "{up}/item.json", "file://{out}/item.json", f"{DEAD}/item.json", "/dev/zero",
         "https://user:password@127.0.0.1:9/item.json"]  # fmt: skip
YAML = {
    "apply": "modality: !!python/object/apply:os.mkdir [{out}/executed]\n",
    "new": "modality: !!python/object/new:os.mkdir [{out}/executed]\n",
    "name": "modality: !!python/name:os.mkdir\n",
    "module": "modality: !!python/module:antigravity\n",
    "include": "modality: !include {out}/config.yaml\n",
    "preset outside": "preset: {out}/config.yaml\n",
}
SOURCES = [
    "/vsicurl/http://127.0.0.1:9/secret.tif", "/vsizip/{out}/secret.zip/a.tif", "/vsimem/a.tif",
    "GTIFF_DIR:1:{out}/secret.tif", 'NETCDF:"{out}/secret.nc":image', "HDF5:{out}/secret.nc://image",
    "vrt://{out}/secret.tif", "file://{out}/secret.tif", "\\\\server\\share\\a.tif",
]  # fmt: skip

CASES: dict[str, Case] = {
    **{f"VRT named {name}": raster(name, lambda out: vrt(out / "secret.tif"))
       for name in ("a.tif", "a.tiff", "a.png", "a.jpg", "a.jp2")},
    "VRT of an address": raster("a.tif", lambda out: vrt(f"/vsicurl/{DEAD}/a.tif")),
    "VRT within a zip named .tif": zipped,
    **{f"source {text}": source(text) for text in SOURCES},
    "link to a file": linked("a.tif", "secret.tif"),
    "link to a folder": linked("more", "folder"),
    "link to nothing": linked("a.tif", "nothing.tif"),
    "link to itself": linked("a.tif", ""),
    "folder linked to itself": linked("more", "", "modality.source=more"),
    "pipe and folder named .tif": special,
    **{f"name {name!r}": named(name)
       for name in (b"a\nb.tif", b"a\x1b[31m.tif", b"a\xff.tif", "a\u202efit.tif".encode())},
    "source outside": setting("modality.source={out}/folder"),
    "source upwards": setting("modality.source={up}/folder"),
    "source file://": setting("modality.source=file://{out}/folder"),
    "mask outside": setting("modality.mask={{source: '{out}/folder', kind: classes, cloud: [1]}}"),
    "dates outside": setting("modality.dates.csv={out}/secret.csv"),
    "dates upwards": setting("modality.dates.csv={up}/secret.csv"),
    "labels outside": setting("labels.csv={out}/secret.csv"),
    "polygons outside": setting("labels.vector={out}/secret.parquet"),
    "splits outside": setting("splits={{by: csv, csv: '{out}/secret.csv'}}"),
    "dates linked": linked("d.csv", "secret.csv", "modality.dates.csv=d.csv"),
    "labels linked": linked("d.csv", "secret.csv", "labels.csv=d.csv"),
    "splits linked": linked("d.csv", "secret.csv", "splits={by: csv, csv: d.csv}"),
    "sidecar .aux.xml with an entity": beside("a.tif.aux.xml", _entity),
    "sidecar .msk that is a VRT": beside("a.tif.msk", lambda out: vrt(out / "secret.tif")),
    "sidecar .ovr that is a VRT": beside("a.tif.ovr", lambda out: vrt(out / "secret.tif")),
    "sidecar .msk of pixels": beside("a.tif.msk", lambda out: (out / "secret.tif").read_bytes()),
    "tag with an entity": tagged(
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file://{out}/secret.csv">]><GDALMetadata><Item name="A">&x;</Item>'
        "</GDALMetadata>"
    ),
    **{f"STAC href {name}": stac(href=href) for name, href in HREFS.items()},
    **{f"STAC link {href}": link(href) for href in LINKS},
    **{f"STAC id {name!r}": item_id(name)
       for name in ("../../outside", "a\nb", "\x1b[31mred", "/etc/passwd")},
    "Parquet column to unpickle": pickled_column,
    **{f"Zarr {name} linked": zarr(with_link(name, f"secret.zarr/{name}"))
       for name in ("image", "image/zarr.json", "image/c", "image/c/0/0")},
    "Zarr path upwards": zarr(
        lambda *_: None, "modality.assets={{image: ../../outside/secret.zarr/image}}"
    ),
    "HDF5 external link": netcdf(external_link),
    "HDF5 external data": netcdf(external_data),
    "HDF5 virtual data": netcdf(virtual_data),
    **{f"YAML {name}": config(text) for name, text in YAML.items()},
}  # fmt: skip
