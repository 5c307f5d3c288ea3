"""Reading whole tiles of a scene: pixels and validity of every band set, and the planes that are scored."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from pipeline.errors import SceneError
from pipeline.planning.gridding import ratio_between
from pipeline.planning.harmonize import apply_shift
from pipeline.readers.assets import open_asset
from pipeline.readers.base import AssetReader
from pipeline.readers.borders import BorderMask, find_border
from pipeline.readers.external import open_scores
from pipeline.readers.validity import mask_flags, onto_coarser, onto_finer, valid_pixels
from pipeline.rules import sampled_tiles
from pipeline.scenes import Access, Asset, Grid, Scene, Window, asset_of
from pipeline.scorers.config import ExternalConfig
from pipeline.settings.config import ModalitySettings
from pipeline.settings.modality import MaskConfig
from pipeline.storage.layout import BandSet, StoreLayout

Span = tuple[int, int]
# Rows, and bytes of pixels and labels, read at once while a scene's zero border is looked for.
_BORDER_ROWS = 512
_BORDER_BYTES = 128 * 2**20
_LABEL_BYTES = 8


@dataclass(frozen=True)
class SetPixels:
    """One band set of some tiles: `pixels` [band, y, x] as they are stored, `valid` bool [y, x].

    Of tiles that reach beyond the scene, only the part inside."""

    pixels: np.ndarray
    valid: np.ndarray

    def cut(self, row: int, col: int, size_px: int) -> "SetPixels":
        """One tile; beyond the scene it is zero and invalid."""
        return SetPixels(
            _cut(self.pixels, row, col, size_px, 0), _cut(self.valid, row, col, size_px, False)
        )


@dataclass(frozen=True)
class TilePixels:
    """`sets` in the layout's order; `scored` [plane, y, x], bands of the first set or scores from outside;
    `cloud` and `nodata` bool [y, x] on the first set: pixels a mask calls cloud, and pixels without data
    (nodata, NaN, outside the scene, its zero border). Both exclude each other."""

    sets: tuple[SetPixels, ...]
    scored: np.ndarray
    cloud: np.ndarray
    nodata: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """Validity of the first set."""
        return self.sets[0].valid

    @property
    def pixel_bytes(self) -> int:
        """Pixels of all sets, uncompressed."""
        return sum(part.pixels.nbytes for part in self.sets)

    def cut(self, row: int, col: int, layout: StoreLayout) -> "TilePixels":
        """One whole tile, counted from the top left of those read."""
        size = layout.band_sets[0].tile_size_px
        sets = tuple(
            pixels.cut(row, col, s.tile_size_px)
            for pixels, s in zip(self.sets, layout.band_sets, strict=True)
        )
        cloud = _cut(self.cloud, row, col, size, False)
        nodata = _cut(self.nodata, row, col, size, True)
        return TilePixels(sets, _cut(self.scored, row, col, size, 0), cloud, nodata)


@dataclass(frozen=True)
class SceneSource:
    """What it takes to read a scene: what it is, how it is stored, and what may be opened."""

    settings: ModalitySettings
    layout: StoreLayout
    scored_bands: tuple[int, ...]
    access: Access


@contextmanager
def scene_reader(scene: Scene, source: SceneSource) -> Iterator[Callable[[Span, Span], TilePixels]]:
    """A function from tile rows and columns (half-open) to the pixels of those tiles, as far as the scene
    reaches; `TilePixels.cut` makes whole tiles of them. Every failure inside becomes a SceneError.
    """
    with ExitStack() as stack:
        sets = [_SetReader(scene, band_set, source, stack) for band_set in source.layout.band_sets]
        mask = _MaskReader(scene, source, stack) if scene.mask is not None else None
        scoring = source.settings.scoring
        scores = None
        if isinstance(scoring, ExternalConfig):
            scores = stack.enter_context(open_scores(scene, scoring, source.access))

        def read(rows: Span, cols: Span) -> TilePixels:
            parts = [reader.read(rows, cols, mask) for reader in sets]
            first, cloud, nodata = parts[0]
            if scores is None:
                scored = _planes(first.pixels, source.scored_bands)
            else:
                scored = scores(_window(sets[0].grid, sets[0].band_set.tile_size_px, rows, cols))
            return TilePixels(tuple(part for part, _, _ in parts), scored, cloud, nodata)

        yield read


def sample_tiles(scene: Scene, source: SceneSource, num_tiles: int) -> Iterator[TilePixels]:
    """Up to `num_tiles` tiles of a scene; see `pipeline.rules.sampled_tiles`."""
    return tiles_at(scene, source, sampled_tiles(*scene_tiles(scene, source.layout), num_tiles))


def tiles_at(scene: Scene, source: SceneSource, numbers: np.ndarray) -> Iterator[TilePixels]:
    """The tiles of a scene with these row-major numbers, one by one; without any it is not opened."""
    if not len(numbers):
        return
    _, num_cols = scene_tiles(scene, source.layout)
    with scene_reader(scene, source) as read:
        for row, col in zip(*(part.tolist() for part in np.divmod(numbers, num_cols)), strict=True):
            yield read((row, row + 1), (col, col + 1)).cut(0, 0, source.layout)


def scene_tiles(scene: Scene, layout: StoreLayout) -> tuple[int, int]:
    """Rows and columns of tiles that a scene reaches into."""
    band_set = layout.band_sets[0]
    grid = asset_of(scene, band_set.bands[0])[0].shown_grid
    return -(-grid.height // band_set.tile_size_px), -(-grid.width // band_set.tile_size_px)


class _SetReader:
    """Reads one band set of a scene; its bands may lie in several files."""

    def __init__(
        self, scene: Scene, band_set: BandSet, source: SceneSource, stack: ExitStack
    ) -> None:
        self.scene, self.band_set, self.source = scene, band_set, source
        self.parts: list[tuple[Asset, AssetReader, list[int]]] = []
        by_asset: dict[int, list[int]] = {}
        for position, band in enumerate(band_set.bands):
            asset, _ = asset_of(scene, band)
            by_asset.setdefault(scene.assets.index(asset), []).append(position)
        for index, positions in by_asset.items():
            own = scene.assets[index]
            wanted = [band_set.bands[position] for position in positions]
            planes = tuple(own.planes[asset_of(scene, band)[1]] for band in wanted)
            opened = open_asset(replace(own, planes=planes), source.access)
            self.parts.append((*stack.enter_context(opened), positions))
        self.grid = self.parts[0][0].shown_grid

    def read(
        self, rows: Span, cols: Span, mask: "_MaskReader | None"
    ) -> tuple[SetPixels, np.ndarray, np.ndarray]:
        """Pixels and validity of tiles, then bool [y, x]: cloud, and without data."""
        window = _window(self.grid, self.band_set.tile_size_px, rows, cols)
        pixels, with_data = self._with_data(window)
        if self.source.settings.config.zero_border:
            with_data &= ~_border(self).window(window)
        valid, cloud = with_data, np.zeros_like(with_data)
        if mask is not None:
            flagged, unusable = mask.read(self.grid, window)
            cloud = flagged & with_data
            valid = with_data & ~unusable
            if mask.config.remove_clouds:
                valid &= ~cloud
        pixels = apply_shift(pixels, valid, self.scene.shift)
        return SetPixels(pixels, valid), cloud, ~with_data

    def _with_data(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [band, y, x] as the files hold them, and bool [y, x] where they are data."""
        shape = (len(self.band_set.bands), window.height, window.width)
        pixels = np.empty(0, self.band_set.dtype)
        with_data = np.ones(shape[1:], np.bool_)
        for asset, reader, positions in self.parts:
            read = reader.read(window)
            if read.dtype != pixels.dtype:
                raise SceneError(f"its pixels are {read.dtype}; planned was {pixels.dtype}")
            with_data &= valid_pixels(read, asset.planes, reader.readable(window))
            if positions == list(range(shape[0])):
                return read, with_data
            if not pixels.size:
                pixels = np.empty(shape, read.dtype)
            pixels[positions] = read
        return pixels, with_data

    def numbers(self, window: Window) -> np.ndarray:
        """Numbers [band, y, x] as the files hold them."""
        return self._with_data(window)[0]


