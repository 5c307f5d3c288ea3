"""The plan of a job: which tiles exist, in which order, and which shard and slots each one has.

Pure: from scene headers and a configuration, without reading a pixel or touching the store. Every
frame's place is fixed before any work starts, so the bytes of a store cannot depend on scheduling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from pipeline.errors import ArchiveError
from pipeline.grid import BaseGrid
from pipeline.planning.bands import SetShape, set_shapes
from pipeline.planning.existing import Existing, Meaning
from pipeline.planning.stacks import Stack
from pipeline.scenes import Scene
from pipeline.scorers.config import ExternalConfig
from pipeline.settings.config import DataConfig, ModalitySettings
from pipeline.storage.layout import BandSet, StoreLayout

# `stack` indexes Plan.stacks; `row`, `col` count tiles from the place's top left.
TILE = np.dtype([("stack", np.int32), ("row", np.int32), ("col", np.int32)])
# `slot` counts frame slots of a modality, `tile` tiles of the plan, `timestep` the stack's datetimes
# (0 for static modalities), `scene` indexes ModalityPlan.scenes.
FRAME = np.dtype(
    [("slot", np.int64), ("tile", np.int64), ("timestep", np.int32), ("scene", np.int32)]
)
# Shards hold a multiple of this many frames, so that their partitions have a common chunk size.
SLOT_MULTIPLE = 16
# The uncompressed pixels of one shard, which a worker holds at once, stay below this.
SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ModalityPlan:
    """One modality of a plan. `scenes` are those that stacks use, in the order of their ids.

    `scale` and `offset` give numbers of the store their physical meaning; None where nothing is known.
    """

    settings: ModalitySettings
    layout: StoreLayout
    scenes: tuple[Scene, ...]
    scale: float | None
    offset: float | None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def scored_bands(self) -> tuple[int, ...]:
        """Indices into the first set's bands of those that are scored; none for scores from outside."""
        if self.settings.scoring is None or isinstance(self.settings.scoring, ExternalConfig):
            return ()
        bands = self.layout.bands
        return tuple(bands.index(b) for b in self.settings.scored_band_names() or bands)

    def configured_ranges(self) -> tuple[tuple[float, float], ...] | None:
        """The configured (low, high) of every band in the store's numbers, or None if to be estimated.

        The configuration speaks of numbers without an added offset; where the store has one, ranges move.
        Label rasters have no range.
        """
        config, bands = self.settings.config, self.layout.all_bands
        if self.settings.is_label:
            return ()
        given = config.value_ranges()
        if given is None:
            return None
        names = config.bands or bands
        pairs = dict(zip(names, given * len(names) if len(given) == 1 else given, strict=True))
        moved = 0.0
        if config.baseline is not None and self.offset is not None and self.scale:
            moved = float(round(((config.offset or 0.0) - self.offset) / self.scale))
        return tuple((low + moved, high + moved) for low, high in map(pairs.__getitem__, bands))

    def scene_index(self, scene: Scene) -> int:
        """Position in `scenes` of a scene of a stack."""
        return self._positions[id(scene)]

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {id(scene): index for index, scene in enumerate(self.scenes)}


