"""Tiles made in memory, each with a slow, obvious description of its quadtree beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from model.batch import TokenBatch
from model.config import BandSetConfig, EncoderConfig, ModalityConfig
from model.encoder import APTEncoder
from model.packing import BandSetArrays, FrameArrays, TileArrays, pack
from pipeline.grid import BaseGrid
from pipeline.segments import MISSING_BIT
from pipeline.storage.tiles import Frames

NUM_BANDS = 3
HIGHEST = 1000


@dataclass(frozen=True)
class Leaf:
    """A square of `2**scale` base cells a side; `y`, `x` is its top-left cell."""

    y: int
    x: int
    scale: int
    missing: bool = False

    def children(self) -> list["Leaf"]:
        half = 2 ** (self.scale - 1)
        return [
            Leaf(self.y + dy, self.x + dx, self.scale - 1) for dy in (0, half) for dx in (0, half)
        ]

    def cells(self) -> list[tuple[int, int]]:
        """(y, x) of the base cells, quarter by quarter: TL, TR, BL, BR."""
        if self.scale == 0:
            return [(self.y, self.x)]
        return [cell for child in self.children() for cell in child.cells()]

    def window(self, p: int) -> tuple[slice, slice]:
        """The leaf's pixels of an image [..., y, x]."""
        side = 2**self.scale * p
        return (
            slice(self.y * p, self.y * p + side),
            slice(self.x * p, self.x * p + side),
        )


def roots(grid: BaseGrid) -> list[Leaf]:
    side = grid.root_cells
    return [
        Leaf(y, x, grid.num_scales - 1)
        for y in range(0, grid.rows, side)
        for x in range(0, grid.cols, side)
    ]


@dataclass(frozen=True)
class Tiles:
    """Frames of some tiles, and the leaves of every frame as squares."""

    made_from: str
    grid: BaseGrid
    frames_per_tile: np.ndarray
    frames: Frames
    leaves: list[list[Leaf]]

    def __repr__(self) -> str:
        return f"Tiles({self.made_from})"

    @property
    def num_tiles(self) -> int:
        return len(self.frames_per_tile)

    @property
    def tile_and_timestep(self) -> list[tuple[int, int]]:
        """Of every frame."""
        return [(tile, t) for tile, n in enumerate(self.frames_per_tile) for t in range(n)]

    def present(self) -> list[tuple[int, Leaf]]:
        """(frame, leaf) of every token, in token order."""
        return [
            (f, leaf) for f, leaves in enumerate(self.leaves) for leaf in leaves if not leaf.missing
        ]

    def merging_order(self) -> list[tuple[int, Leaf]]:
        """(frame, leaf) of every token, scale by scale."""
        return sorted(self.present(), key=lambda token: token[1].scale)

    def rows(self) -> list[tuple[int, int, int]]:
        """(frame, y, x) of every base cell below a token, in merging order."""
        return [(f, y, x) for f, leaf in self.merging_order() for y, x in leaf.cells()]

    def pack(self) -> TokenBatch:
        return pack(TileArrays(np.arange(self.num_tiles), [self.arrays()]))

    def arrays(self) -> FrameArrays:
        """The frames as they are read from a store, of modality "image"."""
        frames, owner = self.frames, np.array(self.tile_and_timestep, np.int64).reshape(-1, 2)
        present = np.ones(frames.pixels.shape[:2], np.bool_)
        bands = tuple(f"B{band}" for band in range(present.shape[1]))
        return FrameArrays(
            name="image",
            grid=self.grid,
            band_sets=[BandSetArrays("", bands, frames.pixels, frames.valid, present)],
            scales=np.concatenate([np.empty(0, np.uint8), *frames.scales]),
            counts=np.array([len(scales) for scales in frames.scales], np.int64),
            tile=owner[:, 0].copy(),
            timestep=owner[:, 1].copy(),
            timestamps=np.full((len(owner), 3), -1, np.int32),
        )

    def select(self, tiles: Sequence[int]) -> Self:
        """The same tiles in another order, or some of them."""
        chosen = [
            f
            for tile in tiles
            for f, (owner, _) in enumerate(self.tile_and_timestep)
            if owner == tile
        ]
        frames = Frames(
            self.frames.pixels[chosen],
            self.frames.valid[chosen],
            [self.frames.scales[f] for f in chosen],
        )
        return replace(
            self,
            frames_per_tile=self.frames_per_tile[list(tiles)],
            frames=frames,
            leaves=[self.leaves[f] for f in chosen],
        )

    def with_pixels(self, pixels: np.ndarray) -> Self:
        return replace(self, frames=replace(self.frames, pixels=pixels))

    def with_leaves(self, leaves: list[list[Leaf]]) -> Self:
        scales = [_scales(of_frame) for of_frame in leaves]
        return replace(self, leaves=leaves, frames=replace(self.frames, scales=scales))