class _MaskReader:
    """Reads a scene's quality mask on the grid of a band set."""

    def __init__(self, scene: Scene, source: SceneSource, stack: ExitStack) -> None:
        assert scene.mask is not None
        assert source.settings.config.mask is not None
        self.config: MaskConfig = source.settings.config.mask
        self.asset, self.reader = stack.enter_context(open_asset(scene.mask, source.access))

    def read(self, grid: Grid, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """bool [y, x] of a window of `grid`: cloud, and not to be used."""
        ratio = ratio_between(grid, self.asset.shown_grid)
        if ratio is None or 1 not in (ratio.numerator, ratio.denominator):
            raise SceneError(
                f"its mask {self.asset.href} lies on another grid: {self.asset.shown_grid.in_words()} "
                f"beside {grid.in_words()}; expected the same corner and a whole-number ratio"
            )
        own = _scaled_window(window, ratio, self.asset.shown_grid)
        values = self.reader.read(own)[0]
        (plane,) = self.asset.planes
        flags = mask_flags(values, self.config, plane.nodata, self.reader.readable(own))
        return (
            _brought(flags[0], ratio, window, own),
            _brought(flags[1], ratio, window, own),
        )


def _scaled_window(window: Window, ratio: Fraction, grid: Grid) -> Window:
    """The pixels of a mask, `ratio` times as long, that cover a window; inside the mask's grid."""
    top, left = int(window.top // ratio), int(window.left // ratio)
    bottom = min(grid.height, int(-(-(window.top + window.height) // ratio)))
    right = min(grid.width, int(-(-(window.left + window.width) // ratio)))
    return Window(top, left, bottom - top, right - left)


def _brought(flags: np.ndarray, ratio: Fraction, window: Window, own: Window) -> np.ndarray:
    """Flags of a mask's window `own` on the pixels of `window`."""
    if ratio >= 1:
        factor = int(ratio)
        fine = onto_finer(flags, factor, factor)
        top, left = window.top - own.top * factor, window.left - own.left * factor
        cut = fine[top : top + window.height, left : left + window.width]
    else:
        factor = int(1 / ratio)
        cut = onto_coarser(flags, factor, factor)[: window.height, : window.width]
    # A mask may end a fraction of a pixel before the scene does: unknown there, so not flagged.
    short = [(0, window.height - cut.shape[0]), (0, window.width - cut.shape[1])]
    return np.pad(cut, short)


def _window(grid: Grid, tile_px: int, rows: Span, cols: Span) -> Window:
    """The part of some tiles inside a grid."""
    top, left = rows[0] * tile_px, cols[0] * tile_px
    height = max(0, min(rows[1] * tile_px, grid.height) - top)
    width = max(0, min(cols[1] * tile_px, grid.width) - left)
    return Window(top, left, height, width)


def _cut(array: np.ndarray, row: int, col: int, size_px: int, beyond: int | bool) -> np.ndarray:
    """A tile of [..., y, x]; where the array ends before it, `beyond`."""
    top, left = row * size_px, col * size_px
    part = array[..., top : top + size_px, left : left + size_px]
    if part.shape[-2:] == (size_px, size_px):
        return part
    whole = np.full((*array.shape[:-2], size_px, size_px), beyond, array.dtype)
    whole[..., : part.shape[-2], : part.shape[-1]] = part
    return whole


def _planes(pixels: np.ndarray, bands: tuple[int, ...]) -> np.ndarray:
    """Some planes of [band, y, x]; not copied where they follow one another."""
    if bands and bands == tuple(range(bands[0], bands[-1] + 1)):
        return pixels[bands[0] : bands[-1] + 1]
    return pixels[list(bands)]


# Zero borders of the scenes read last, because each takes reading the whole scene.
_borders: OrderedDict[tuple[Asset, ...], BorderMask] = OrderedDict()


def _border(reader: _SetReader) -> BorderMask:
    """The zero border of a band set of a scene."""
    key = tuple(asset for asset, _, _ in reader.parts)
    if key not in _borders:
        height, width = reader.grid.height, reader.grid.width
        most = reader.source.access.max_block_bytes
        if height * width // 8 > most:
            raise SceneError(
                f"its zero border takes {height * width // 8} bytes ({height} x {width} px), more than "
                f"run.max_block_bytes {most}; raise that, or set modality.nodata instead of zero_border"
            )
        _borders[key] = find_border(reader.numbers, height, width, _border_rows(reader))
        while len(_borders) > 1 and sum(map(_mask_bytes, _borders.values())) > most:
            _borders.popitem(last=False)
    return _borders[key]


def _border_rows(reader: _SetReader) -> int:
    pixel = np.dtype(reader.band_set.dtype).itemsize * len(reader.band_set.bands) + _LABEL_BYTES
    return max(1, min(_BORDER_ROWS, _BORDER_BYTES // (pixel * reader.grid.width)))


def _mask_bytes(mask: BorderMask) -> int:
    return 0 if mask.bits is None else mask.bits.nbytes
