"""Which asset of a STAC item, and which band in it, is the one a modality calls by a name.

Pure. An asset is what the configuration says, else the one whose key is the band's name, else the one
that lists a band of that name or common name. Two that would do are an error, never a guess.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.errors import SceneError
from pipeline.sources.stac_facts import Band, BandList, shown, stated_bands


class AssetChoice:
    """Which asset of one item, and which band in it, is the one a modality calls by a name."""

    def __init__(self, assets: Mapping[str, Any]) -> None:
        self.assets = assets
        self._bands: dict[str, BandList] = {}
        self._keys: dict[str, list[str]] | None = None
        self._listed: dict[str, list[str]] | None = None

    def bands(self, key: str) -> BandList:
        """The bands an asset lists."""
        if key not in self._bands:
            asset = self.assets[key]
            if not isinstance(asset, Mapping):
                raise SceneError(f"has the asset {shown(key)}: {shown(asset)}; expected an object")
            self._bands[key] = stated_bands(asset)
        return self._bands[key]

    def of(self, band: str, given_key: str | None) -> tuple[str, int] | None:
        """(asset key, 0-based position in the file) of a band; None where the item does not have it."""
        if given_key is not None:
            return self._inside(band, given_key) if self.assets.get(given_key) else None
        key = band if self.assets.get(band) else self._similar_key(band)
        return self._by_list(band) if key is None else self._inside(band, key)

    def _similar_key(self, band: str) -> str | None:
        """The asset key that is the band's name but for upper and lower case."""
        if self._keys is None:
            self._keys = {}
            for key, asset in self.assets.items():
                if asset:
                    self._keys.setdefault(str(key).lower(), []).append(key)
        return _only(band, self._keys.get(band.lower(), []))

    def _inside(self, band: str, key: str) -> tuple[str, int]:
        """The place of a band in an asset that is known to hold it."""
        bands = in_asset(key, self.bands(key).checked)
        if len(bands) <= 1:
            return key, 0
        positions = _matches(bands, band)
        if len(positions) != 1:
            listed = shown([entry.name or entry.alias for entry in bands])
            raise SceneError(
                f"asset {shown(key)} lists the bands {listed}; expected one of them to be named {band!r}; "
                "name modality.bands as the catalogue does"
            )
        return key, positions[0]

    def _by_list(self, band: str) -> tuple[str, int] | None:
        """The place of a band that is the name of no asset, but of a band in one."""
        if self._listed is None:
            self._listed = {}
            for key, asset in self.assets.items():
                names = self.bands(key).names if isinstance(asset, Mapping) else ()
                for name in names:
                    self._listed.setdefault(name, []).append(key)
        chosen = _only(band, self._listed.get(band.lower(), []))
        return None if chosen is None else self._inside(band, chosen)


def in_asset(key: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns; its SceneErrors say which asset they are about."""
    try:
        return function(*arguments)
    except SceneError as error:
        raise SceneError(f"asset {shown(key)} {error}") from None


def names_in_words(names: Iterable[str]) -> str:
    """Names for a message, at most a dozen."""
    shortened = [shown(name) for name in sorted(map(str, names))]
    more = [f"and {len(shortened) - 12} more"] if len(shortened) > 12 else []
    return ", ".join(shortened[:12] + more) or "none"


def _matches(bands: tuple[Band, ...], name: str) -> list[int]:
    """Positions of the bands of that name; if there are none, of that common name."""
    wanted = name.lower()
    named = [position for position, band in enumerate(bands) if band.name == wanted]
    return named or [position for position, band in enumerate(bands) if band.alias == wanted]


def _only(band: str, keys: list[str]) -> str | None:
    if len(keys) > 1:
        raise SceneError(
            f"offers {band!r} in the assets {names_in_words(keys)}; say which is meant in modality.assets"
        )
    return keys[0] if keys else None
