"""Sensor presets: what is known of a product before any scene is opened.

A preset is a part of a configuration; whatever a configuration says itself wins, and where it chooses some
of the bands, what is said of each band follows. Nothing here says how files or assets are named: a source
tries the bands' own names, then `band_aliases`.

Sentinel-2. Bands, their order and grids, DN = reflectance x 10000, and DN 0 = no data are those of the
Sentinel-2 Products Specification Document, S2-PDGS-TAS-DI-PSD 14; Level-2A has no B10. Since processing
baseline 04.00 reflectance is (DN - 1000) / 10000. Central wavelengths are those of Sentinel-2A
(COPE-GSEG-EOPG-TN-15-0007, 3.0); Sentinel-2B's differ by up to 17 nm in B12 and 4 nm elsewhere.
Values from 0 to 10000 are reflectances from 0 to 1; bright cloud lies above and counts as 1.
A pixel with DN 0 in any band is invalid: in the product a valid DN begins at 1, and at the edge of a swath
the bands end some pixels apart. Copies that were computed anew, from reflectances or by resampling, may
hold zeros that are true: 10 pixels of 1.1 million in the real scenes of the tests. `nodata: null` keeps
them.

Sentinel-1. Radiometrically terrain corrected backscatter, gamma0. Producers differ in unit (linear power or
dB), pixel size (10 to 30 m), and nodata (-32768, 0 or NaN, which the files state), so that these and the
value range are taken from the scenes. The wavelength is that of 5.405 GHz.

Landsat 8/9, Collection 2 Level-2 surface reflectance: reflectance = DN x 0.0000275 - 0.2, fill 0, DN 7273
to 43636 for reflectances 0 to 1 (USGS LSDS-1619, Landsat 8-9 Level 2 Science Product Guide). Central
wavelengths are those of OLI (Barsi et al. 2014, Remote Sensing 6, 10232). Surface temperature has another
scale and is not included.

NAIP. Four bands of 8 bits, pixels of 0.3 to 1 m by year and state, cameras that differ in wavelength (USDA
NAIP information sheet). DEM. One band in metres; the files state nodata, and the range of heights
is the archive's own. RGB. Three bands of 8 bits.
"""

from typing import Any

# Band: grid, central wavelength in nm, other names. Those are the asset keys of Earth Search and STAC
# common names, Copernicus Data Space asset keys, EOPF variables, and names without leading zeros.
_S2: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "B01": ("60m", 442.7, ("coastal", "B1")),
    "B02": ("10m", 492.4, ("blue", "B2")),
    "B03": ("10m", 559.8, ("green", "B3")),
    "B04": ("10m", 664.6, ("red", "B4")),
    "B05": ("20m", 704.1, ("rededge1", "rededge071", "B5")),
    "B06": ("20m", 740.5, ("rededge2", "rededge075", "B6")),
    "B07": ("20m", 782.8, ("rededge3", "rededge078", "B7")),
    "B08": ("10m", 832.8, ("nir", "B8")),
    "B8A": ("20m", 864.7, ("nir08", "B08A")),
    "B09": ("60m", 945.1, ("nir09", "B9")),
    "B10": ("60m", 1373.5, ("cirrus",)),
    "B11": ("20m", 1613.7, ("swir16",)),
    "B12": ("20m", 2202.4, ("swir22",)),
}
_L1C = tuple(_S2)
_L2A = tuple(band for band in _S2 if band != "B10")
_LANDSAT: dict[str, tuple[float, tuple[str, ...]]] = {
    "SR_B1": (443.0, ("coastal", "B1", "OLI_B1")),
    "SR_B2": (482.0, ("blue", "B2", "OLI_B2")),
    "SR_B3": (561.4, ("green", "B3", "OLI_B3")),
    "SR_B4": (654.6, ("red", "B4", "OLI_B4")),
    "SR_B5": (864.7, ("nir08", "nir", "B5", "OLI_B5")),
    "SR_B6": (1608.9, ("swir16", "B6", "OLI_B6")),
    "SR_B7": (2200.7, ("swir22", "B7", "OLI_B7")),
}
_C_BAND_NM = 55465760.0


