"""Small files that claim, or decode to, very much more than they hold."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import rasterio.shutil
from rasterio.io import MemoryFile

from cubes import numbers, save_array
from support import save_scene

_LONG = 4
_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Bomb:
    """`make` writes it into a folder and returns the source to preprocess; `settings` go with it. The
    verdict on it has the words `told`."""

    make: Callable[[Path], Path]
    told: str
    settings: tuple[str, ...] = ()


def tiff(path: Path, *directories: dict[int, Any], size: int = 0) -> Path:
    """A classic TIFF of bare directories. A value is a number, or (type, count, offset) as it stands.

    With `size` the file is stretched to that many bytes, of which the disk holds none.
    """
    content, starts = bytearray(b"II*\0\0\0\0\0"), []
    for entries in directories:
        starts.append(len(content))
        content += struct.pack("<H", len(entries))
        for tag, value in sorted(entries.items()):
            kind, count, at = value if isinstance(value, tuple) else (_LONG, 1, value)
            content += struct.pack("<HHII", tag, kind, count, at)
        content += bytes(4)
    struct.pack_into("<I", content, 4, starts[0])
    for here, after in pairwise([*starts, 0]):
        (count,) = struct.unpack_from("<H", content, here)
        struct.pack_into("<I", content, here + 2 + 12 * count, after)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.truncate(path, max(size, len(content)))
    return path


def directory(side: int, bits: int = 8, compression: int = 1, tags: Any = ()) -> dict[int, Any]:
    """A square image of one band in a single strip, with further tags."""
    return {256: side, 257: side, 258: bits, 259: compression, 262: 1, 273: 4096, 277: 1, 278: side,
            279: side * side * bits // 8, 284: 1, **dict(tags)}  # fmt: skip


def _sparse(side: tuple[int, int], count: int = 1, dtype: str = "uint8", **options: Any) -> Any:
    """A GeoTIFF without any block."""

    def make(folder: Path) -> Path:
        here = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
        with rasterio.open(
            folder / "a.tif", "w", driver="GTiff", height=side[0], width=side[1], count=count, dtype=dtype,
            crs="EPSG:32632", transform=here, compress="deflate", sparse_ok=True, **options,
        ):  # fmt: skip
            return folder

    return make


def _one_tile(side: int, dtype: str, count: int = 1, **options: Any) -> Any:
    def make(folder: Path) -> Path:
        zeros = np.zeros((count, side, side), dtype)
        save_scene(folder / "a.tif", zeros, tiled=True, blockxsize=side, blockysize=side, **options)
        return folder

    return make


def _tiff(*directories: dict[int, Any], size: int) -> Any:
    return lambda folder: tiff(folder / "a.tif", *directories, size=size).parent


def _png(side: int, bits: int = 1, extra: bytes = b"") -> Any:
    def make(folder: Path) -> Path:
        header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
        pixels = zlib.compress(bytes((side * bits // 8 + 1) * side), 1)
        chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        (folder / "a.png").write_bytes(_PNG_START + chunks)
        return folder

    return make


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def _copied(name: str, side: int, **options: Any) -> Any:
    """A black image through a driver that only copies."""

    def make(folder: Path) -> Path:
        profile = {"width": side, "height": side, "count": 1, "dtype": "uint8"}
        profile["transform"] = rasterio.Affine(1, 0, 5, 0, -1, 5)
        with MemoryFile() as memory, memory.open(driver="GTiff", sparse_ok=True, **profile) as dark:
            dark.write(np.zeros((1, side, side), np.uint8))
            rasterio.shutil.copy(dark, folder / name, **options)
        return folder

    return make


def _zarr(**facts: Any) -> Any:
    def make(folder: Path) -> Path:
        store = save_array(folder / "a.zarr", numbers((8, 8)), ("y", "x"), chunks=(4, 4))
        document = store / "image/zarr.json"
        document.write_text(json.dumps({**json.loads(document.read_text()), **facts}))
        return store

    return make


def _zarr_chunk(codec: Any) -> Any:
    """A store whose only chunk decodes to 256 MiB instead of 128 bytes."""

    def make(folder: Path) -> Path:
        store = save_array(
            folder / "a.zarr", numbers((8, 8)), ("y", "x"), 2, chunks=(8, 8), compressors=codec
        )
        (store / "image/0.0").write_bytes(codec.encode(np.zeros(2**28, np.uint8)))
        return store

    return make


def _zarr_document(text: str) -> Any:
    def make(folder: Path) -> Path:
        store = _zarr()(folder)
        (store / "image/zarr.json").write_text(text)
        return Path(store)

    return make


def _hdf5(
    shape: tuple[int, int], chunk_bytes: bytes = b"", filled: bool = False, **options: Any
) -> Any:
    def make(folder: Path) -> Path:
        with h5py.File(folder / "a.nc", "w") as file:
            image = file.create_dataset("image", shape, "u2", **options)
            for axis, dim in enumerate("yx"):
                file.create_dataset(dim, (shape[axis],), "i1").make_scale(dim)
                image.dims[axis].attach_scale(file[dim])
            if chunk_bytes:
                for dim in "yx":
                    file[dim][:] = np.arange(8)
                image.id.write_direct_chunk((0, 0), chunk_bytes)
            if filled:
                image[-1, -1] = 1
        return folder / "a.nc"

    return make


def _netcdf3(header: bytes, size: int) -> Any:
    def make(folder: Path) -> Path:
        (folder / "a.nc").write_bytes(header)
        os.truncate(folder / "a.nc", max(size, len(header)))
        return folder / "a.nc"

    return make


def _wide_netcdf3(rows: int, width: int) -> bytes:
    def name(text: str) -> bytes:
        return struct.pack(">I", len(text)) + text.encode() + bytes(-len(text) % 4)

    dims = struct.pack(">II", 10, 2) + name("y") + struct.pack(">I", rows)
    dims += name("x") + struct.pack(">I", width) + bytes(8)
    variable = struct.pack(">II", 11, 1) + name("image") + struct.pack(">III", 2, 0, 1) + bytes(8)
    head = b"CDF\x02" + bytes(4) + dims + variable + struct.pack(">II", 6, 2**31 - 1)
    return head + struct.pack(">Q", len(head) + 8)


def _text(name: str, content: str, size: int = 0) -> Any:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        os.truncate(folder / name, max(size, len(content)))
        return folder / name

    return make


def _beside(name: str, content: str, size: int = 0) -> Any:
    """A file beside a good scene; the folder is the source."""

    def make(folder: Path) -> Path:
        _text(name, content, size)(folder)
        save_scene(folder / "a.tif", numbers((1, 32, 32)))
        return folder

    return make


def _wide_rows(folder: Path) -> Path:
    hrefs = [chr(65 + number % 26) * 2**18 for number in range(2000)]
    table = {"id": [str(n) for n in range(2000)], "assets": [{"a": {"href": h}} for h in hrefs]}
    pq.write_table(pa.table(table), folder / "a.parquet", use_dictionary=False, compression="zstd")
    return folder / "a.parquet"


def _wide_labels(folder: Path) -> Path:
    save_scene(folder / "a.tif", numbers((1, 32, 32)))
    geo = {"primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
    table = pa.table({"geometry": [bytes(2**18)] * 2000, "label": ["a"] * 2000})
    table = table.replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, folder / "l.parquet", use_dictionary=False, compression="zstd")
    return folder


def _laugh() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefghij")]
    return "\n".join(lines)


_BLOCKS = {"tiled": True, "blockxsize": 256, "blockysize": 256}
_STAC = ("modality.bands=[B02]",)
_CUBE = ("modality.bands=[image]",)
_BLOCK = "more than run.max_block_bytes"
_HUGE_CHUNKS = {"name": "regular", "configuration": {"chunk_shape": [2**20, 2**20]}}
_SHARDS = {
    "name": "sharding_indexed",
    "configuration": {
        "chunk_shape": [1, 1],
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    },
}
_ROW_OF_STRIPS = directory(64)

BOMBS = {
    "TIFF, one tile of 16k x 16k, uint8": Bomb(
        _one_tile(2**14, "uint8", compress="deflate"), "read 2 tiles"
    ),
    "TIFF, one tile of 16k x 16k, uint16": Bomb(
        _one_tile(2**14, "uint16", compress="zstd"), _BLOCK
    ),
    "TIFF, one tile of 8k x 8k, 8 bands": Bomb(
        _one_tile(2**13, "uint8", 8, compress="zstd", interleave="pixel"), _BLOCK
    ),
    "TIFF, sparse, 60k x 60k": Bomb(
        _sparse((60_000, 60_000), dtype="uint16", **_BLOCKS), "read 2 tiles"
    ),
    "TIFF, sparse, 60k x 60k, zero border": Bomb(
        _sparse((60_000, 60_000), dtype="uint16", **_BLOCKS),
        "its zero border takes 450000000 bytes",
        ("modality.zero_border=true",),
    ),
    "TIFF, sparse, 2^20 x 2^20": Bomb(
        _sparse((2**20, 2**20), tiled=True, blockxsize=2**14, blockysize=2**14),
        "more than run.max_scene_px",
    ),
    "TIFF, one strip of 30k rows": Bomb(_sparse((30_000, 30_000), blockysize=30_000), _BLOCK),
    "TIFF, rows of 2^26 float64": Bomb(_sparse((4, 2**26), dtype="float64", blockysize=1), _BLOCK),
    "TIFF, 5000 bands": Bomb(
        _sparse((128, 128), 5000, "uint16", interleave="band"), "has 5000 bands; at most 4096"
    ),
    "TIFF, a mask of one block": Bomb(
        _tiff(directory(40_000, tags={278: 1, 273: (4, 40_000, 4096), 279: (4, 40_000, 4096)}.items()),
              directory(40_000, 1, 8, {254: 4, 262: 4}.items()), size=2**22),
        "one block of its mask decodes to 1600000000 bytes",
    ),
    "TIFF, a tag of 1 GiB": Bomb(
        _tiff(directory(64, tags={270: (2, 2**30, 8192)}.items()), size=2**30 + 2**14),
        "its TIFF tag 270 holds 1073741824 bytes",
    ),
    "TIFF, lists of 2^31 blocks": Bomb(
        _tiff(directory(64, tags={273: (4, 2**31, 4096), 279: (4, 2**31, 4096)}.items()), size=2**14),
        "its TIFF tag 273, which says where its blocks lie, is beyond the end",
    ),
    "TIFF, 2000 directories": Bomb(
        _tiff(*[directory(64)] * 2000, size=2**19), "has more than 1024 directories"
    ),
    "PNG, 30k x 30k": Bomb(_png(30_000), "read 2 tiles"),
    "PNG, a text of 256 MiB": Bomb(
        _png(64, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**28), 1))), "read 1 tiles"
    ),
    "JPEG, progressive, 12k x 12k": Bomb(
        _copied("a.jpg", 12_000, driver="JPEG", progressive="ON"),
        "is a progressive JPEG that takes 288",
    ),
    "JPEG 2000, one tile of 8k x 8k": Bomb(
        _copied("a.jp2", 8192, driver="JP2OpenJPEG", blockxsize=8192, blockysize=8192),
        "read 2 tiles",
        ("run.jpeg2000=true",),
    ),
    "Zarr, 2^20 x 2^20": Bomb(_zarr(shape=[2**20, 2**20]), "more than run.max_scene_px", _CUBE),
    "Zarr, one chunk of 2^20 x 2^20": Bomb(
        _zarr(shape=[2**20, 2**20], chunk_grid=_HUGE_CHUNKS), _BLOCK, _CUBE
    ),
    "Zarr, a shard of 2^40 chunks": Bomb(
        _zarr(shape=[2**20, 2**20], chunk_grid=_HUGE_CHUNKS, codecs=[_SHARDS]),
        "have an index of 17592186044416 bytes",
        _CUBE,
    ),
    "Zarr, a zstd chunk of 256 MiB": Bomb(
        _zarr_chunk(numcodecs.Zstd()), "decodes to more than 4256 bytes|expected at most", _CUBE
    ),
    "Zarr, a zlib chunk of 256 MiB": Bomb(
        _zarr_chunk(numcodecs.Zlib(1)), "decodes to more than 4256 bytes|expected at most", _CUBE
    ),
    "Zarr, metadata of 20 million objects": Bomb(
        _zarr_document('{"a": [' + "{}," * 20_000_000 + "{}]}"), "of memory, more than twice", _CUBE
    ),
    "Zarr, metadata 100,000 deep": Bomb(_zarr_document("[" * 100_000), "is no JSON", _CUBE),
    "netCDF-4, a chunk of 2^15 x 2^15": Bomb(
        _hdf5((2**15, 2**15), chunks=(2**15, 2**15), compression="gzip"), _BLOCK, _CUBE
    ),
    "netCDF-4, a deflate chunk of 256 MiB": Bomb(
        _hdf5((8, 8), zlib.compress(bytes(2**28)), chunks=(8, 8), compression="gzip"),
        "more than 4256 bytes|expected at most",
        _CUBE,
    ),
    "netCDF-4, rows of 2^28": Bomb(_hdf5((4, 2**28), filled=True), _BLOCK, _CUBE),
    "netCDF-3, 2^31 dimensions": Bomb(
        _netcdf3(b"CDF\x01" + struct.pack(">III", 0, 10, 2**31 - 1), 2**26), "claims 2147483647", _CUBE
    ),
    "netCDF-3, an attribute of 2 GiB": Bomb(
        _netcdf3(
            b"CDF\x01" + bytes(12) + struct.pack(">III", 12, 1, 1) + b"a\0\0\0"
            + struct.pack(">II", 2, 2**31 - 1), 2**31,
        ),
        "claims a name or attribute of 2147483647 bytes",
        _CUBE,
    ),
    "netCDF-3, rows of 2^28 float64": Bomb(
        _netcdf3(_wide_netcdf3(4, 2**28), 2**33 + 2**10), _BLOCK, _CUBE
    ),
    "STAC, 100,000 deep": Bomb(_text("a.json", "[" * 100_000), "nested too deeply", _STAC),
    "STAC, 30 million empty items": Bomb(
        _text("a.json", '{"type":"FeatureCollection","features":[' + "{}," * 30_000_000 + "{}]}"),
        "of memory, more than twice",
        _STAC,
    ),
    "STAC, 1 GiB": Bomb(_text("a.json", "{", 2**30), "has 1073741824 bytes", _STAC),
    "stac-geoparquet, wide rows": Bomb(_wide_rows, "has rows so wide", _STAC),
    "GeoParquet of labels, wide rows": Bomb(
        _wide_labels, "has rows so wide", ("labels.vector=l.parquet", "labels.column=label")
    ),
    "CSV, 2 GiB": Bomb(
        _beside("d.csv", "scene,datetime\n", 2**31), "has 2147483648 bytes", ("modality.dates.csv=d.csv",)
    ),
    "YAML, ten billion values": Bomb(_text("a.yaml", _laugh()), "stands for more than 1000000"),
    "YAML, 100,000 deep": Bomb(_text("a.yaml", "[" * 100_000), "nested too deeply"),
}  # fmt: skip
