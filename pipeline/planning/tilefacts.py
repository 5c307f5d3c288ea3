"""What is known of every tile of a plan besides its frames: footprint, class label, split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import ArchiveError
from pipeline.locations import join
from pipeline.planning.footprints import many_footprints
from pipeline.planning.labels import scene_labels, vector_labels
from pipeline.planning.plan import Plan
from pipeline.planning.splits import assign_splits, given_splits, num_overlapping
from pipeline.planning.stacks import Stack
from pipeline.scenes import Access, Scene, own_name
from pipeline.settings.config import DataConfig
from pipeline.sources.tables import read_table


@dataclass(frozen=True)
class TileFacts:
    """Per tile: footprint as WKB in longitude and latitude, label and split; None where there is none.

    `bounds` float64 [tile, (xmin, ymin, xmax, ymax)] are in the CRS, NaN where there is none. `notes` are
    remarks for people.
    """

    geometry: Sequence[bytes | None]
    bounds: np.ndarray
    labels: Sequence[str | None]
    splits: Sequence[str | None]
    notes: tuple[str, ...] = ()

    def select(self, tiles: np.ndarray) -> "TileFacts":
        """The same for some of the tiles."""
        chosen = tiles.tolist()
        return TileFacts(
            geometry=[self.geometry[tile] for tile in chosen],
            bounds=self.bounds[tiles],
            labels=[self.labels[tile] for tile in chosen],
            splits=[self.splits[tile] for tile in chosen],
            notes=self.notes,
        )


def tile_facts(plan: Plan, root: str, access: Access) -> TileFacts:
    """Facts of all tiles of a plan; tables and vectors lie below `root`.

    Raises ArchiveError or ConfigError where labels or splits cannot be given as configured.
    """
    config = plan.config
    check_located(config, plan.stacks)
    grids = [stack.grid for stack in plan.stacks]
    at = plan.tiles
    found = many_footprints(grids, at["stack"], at["row"], at["col"], config.store.tile_size_px)
    known = np.isfinite(found.bounds).all(axis=1, keepdims=True)
    bounds = np.where(known, found.bounds, np.nan)
    stack_of = plan.tiles["stack"].tolist()
    places = [plan.stacks[stack].name for stack in stack_of]
    located = found.lonlat_box if any(grid.crs is not None for grid in grids) else None
    given = stack_splits(config, plan.stacks, root, access)
    splits = assign_splits(config.splits, located, places, [given[stack] for stack in stack_of])
    labels, notes = _labels(plan, root, access, found.geometry)
    leaking = num_overlapping(found.geometry, splits) if config.splits is not None else 0
    if leaking:
        notes += (
            f"{leaking} tiles share ground with a tile of another split: splits.by {config.splits.by} "  # type: ignore[union-attr]
            "does not look at where tiles are",
        )
    return TileFacts(found.geometry, bounds, labels, splits, notes)


def check_located(config: DataConfig, stacks: Sequence[Stack]) -> None:
    """Raise ArchiveError for labels or splits by ground where a place has no CRS."""
    without = next((stack.name for stack in stacks if stack.grid.crs is None), None)
    if without is None:
        return
    if config.splits is not None and config.splits.by == "blocks":
        raise ArchiveError(
            f"{without} has no CRS, so its tiles lie in no block; give splits.by place, or scenes with "
            "a CRS"
        )
    if config.labels is not None and config.labels.vector is not None:
        raise ArchiveError(
            f"{without} has no CRS, so labels.vector cannot be laid over it; give labels.csv or folder"
        )


def stack_splits(
    config: DataConfig, stacks: Sequence[Stack], root: str, access: Access
) -> list[str | None]:
    """The split that names or a table give each place; None where nothing says."""
    splits = config.splits
    if splits is None or splits.by not in ("csv", "pattern"):
        return [None] * len(stacks)
    table = None
    if splits.csv is not None:
        table = read_table(join(root, splits.csv), ("scene", "split"), access)
    return given_splits([_own_scenes(stack) for stack in stacks], table)


def _labels(
    plan: Plan, root: str, access: Access, geometry: Sequence[bytes | None]
) -> tuple[list[str | None], tuple[str, ...]]:
    config = plan.config.labels
    if config is not None and config.vector is not None:
        found = vector_labels(config, join(root, config.vector), access, geometry)
        note = f"{found.num_ambiguous} tiles have several classes, so they have no label"
        return found.labels, (note,) if found.num_ambiguous else ()
    table = None
    if config is not None and config.csv is not None:
        table = read_table(join(root, config.csv), ("scene", config.column), access)
    scenes = [_own_scenes(stack) for stack in plan.stacks]
    by_scene = scene_labels(config, [scene for own in scenes for scene in own], table)
    by_stack: list[str | None] = []
    ambiguous = []
    for stack, own in zip(plan.stacks, scenes, strict=True):
        classes = {by_scene[scene.id] for scene in own if scene.id in by_scene}
        by_stack.append(classes.pop() if len(classes) == 1 else None)
        if len(classes) > 1:
            ambiguous.append(stack.name)
    note = f"{len(ambiguous)} places have scenes of several classes, so they have no label"
    labels = [by_stack[stack] for stack in plan.tiles["stack"].tolist()]
    return labels, (note,) if ambiguous else ()


def _own_scenes(stack: Stack) -> list[Scene]:
    """All scenes of a place under the names that tables use, without the modality."""
    every = [scene for steps in stack.scenes.values() for scene in steps if scene is not None]
    named = {own_name(scene): replace(scene, id=own_name(scene)) for scene in every}
    return list(named.values())