def _scales(leaves: list[Leaf]) -> np.ndarray:
    return np.array(
        [leaf.scale | (MISSING_BIT if leaf.missing else 0) for leaf in leaves], np.uint8
    )


def _quadtree(
    rng: np.random.Generator, node: Leaf, split_share: float, missing_share: float
) -> list[Leaf]:
    if node.scale and rng.random() < split_share:
        return [
            leaf
            for child in node.children()
            for leaf in _quadtree(rng, child, split_share, missing_share)
        ]
    return [replace(node, missing=bool(rng.random() < missing_share))]


def _valid(rng: np.random.Generator, grid: BaseGrid, leaves: list[Leaf]) -> np.ndarray:
    """Some pixels invalid; none valid in a missing leaf, at least one in any other."""
    valid = rng.random(grid.shape_px) < 0.7
    for leaf in leaves:
        window = leaf.window(grid.base_patch_size)
        valid[window] &= not leaf.missing
        if not leaf.missing and not valid[window].any():
            valid[window] = True
    return valid


def build_tiles(
    seed: int = 0,
    tiles: Sequence[tuple[int, float]] = ((2, 0.2), (1, 0.2), (3, 0.2)),
    num_roots: tuple[int, int] = (2, 1),
    base_patch_size: int = 2,
    num_scales: int = 3,
    split_share: float = 0.6,
) -> Tiles:
    """Random tiles; `tiles` gives the number of frames and the share of missing leaves of each."""
    rng = np.random.default_rng(seed)
    side = 2 ** (num_scales - 1)
    grid = BaseGrid(num_roots[0] * side, num_roots[1] * side, base_patch_size, num_scales)
    leaves = [
        [leaf for root in roots(grid) for leaf in _quadtree(rng, root, split_share, missing)]
        for num_frames, missing in tiles
        for _ in range(num_frames)
    ]
    shape = (len(leaves), NUM_BANDS, *grid.shape_px)
    return Tiles(
        made_from=f"{seed=}, {tiles=}, {num_roots=}, {base_patch_size=}, {num_scales=}, {split_share=}",
        grid=grid,
        frames_per_tile=np.array([num_frames for num_frames, _ in tiles]),
        frames=Frames(
            rng.integers(0, HIGHEST, shape, np.uint16),
            np.array([_valid(rng, grid, of_frame) for of_frame in leaves], bool).reshape(
                len(leaves), *grid.shape_px
            ),
            [_scales(of_frame) for of_frame in leaves],
        ),
        leaves=leaves,
    )