@dataclass(frozen=True)
class Plan:
    """Tiles in storage order: `num_shards` shards from `first_shard` on, with `shard_tiles` in each."""

    config: DataConfig
    stacks: tuple[Stack, ...]
    tiles: np.ndarray
    num_shards: int
    shard_tiles: int
    modalities: dict[str, ModalityPlan]
    first_shard: int = 0

    @property
    def shards(self) -> range:
        """Numbers of the batch's shards."""
        return range(self.first_shard, self.first_shard + self.num_shards)

    @property
    def lead(self) -> ModalityPlan:
        """The modality whose grids and dates lead."""
        return next(iter(self.modalities.values()))

    def tile_range(self, shard: int) -> range:
        """The tiles of one shard."""
        first = (shard - self.first_shard) * self.shard_tiles
        return range(first, min(first + self.shard_tiles, len(self.tiles)))

    def frames(self, modality: str, tiles: range) -> np.ndarray:
        """FRAME rows of some tiles, in slot order. Missing timesteps have none."""
        steps = self._steps(modality)
        stacks = self.tiles["stack"][tiles.start : tiles.stop]
        number = steps.number[stacks]
        ends = np.cumsum(number)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - number, number)
        step = np.repeat(steps.first[stacks], number) + within
        frames = np.empty(len(step), FRAME)
        starts = self._frame_starts(modality)[tiles.start : tiles.stop]
        frames["slot"] = np.repeat(starts, number) + within
        frames["tile"] = np.repeat(np.arange(tiles.start, tiles.stop), number)
        frames["timestep"], frames["scene"] = steps.timestep[step], steps.scene[step]
        return frames

    def tile_id(self, tile: int) -> str:
        at = self.tiles[tile]
        return f"{self.stacks[at['stack']].name}/r{at['row']}c{at['col']}"

    def _frame_starts(self, modality: str) -> np.ndarray:
        """int64 [tile]: the first slot of every tile."""
        if modality not in self._starts:
            per_tile = self._steps(modality).number[self.tiles["stack"]]
            before = np.cumsum(per_tile) - per_tile
            shard = np.arange(len(self.tiles)) // self.shard_tiles
            first = before[:: self.shard_tiles][shard]
            capacity = self.modalities[modality].layout.shard_capacity
            self._starts[modality] = (self.first_shard + shard) * capacity + before - first
        return self._starts[modality]

    @cached_property
    def _starts(self) -> dict[str, np.ndarray]:
        return {}

    def _steps(self, modality: str) -> "_Steps":
        if modality not in self._steps_of:
            self._steps_of[modality] = _Steps.of(self.stacks, self.modalities[modality])
        return self._steps_of[modality]

    @cached_property
    def _steps_of(self) -> dict[str, "_Steps"]:
        return {}


@dataclass(frozen=True)
class _Steps:
    """The scenes one modality has at the timesteps of all stacks, stack after stack, as arrays.

    Those of a stack are entries `[first, first + number)` of `timestep` and `scene`, int32; missing ones
    have no entry. `scene` indexes ModalityPlan.scenes.
    """

    first: np.ndarray
    number: np.ndarray
    timestep: np.ndarray
    scene: np.ndarray

    @classmethod
    def of(cls, stacks: Sequence[Stack], modality: ModalityPlan) -> "_Steps":
        number = frames_per_stack(stacks, modality.name)
        present = [
            (timestep, modality.scene_index(scene))
            for stack in stacks
            for timestep, scene in enumerate(stack.scenes[modality.name])
            if scene is not None
        ]
        timestep, scene = np.array(present, np.int32).reshape(-1, 2).T
        return cls(np.cumsum(number) - number, number, timestep.copy(), scene.copy())