def _sentinel_2(bands: tuple[str, ...], *, native: bool) -> dict[str, Any]:
    modality: dict[str, Any] = {
        "bands": list(bands),
        "value_range": [0, 10000],
        "nodata": 0,
        "scale": 0.0001,
        "offset": 0.0,
        "baseline": {"since": "04.00", "offset": -0.1},
        "wavelengths_nm": [_S2[band][1] for band in bands],
    }
    if native:
        grids = ("10m", "20m", "60m")
        modality["band_sets"] = {grid: [b for b in bands if _S2[b][0] == grid] for grid in grids}
    else:
        modality["ground_sample_distance_m"] = 10
    return {"modality": modality, "scoring": {"bands": ["B02", "B03", "B04"]}}


def _named(name: str, preset: dict[str, Any]) -> dict[str, Any]:
    return {**preset, "modality": {"name": name, **preset["modality"]}}


_CONTENTS: dict[str, dict[str, Any]] = {
    "s2_l1c": _sentinel_2(_L1C, native=False),
    "s2_l2a": _sentinel_2(_L2A, native=False),
    # For scenes whose bands lie on their native grids of 10, 20 and 60 m, in several files.
    "s2_l1c_native": _sentinel_2(_L1C, native=True),
    "s2_l2a_native": _sentinel_2(_L2A, native=True),
    "s1_rtc": {
        "modality": {"bands": ["VV", "VH"], "wavelengths_nm": [_C_BAND_NM, _C_BAND_NM]},
        "scoring": {"bands": ["VV", "VH"]},
    },
    "landsat_c2_l2": {
        "modality": {
            "bands": list(_LANDSAT),
            "value_range": [7273, 43636],
            "nodata": 0,
            "scale": 0.0000275,
            "offset": -0.2,
            "ground_sample_distance_m": 30,
            "wavelengths_nm": [wavelength for wavelength, _ in _LANDSAT.values()],
        },
        "scoring": {"bands": ["SR_B2", "SR_B3", "SR_B4"]},
    },
    "naip": {
        "modality": {"bands": ["red", "green", "blue", "nir"], "value_range": [0, 255]},
        "scoring": {"bands": ["red", "green", "blue"]},
    },
    "dem": {
        "modality": {"bands": ["elevation"], "static": True},
        "scoring": {"bands": ["elevation"]},
    },
    "rgb": {
        "modality": {"bands": ["red", "green", "blue"], "value_range": [0, 255]},
        "scoring": {"bands": ["red", "green", "blue"]},
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    name: _named(name.removesuffix("_native"), content) for name, content in _CONTENTS.items()
}


def _s2_aliases(bands: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Earth Search, STAC and short names first; then the keys with the grid, and lower case."""
    return {
        band: (
            *_S2[band][2],
            f"{band}_{_S2[band][0]}",
            band.lower(),
            f"{band}_{_S2[band][0]}".lower(),
        )
        for band in bands
    }


# Quality bands are no bands of a preset, but a mask may name them.
_RGB_ALIASES: dict[str, tuple[str, ...]] = {
    "red": ("R", "Red", "r"),
    "green": ("G", "Green", "g"),
    "blue": ("B", "Blue", "b"),
}
BAND_ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "s2_l1c": {**_s2_aliases(_L1C), "QA60": ("qa60",)},
    "s2_l2a": {**_s2_aliases(_L2A), "SCL": ("scl", "SCL_20m", "scl_20m"), "QA60": ("qa60",)},
    "s1_rtc": {"VV": ("vv",), "VH": ("vh",)},
    "landsat_c2_l2": {
        **{band: (*names, band.lower()) for band, (_, names) in _LANDSAT.items()},
        "QA_PIXEL": ("qa_pixel",),
    },
    "naip": {**_RGB_ALIASES, "nir": ("N", "NIR", "nir08", "n")},
    "dem": {"elevation": ("dem", "DEM", "data", "height")},
    "rgb": _RGB_ALIASES,
}


def band_aliases(band: str) -> tuple[str, ...]:
    """Other names under which files, catalogues and arrays hold a band of a preset, the likeliest first;
    empty for a band of no preset."""
    names = [name for bands in BAND_ALIASES.values() for name in bands.get(band, ())]
    return tuple(dict.fromkeys(names))