@dataclass(frozen=True)
class Layer:
    """A modality of a scene: its tiles, further band sets of them, and the date of every frame.

    `more` maps names of band sets to (pixels [F, C, y, x], valid [F, y, x]). `timestamps` int32 [F, 3].
    """

    name: str
    tiles: Tiles
    more: dict[str, tuple[np.ndarray, np.ndarray]]
    timestamps: np.ndarray

    def arrays(self) -> FrameArrays:
        first = self.tiles.arrays()
        further = [
            BandSetArrays(
                name,
                tuple(f"C{band}" for band in range(pixels.shape[1])),
                pixels,
                valid,
                np.ones(pixels.shape[:2], np.bool_),
            )
            for name, (pixels, valid) in self.more.items()
        ]
        return replace(
            first,
            name=self.name,
            band_sets=[*first.band_sets, *further],
            timestamps=self.timestamps,
            static=self.name == "dem",
        )

    def select(self, tiles: Sequence[int]) -> Self:
        owners = [tile for tile, _ in self.tiles.tile_and_timestep]
        kept = [f for tile in tiles for f, owner in enumerate(owners) if owner == tile]
        return replace(
            self,
            tiles=self.tiles.select(tiles),
            more={name: (p[kept], v[kept]) for name, (p, v) in self.more.items()},
            timestamps=self.timestamps[kept],
        )

    def without(self, frames: set[int]) -> Self:
        """All leaves of some frames missing; their pixels stay."""
        leaves = [
            [replace(leaf, missing=leaf.missing or f in frames) for leaf in of_frame]
            for f, of_frame in enumerate(self.tiles.leaves)
        ]
        return replace(self, tiles=self.tiles.with_leaves(leaves))


@dataclass(frozen=True)
class Scene:
    """Tiles of several modalities, pixels as float32.

    - "s2": 8 x 8 cells of 2 px at 10 m, three scales, of the first band set (3 bands) and of "20m"
      (2 bands, whose cells have 1 px); as many dates as a tile has;
    - "s1": the same ground at 20 m, 4 x 4 cells of 2 px, two scales; other dates;
    - "dem": static, 2 x 2 cells of 3 px at about 26.7 m, one scale.
    """

    made_from: str
    layers: tuple[Layer, ...]

    def __repr__(self) -> str:
        return f"Scene({self.made_from})"

    @property
    def num_tiles(self) -> int:
        return self.layers[0].tiles.num_tiles

    def pack(self) -> TokenBatch:
        arrays = [layer.arrays() for layer in self.layers]
        return pack(TileArrays(np.arange(self.num_tiles), arrays))

    def select(self, tiles: Sequence[int]) -> Self:
        return replace(self, layers=tuple(layer.select(tiles) for layer in self.layers))

    def with_layer(self, name: str, change: Callable[[Layer], Layer]) -> Self:
        return replace(
            self, layers=tuple(change(la) if la.name == name else la for la in self.layers)
        )

    def only(self, *names: str) -> Self:
        """The modalities of these names, in this order."""
        by_name = {layer.name: layer for layer in self.layers}
        return replace(self, layers=tuple(by_name[name] for name in names))


# (frames of s2, of s1, of dem; share of missing leaves) of every tile.
SceneTile = tuple[int, int, int, float]
SCENE_TILES: tuple[SceneTile, ...] = (
    (2, 1, 1, 0.2),
    (0, 0, 0, 0.0),
    (1, 0, 1, 0.2),
    (3, 2, 0, 0.2),
)


def build_scene(
    seed: int = 0, tiles: Sequence[SceneTile] = SCENE_TILES, split_share: float = 0.5
) -> Scene:
    """Random tiles of three modalities; some lack a modality, one has no frame at all."""
    rng = np.random.default_rng(seed)
    shapes = {
        "s2": ((2, 2), 2, 3), "s1": ((2, 2), 2, 2), "dem": ((2, 2), 3, 1),
    }  # fmt: skip
    layers = []
    for i, (name, (num_roots, px, num_scales)) in enumerate(shapes.items()):
        made = build_tiles(
            seed=int(rng.integers(2**32)),
            tiles=[(tile[i], tile[3]) for tile in tiles],
            num_roots=num_roots,
            base_patch_size=px,
            num_scales=num_scales,
            split_share=split_share,
        )
        made = made.with_pixels(made.frames.pixels.astype(np.float32))
        frames = len(made.leaves)
        more = {"20m": _coarser(rng, made)} if name == "s2" else {}
        stamps = rng.integers((1, 0, 2017), (29, 12, 2025), (frames, 3)).astype(np.int32)
        if name == "dem":
            stamps[:] = -1
        layers.append(Layer(name, made, more, stamps))
    return Scene(f"{seed=}, {tiles=}, {split_share=}", tuple(layers))