def make_plan(
    config: DataConfig,
    stacks: Sequence[Stack],
    meanings: Mapping[str, Meaning],
    existing: Existing | None = None,
) -> Plan:
    """Lay out all tiles of all stacks; `meanings` holds scale and offset by modality.

    On top of an existing store, shards come after its own and are as large. Raises ArchiveError where
    scenes of one modality differ in what one array needs to be.
    """
    existing = existing or Existing()
    scenes = {settings.name: _used(stacks, settings.name) for settings in config.all_modalities()}
    shapes = {
        settings.name: _shapes(config, settings, stacks, scenes[settings.name], existing)
        for settings in config.all_modalities()
    }
    tiles = _tiles(stacks, config.store.tile_size_px)
    per_tile = {name: frames_per_stack(stacks, name) for name in shapes}
    shard_tiles = _tiles_per_shard(config, len(tiles), shapes, per_tile, existing.layouts)
    num_shards = -(-len(tiles) // shard_tiles)
    modalities = {}
    for settings in config.all_modalities():
        name = settings.name
        frames = per_tile[name][tiles["stack"]]
        fullest = int(np.add.reduceat(frames, np.arange(0, len(tiles), shard_tiles)).max())
        known = existing.layouts.get(name)
        capacity = _capacity(fullest) if known is None else known.shard_capacity
        total = existing.first_shard + num_shards
        layout = _layout(config, settings, shapes[name], total, capacity)
        if known is not None:
            _check_alike(layout, known)
        modalities[name] = ModalityPlan(settings, layout, scenes[name], *meanings[name])
    return Plan(
        config, tuple(stacks), tiles, num_shards, shard_tiles, modalities, existing.first_shard
    )


def _shapes(
    config: DataConfig,
    settings: ModalitySettings,
    stacks: Sequence[Stack],
    scenes: Sequence[Scene],
    existing: Existing,
) -> list[SetShape]:
    """Band sets of the scenes; a modality without any new one keeps those the store has."""
    known = existing.layouts.get(settings.name)
    if known is None or scenes:
        return set_shapes(settings, config.store.tile_size_px, stacks, scenes)
    return [SetShape(s.name, s.bands, s.dtype, s.tile_size_px) for s in known.band_sets]


def _capacity(fullest: int) -> int:
    """Frame slots of a shard, for the fullest run of tiles."""
    return _rounded(max(1, fullest))


def _check_alike(layout: StoreLayout, known: StoreLayout) -> None:
    """Raise ArchiveError unless further scenes fit the arrays a store has."""
    for band_set, other in zip_longest(layout.band_sets, known.band_sets):
        if band_set != other:
            raise ArchiveError(
                f"the new scenes of modality {layout.modality} form {_in_words(band_set)}, but the store "
                f"holds {_in_words(other)}; preprocess them into a store of their own"
            )


def _in_words(band_set: BandSet | None) -> str:
    if band_set is None:
        return "no such band set"
    return f"{', '.join(band_set.bands)} as {band_set.dtype} in tiles of {band_set.tile_size_px} px"


def frames_per_stack(stacks: Sequence[Stack], modality: str) -> np.ndarray:
    """int64 [stack]: frames of a modality each of its tiles has room for."""
    numbers = [sum(s is not None for s in stack.scenes[modality]) for stack in stacks]
    return np.array(numbers, np.int64)


def tile_order(height: int, width: int, tile_px: int, block_shape: tuple[int, int]) -> np.ndarray:
    """int32 [tile, (row, col)]: every tile of a place once, grouped by the file's blocks.

    Groups are as large as a block, or one tile if that is larger, and come row by row. A shard, a
    contiguous run of tiles, then cuts through at most two groups and few blocks are decoded twice.
    """
    rows, cols = -(-height // tile_px), -(-width // tile_px)
    group_rows = max(1, block_shape[0] // tile_px)
    group_cols = max(1, block_shape[1] // tile_px)
    row, col = np.indices((rows, cols), dtype=np.int32).reshape(2, -1)
    order = np.lexsort((col, row, col // group_cols, row // group_rows))
    return np.stack([row[order], col[order]], axis=1)


def _used(stacks: Sequence[Stack], modality: str) -> tuple[Scene, ...]:
    """Scenes of the stacks, by id; one that is resampled onto several grids occurs once for each."""
    by_object = {
        id(scene): (scene.id, stack.name, scene)
        for stack in stacks
        for scene in stack.scenes[modality]
        if scene is not None
    }
    return tuple(scene for _, _, scene in sorted(by_object.values(), key=lambda used: used[:2]))


def _tiles(stacks: Sequence[Stack], tile_px: int) -> np.ndarray:
    """TILE rows of all stacks, stack after stack; those of places that are alike are made at once."""
    alike: dict[tuple[int, int, tuple[int, int]], list[int]] = {}
    for index, stack in enumerate(stacks):
        alike.setdefault(_extent(stack), []).append(index)
    orders = {key: tile_order(*key[:2], tile_px, key[2]) for key in alike}
    number = np.empty(len(stacks), np.int64)
    for key, members in alike.items():
        number[members] = len(orders[key])
    tiles = np.empty(int(number.sum()), TILE)
    tiles["stack"] = np.repeat(np.arange(len(stacks)), number)
    first = np.cumsum(number) - number
    for key, members in alike.items():
        own = first[members, None] + np.arange(len(orders[key]))
        tiles["row"][own], tiles["col"][own] = orders[key].T
    return tiles


def _extent(stack: Stack) -> tuple[int, int, tuple[int, int]]:
    """Height, width and the blocks of the leading file: what the order of a place's tiles follows from."""
    lead = next(scene for scene in next(iter(stack.scenes.values())) if scene is not None)
    block = max(lead.assets, key=lambda a: a.grid.height * a.grid.width).block_shape
    return stack.grid.height, stack.grid.width, block


def _tiles_per_shard(
    config: DataConfig,
    num_tiles: int,
    shapes: dict[str, list[SetShape]],
    per_tile: dict[str, np.ndarray],
    known: Mapping[str, StoreLayout],
) -> int:
    """Tiles per shard: as configured, fewer where memory or a store's slots ask for it, in equal runs."""
    tile_bytes = sum(
        per_tile[name] * sum(shape.frame_bytes for shape in of_set)
        for name, of_set in shapes.items()
    )
    most = max(1, min(config.store.shard_tiles, SHARD_BYTES // max(1, int(np.max(tile_bytes)))))
    for name, layout in known.items():
        frames = int(np.max(per_tile[name], initial=0))
        if frames > layout.shard_capacity:
            raise ArchiveError(
                f"tiles have {frames} new frames of modality {name}, but the store's shards have room for "
                f"{layout.shard_capacity}; append fewer dates at once"
            )
        most = min(most, layout.shard_capacity // max(1, frames))
    # Equal runs: 600 tiles at 512 per shard are 2 x 300, not 512 + 88.
    return _rounded(-(-num_tiles // -(-num_tiles // most)))


def _rounded(slots: int) -> int:
    return -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE if slots > SLOT_MULTIPLE else slots


def _layout(
    config: DataConfig,
    settings: ModalitySettings,
    shapes: list[SetShape],
    num_shards: int,
    capacity: int,
) -> StoreLayout:
    """Arrays of a modality; ArchiveError if its tiles hold no whole number of roots."""
    rule, tile_px = settings.partition, shapes[0].tile_size_px
    if settings.is_label:
        grid = BaseGrid(1, 1, tile_px, 1)
    elif tile_px % rule.root_size_px:
        raise ArchiveError(
            f"a tile of modality {settings.name} is {tile_px} px wide; it must be a multiple of the "
            f"largest patch, {rule.root_size_px} px: change store.tile_size_px "
            f"({config.store.tile_size_px}) or its partition"
        )
    else:
        cells = tile_px // rule.base_patch_size
        _check_budget(settings, tile_px)
        grid = BaseGrid(cells, cells, rule.base_patch_size, rule.num_scales)
    sets = tuple(
        BandSet("" if first else shape.name, shape.bands, shape.dtype, shape.tile_size_px)
        for first, shape in zip([True, *[False] * len(shapes)], shapes, strict=False)
    )
    return StoreLayout(
        modality=settings.name,
        band_sets=sets,
        grid=grid,
        num_shards=num_shards,
        shard_capacity=capacity,
        codec=config.store.codec,
        scored=settings.scoring is not None,
        tokenized=not settings.is_label,
    )


def _check_budget(settings: ModalitySettings, tile_px: int) -> None:
    rule = settings.partition
    budget = rule.tokens_per_tile
    least, most = ((tile_px // size) ** 2 for size in (rule.root_size_px, rule.base_patch_size))
    if budget is not None and not least <= budget <= most:
        raise ArchiveError(
            f"partition.tokens_per_tile of modality {settings.name} is {budget}, but a tile of {tile_px} "
            f"px has {least} patches of {rule.root_size_px} px to {most} of {rule.base_patch_size} px; "
            "give a number between them"
        )
