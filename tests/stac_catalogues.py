"""Small STAC catalogues made on the spot, over GeoTIFFs of a few pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.scenes import Access, Retries
from pipeline.settings.modality import ModalityConfig
from support import save_scene, textured

SHAPE = (16, 24)
TRANSFORM = [10, 0, 500_000, 0, -10, 5_000_000]
MODALITY = ModalityConfig(name="s2", bands=("B02", "B03"))


def access_to(folder: Path | str, **options: Any) -> Access:
    """Access to one folder or URL prefix."""
    return Access(roots=(str(folder),), **{"retries": Retries(attempts=1), **options})


def write_rasters(folder: Path, name: str, bands: tuple[str, ...] = ("B02", "B03")) -> None:
    """A uint16 GeoTIFF with nodata 0 per band, `name_BAND.tif`."""
    for number, band in enumerate(bands):
        save_scene(folder / f"{name}_{band}.tif", textured((1, *SHAPE), number), nodata=0)


def item_of(
    name: str, bands: tuple[str, ...] = ("B02", "B03"), rasters: str = ".", **properties: Any
) -> dict[str, Any]:
    """A STAC 1.0 item that states everything of the rasters of `write_rasters`."""
    assets = {
        band: {
            "href": f"{rasters}/{name}_{band}.tif",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "roles": ["data"],
            "proj:shape": list(SHAPE),
            "proj:transform": list(TRANSFORM),
            "eo:bands": [{"name": band, "common_name": f"common_{band}"}],
            "raster:bands": [{"data_type": "uint16", "nodata": 0, "scale": 0.0001, "offset": -0.1}],
        }
        for band in bands
    }
    assets["thumbnail"] = {"href": "https://elsewhere.example/preview.png", "roles": ["thumbnail"]}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": name,
        "geometry": None,
        "collection": "test",
        "properties": {
            "datetime": "2023-07-01T10:46:30.262Z",
            "proj:epsg": 32632,
            "grid:code": "MGRS-31UFU",
            "s2:processing_baseline": "05.09",
            "updated": "2023-07-02T01:49:17.191Z",
            **properties,
        },
        "links": [],
        "assets": assets,
    }


def newer(item: dict[str, Any]) -> dict[str, Any]:
    """The same item in the words of STAC 1.1."""
    item = json.loads(json.dumps(item))
    item["stac_version"] = "1.1.0"
    item["properties"]["proj:code"] = f"EPSG:{item['properties'].pop('proj:epsg')}"
    for asset in item["assets"].values():
        names, values = asset.pop("eo:bands", []), asset.pop("raster:bands", [])
        for band, value in zip(names, values, strict=True):
            asset.setdefault("bands", []).append(
                {
                    "name": band["name"],
                    "eo:common_name": band["common_name"],
                    "data_type": value["data_type"],
                    "nodata": value["nodata"],
                    "raster:scale": value["scale"],
                    "raster:offset": value["offset"],
                }
            )
    return item


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_catalogue(path: Path, links: list[tuple[str, str]], kind: str = "Catalog") -> Path:
    """A catalogue file with (relation, href) links."""
    content = {
        "type": kind,
        "stac_version": "1.0.0",
        "id": path.parent.name,
        "description": "made for a test",
        "links": [{"rel": relation, "href": href} for relation, href in links],
    }
    return write_json(path, content)


def write_collection(path: Path, items: list[Any]) -> Path:
    """An item collection file."""
    return write_json(path, {"type": "FeatureCollection", "features": items})


def write_parquet(path: Path, items: list[dict[str, Any]], **options: Any) -> Path:
    """Items as stac-geoparquet: properties as columns, assets as one struct of structs."""
    rows = [
        {
            **{key: item[key] for key in ("id", "stac_version", "collection", "assets")},
            **item["properties"],
            "bbox": {"xmin": 0.0, "ymin": 1.0, "xmax": 2.0, "ymax": 3.0},
            "geometry": b"\x01",
        }
        for item in items
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def plain_pixels() -> np.ndarray:
    """Pixels [band, y, x] of one band."""
    return textured((1, *SHAPE))