def _coarser(rng: np.random.Generator, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Two bands at half the resolution, valid in about four pixels of five."""
    frames, (height, width) = len(tiles.leaves), tiles.grid.shape_px
    shape = (frames, 2, height // 2, width // 2)
    valid = rng.random((frames, *shape[2:])) < 0.8
    return rng.integers(0, HIGHEST, shape).astype(np.float32), valid


def change_group(batch: TokenBatch, m: int, b: int, **changes: torch.Tensor) -> TokenBatch:
    """A batch with other `pixels`, `valid` or `band_present` of one band set of one modality."""
    frames = batch.modalities[m]
    sets = [replace(s, **changes) if i == b else s for i, s in enumerate(frames.band_sets)]
    changed = replace(frames, band_sets=tuple(sets))
    return replace(
        batch,
        modalities=tuple(changed if i == m else f for i, f in enumerate(batch.modalities)),
    )


@dataclass(frozen=True)
class Groups:
    """Modalities "m0", "m1", ... of the same tiles, each with quadtrees and band sets of its own."""

    modalities: list[Tiles]
    band_sets: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Groups({self.modalities}, band_sets={self.band_sets})"

    @property
    def num_tiles(self) -> int:
        return self.modalities[0].num_tiles

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """(modality, band set) of every group."""
        return [(m, b) for m, sets in enumerate(self.band_sets) for b in range(sets)]

    def tokens(self) -> list[tuple[int, int, int, Leaf]]:
        """(modality, band set, frame, leaf) of every token, in the batch's order."""
        return [
            (m, b, f, leaf)
            for tile in range(self.num_tiles)
            for m, b in self.numbers
            for f, leaf in self.modalities[m].present()
            if self.modalities[m].tile_and_timestep[f][0] == tile
        ]

    def pack(self) -> TokenBatch:
        return pack(
            TileArrays(
                np.arange(self.num_tiles), list(map(self._arrays, range(len(self.modalities))))
            )
        )

    def _arrays(self, modality: int) -> FrameArrays:
        arrays = self.modalities[modality].arrays()
        (first,) = arrays.band_sets
        return replace(
            arrays,
            name=f"m{modality}",
            band_sets=[
                replace(first, name=f"set{b}" if b else "", pixels=first.pixels + np.uint16(b))
                for b in range(self.band_sets[modality])
            ],
        )


def build_groups(seed: int, num_tiles: int, modalities: Sequence[tuple[int, int, int]]) -> Groups:
    """Random groups; `modalities` gives (scales, band sets, most frames of a tile) of each.

    A tile may have no frame of a modality, and frames no token.
    """
    rng = np.random.default_rng(seed)
    return Groups(
        [
            build_tiles(
                seed=seed + number,
                tiles=[
                    (int(rng.integers(0, frames + 1)), float(rng.choice([0.0, 0.3, 1.0])))
                    for _ in range(num_tiles)
                ],
                num_roots=(1, 2) if num_scales < 3 else (1, 1),
                num_scales=num_scales,
                split_share=float(rng.choice([0.0, 0.5, 0.5, 1.0])),
            )
            for number, (num_scales, _, frames) in enumerate(modalities)
        ],
        tuple(band_sets for _, band_sets, _ in modalities),
    )


def change_pixels(batch: TokenBatch, **changes: torch.Tensor) -> TokenBatch:
    """A batch of one modality and band set with other `pixels`, `valid` or `band_present`."""
    (frames,) = batch.modalities
    (band_set,) = frames.band_sets
    changed = replace(frames, band_sets=(replace(band_set, **changes),))
    return replace(batch, modalities=(changed,))


def build_encoder(kernel_px: int = 2, seed: int = 0, **options: Any) -> APTEncoder:
    """A small encoder of modality "image", whose every weight has moved away from its initial value."""
    torch.manual_seed(seed)
    band_set = BandSetConfig(
        bands=tuple(f"B{band}" for band in range(NUM_BANDS)),
        value_range=((0.0, HIGHEST),) * NUM_BANDS,
    )
    config = EncoderConfig(
        **{"width": 64, "depth": 2, "kernel_px": kernel_px, **options},
        modalities=(ModalityConfig(name="image", band_sets=(band_set,)),),
    )
    return moved(APTEncoder(config))


def moved(encoder: APTEncoder) -> APTEncoder:
    """The encoder with every weight moved away from its initial value."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def _band_set(name: str, bands: Sequence[str]) -> BandSetConfig:
    return BandSetConfig(name=name, bands=tuple(bands), value_range=((0.0, HIGHEST),) * len(bands))


def scene_config(**options: Any) -> EncoderConfig:
    """For the modalities of `Scene`."""
    first = _band_set("", [f"B{band}" for band in range(NUM_BANDS)])
    return EncoderConfig(
        **{"width": 64, "depth": 2, "kernel_px": 4, **options},
        modalities=(
            ModalityConfig(
                name="s2",
                band_sets=(first, _band_set("20m", ("C0", "C1"))),
                ground_sample_distance_m=10,
            ),
            ModalityConfig(name="s1", band_sets=(first,), ground_sample_distance_m=20),
            ModalityConfig(name="dem", band_sets=(first,), ground_sample_distance_m=160 / 6),
        ),
    )


def build_scene_encoder(seed: int = 0, **options: Any) -> APTEncoder:
    """A small encoder of the modalities of `Scene`, every weight moved."""
    torch.manual_seed(seed)
    return moved(APTEncoder(scene_config(**options)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On arrays this small, threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Session-wide, so that hypothesis may use them: each is a function or a strategy, never a state.


@pytest.fixture(scope="session")
def make_tiles() -> Callable[..., Tiles]:
    return build_tiles


@pytest.fixture(scope="session")
def with_pixels() -> Callable[..., TokenBatch]:
    return change_pixels


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., APTEncoder]:
    return build_encoder


@pytest.fixture(scope="session")
def roots_of() -> Callable[[BaseGrid], list[Leaf]]:
    return roots


@pytest.fixture(scope="session")
def tilesets() -> st.SearchStrategy[Tiles]:
    """Up to three tiles of up to three frames each; some have no token at all."""
    tile = st.tuples(st.integers(1, 3), st.sampled_from([0.0, 0.3, 1.0]))
    return st.builds(
        build_tiles,
        seed=st.integers(0, 2**32 - 1),
        tiles=st.lists(tile, min_size=1, max_size=3),
        num_roots=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        base_patch_size=st.sampled_from([1, 2, 3]),
        num_scales=st.integers(1, 3),
        split_share=st.sampled_from([0.0, 0.6, 1.0]),
    )


@pytest.fixture(scope="session")
def make_scene() -> Callable[..., Scene]:
    return build_scene


@pytest.fixture(scope="session")
def make_scene_encoder() -> Callable[..., APTEncoder]:
    return build_scene_encoder


@pytest.fixture(scope="session")
def make_scene_config() -> Callable[..., EncoderConfig]:
    return scene_config


@pytest.fixture(scope="session")
def with_group() -> Callable[..., TokenBatch]:
    return change_group


@pytest.fixture(scope="session")
def scenes() -> st.SearchStrategy[Scene]:
    """Up to three tiles of three modalities, each with few frames or none."""
    tile = st.tuples(
        st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, 0.3, 1.0])
    )
    return st.builds(
        build_scene,
        seed=st.integers(0, 2**32 - 1),
        tiles=st.lists(tile, min_size=1, max_size=3),
        split_share=st.sampled_from([0.0, 0.5, 1.0]),
    )


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., Groups]:
    return build_groups


@pytest.fixture(scope="session")
def groupsets() -> st.SearchStrategy[Groups]:
    """Up to three modalities of one to four scales, in one or two band sets, each maybe absent."""
    return st.builds(
        build_groups,
        seed=st.integers(0, 2**31),
        num_tiles=st.integers(1, 3),
        modalities=st.lists(
            st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 2)),
            min_size=1,
            max_size=3,
        ),
    )
