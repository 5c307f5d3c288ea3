"""Which scenes belong together: places, their timesteps, and the scene of every modality at each.

Pure. The first modality leads: its grids are the places, its dates the timesteps; the others are laid
beside it. Nothing is resampled or dropped silently: every scene ends up in a stack, refused (it
contradicts something) or skipped (nothing asks for it), with a reason.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.errors import ArchiveError
from pipeline.planning.existing import KnownPlace
from pipeline.planning.gridding import (
    boxes_overlap,
    corner_key,
    grid_key,
    lonlat_box,
    named_grid,
    ratio_between,
    scaled,
)
from pipeline.planning.timesteps import Timesteps, exact, nearest
from pipeline.scenes import Asset, Grid, Scene, own_name
from pipeline.settings.config import DataConfig

NAMED_PLACE = "grid"


@dataclass(frozen=True)
class Stack:
    """All scenes of one place, by timestep.

    `grid` is the leading grid: that of the first modality's finest bands. `datetimes` are in order; an
    undated place has one timestep, None. `scenes` holds per modality one scene or None (missing) per
    timestep; a static modality has a single entry that belongs to all of them.
    """

    name: str
    grid: Grid
    datetimes: tuple[str | None, ...]
    scenes: dict[str, Timesteps]

    def shape_tiles(self, tile_px: int) -> tuple[int, int]:
        """Rows and columns of tiles that cover the place."""
        return -(-self.grid.height // tile_px), -(-self.grid.width // tile_px)


@dataclass
class Sorting:
    """Where every scene went; filled while stacks are made."""

    stacks: list[Stack] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def make_stacks(
    config: DataConfig,
    scenes: dict[str, Sequence[Scene]],
    known: Mapping[str, KnownPlace] | None = None,
) -> Sorting:
    """Stacks, in the order of their names, of the scenes of every modality.

    Scenes at one of the `known` places of a store keep its name and grid. Ids must be unique over all
    modalities. Raises ArchiveError where two places have one name.
    """
    sorting = Sorting()
    lead = config.all_modalities()[0].name
    drafts = _Places(config, sorting, known or {}).of(scenes[lead])
    beside = {
        settings.name: _attach(config, settings.name, scenes[settings.name], drafts, sorting)
        for settings in config.all_modalities()[1:]
    }
    for index, draft in enumerate(drafts):
        others = {name: found[index] for name, found in beside.items()}
        sorting.stacks.append(_timed(config, lead, draft, others, sorting))
    sorting.stacks.sort(key=lambda stack: stack.name)
    names = [stack.name for stack in sorting.stacks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArchiveError(
            f"two places are called {twice!r}; give a pattern whose {{tile}} tells them apart"
        )
    _skip_unused(sorting, scenes)
    return sorting


@dataclass(frozen=True)
class _Draft:
    """A place with the scenes of the first modality, in order."""

    name: str
    grid: Grid
    scenes: list[Scene]


def finest(scene: Scene) -> Grid:
    """The grid of a scene's finest band."""
    return max(
        (asset.shown_grid for asset in scene.assets), key=lambda grid: grid.height * grid.width
    )


class _Places:
    """Groups the scenes of the first modality into places."""

    def __init__(
        self, config: DataConfig, sorting: Sorting, known: Mapping[str, KnownPlace]
    ) -> None:
        self.config, self.sorting = config, sorting
        self.named = named_grid(config.grid)
        self.known: dict[object, KnownPlace] = {}
        for place in known.values():
            self.known[NAMED_PLACE if self.named else ("place", place.name)] = place
            if place.grid.crs is not None:
                self.known["grid", *grid_key(place.grid)] = place

    def of(self, scenes: Sequence[Scene]) -> list[_Draft]:
        groups: dict[object, list[Scene]] = defaultdict(list)
        for scene in sorted(scenes, key=_chronological):
            groups[self._key(scene)].append(scene)
        drafts = []
        for key, members in groups.items():
            drafts.append(self._draft(members, self.known.get(key)))
        return [draft for draft in drafts if draft.scenes]

    def _key(self, scene: Scene) -> object:
        grid = finest(scene)
        if self.named is not None:
            return NAMED_PLACE
        if scene.place is not None:
            return ("place", scene.place)
        # Nothing says that undated or unreferenced scenes show the same ground at another time.
        if scene.datetime is None or grid.crs is None:
            return ("scene", scene.id)
        return ("grid", *grid_key(grid))

    def _draft(self, members: list[Scene], known: KnownPlace | None) -> _Draft:
        grid = known.grid if known else self.named or finest(members[0])
        name = NAMED_PLACE if self.named else members[0].place or self._own_name(members)
        name = known.name if known else name
        kept = []
        for scene in members:
            placed = self._onto(scene, grid, name)
            if placed is not None:
                kept.append(placed)
        if known is not None:
            kept = self._without_known(kept, known)
        kept = self._without_doubles(kept, name)
        return _Draft(name, grid, kept)

    def _without_known(self, scenes: list[Scene], known: KnownPlace) -> list[Scene]:
        """Scenes whose date the store has not got yet."""
        kept = []
        for scene in scenes:
            same = known.scenes.get(scene.datetime) or known.scenes.get(None)
            if same is not None:
                self.sorting.refused[scene.id] = (
                    f"has place {known.name} and date {scene.datetime} in common with {same}, which is in "
                    "the store; keep one of them"
                )
            elif scene.datetime is None and known.scenes:
                self.sorting.refused[scene.id] = (
                    f"has no date, and place {known.name} has {len(known.scenes) + 1} scenes; give "
                    "{date} in the pattern, or dates.tag or dates.csv"
                )
            else:
                kept.append(scene)
        return kept

    def _own_name(self, members: list[Scene]) -> str:
        """The first scene's file name below the modality's source; for a step of a cube, the cube's."""
        name = below_source(members[0], self.config)
        return name.partition("@")[0] if len(members) > 1 else name

    def _onto(self, scene: Scene, grid: Grid, name: str) -> Scene | None:
        """The scene on the place's grid, resampled if the configuration says so; None if refused."""
        if ratio_between(grid, finest(scene)) == 1:
            return scene
        if self.named is not None and _apart(finest(scene), self.named):
            self.sorting.skipped[scene.id] = f"does not overlap the named grid ({grid.in_words()})"
            return None
        if not self.config.grid.warp or finest(scene).crs is None or grid.crs is None:
            self.sorting.refused[scene.id] = _other_grid(finest(scene), name, grid)
            return None
        return warped(scene, grid, self.config.settings_of(scene.modality).config.resampling)

    def _without_doubles(self, scenes: list[Scene], name: str) -> list[Scene]:
        by_date: dict[str | None, list[Scene]] = defaultdict(list)
        for scene in scenes:
            by_date[scene.datetime].append(scene)
        undated = by_date[None]
        if len(undated) > 1 or (undated and len(by_date) > 1):
            for scene in undated:
                self.sorting.refused[scene.id] = (
                    f"has no date, and place {name} has {len(scenes)} scenes; give {{date}} in the "
                    "pattern, or dates.tag or dates.csv"
                )
            scenes = [scene for scene in scenes if scene.datetime is not None]
        return _refuse_doubles(scenes, name, self.sorting)


def _apart(one: Grid, other: Grid) -> bool:
    """Whether two grids surely share no ground."""
    box, target = lonlat_box(one), lonlat_box(other)
    return box is not None and target is not None and not boxes_overlap(box, target[None])[0]


def _refuse_doubles(scenes: list[Scene], place: str, sorting: Sorting) -> list[Scene]:
    """Without the scenes of one modality that have one place and one date: nothing says which is right."""
    by_date: dict[str | None, list[Scene]] = defaultdict(list)
    for scene in scenes:
        by_date[scene.datetime].append(scene)
    for when, members in by_date.items():
        for scene in members if len(members) > 1 else []:
            other = next(m for m in members if m is not scene)
            sorting.refused[scene.id] = (
                f"has place {place} and date {when} in common with {other.id}; keep one of them"
            )
    return [members[0] for members in by_date.values() if len(members) == 1]


def warped(scene: Scene, grid: Grid, resampling: str) -> Scene:
    """The scene resampled onto `grid`, its coarser bands onto the same grid at their own resolution."""
    own = finest(scene).height
    ratios = [round(own / asset.grid.height) for asset in scene.assets]
    assets = tuple(
        _warped_asset(asset, scaled(grid, ratio), resampling)  # type: ignore[arg-type]
        for asset, ratio in zip(scene.assets, ratios, strict=True)
    )
    mask = scene.mask and _warped_asset(scene.mask, grid, "nearest")
    return replace(scene, assets=assets, mask=mask)


def _warped_asset(asset: Asset, grid: Grid, resampling: str) -> Asset:
    if ratio_between(grid, asset.grid) == 1:
        return asset
    return replace(asset, warp_onto=grid, resampling=resampling)


def _attach(
    config: DataConfig,
    modality: str,
    scenes: Sequence[Scene],
    drafts: list[_Draft],
    sorting: Sorting,
) -> list[list[Scene]]:
    """The scenes of another modality that lie at each place, in order."""
    find = _Finder(config, drafts)
    found: list[list[Scene]] = [[] for _ in drafts]
    pairs = [
        (scene, place)
        for scene in sorted(scenes, key=_chronological)
        for place in find.places(scene)
    ]
    lies = {
        (scene.id, place): ratio_between(drafts[place].grid, finest(scene))
        for scene, place in pairs
    }
    # One resolution per modality: if any scene has to be resampled, all come onto the leading grid.
    resample = config.grid.warp and any(ratio is None for ratio in lies.values())
    how = config.settings_of(modality).config.resampling
    for scene, place in pairs:
        ratio, draft = lies[scene.id, place], drafts[place]
        if ratio == 1 or (ratio is not None and not resample):
            found[place].append(scene)
        elif resample and finest(scene).crs is not None and draft.grid.crs is not None:
            found[place].append(warped(scene, draft.grid, how))
        else:
            sorting.refused[scene.id] = _other_grid(finest(scene), draft.name, draft.grid)
    return found


class _Finder:
    """Finds the places a scene of another modality belongs to."""

    def __init__(self, config: DataConfig, drafts: list[_Draft]) -> None:
        self.warp = config.grid.warp
        self.config = config
        self.by_key: dict[object, list[int]] = defaultdict(list)
        for index, draft in enumerate(drafts):
            for key in self._keys(draft.scenes[0], draft.grid):
                self.by_key[key].append(index)
        boxes = [lonlat_box(draft.grid) for draft in drafts]
        self.placed = np.array([i for i, box in enumerate(boxes) if box is not None], np.int64)
        self.boxes = np.array([box for box in boxes if box is not None]).reshape(-1, 4)

    def places(self, scene: Scene) -> list[int]:
        """Indices of places: by name, by grid, by file name where nothing else is known, by overlap."""
        for key in self._keys(scene, finest(scene)):
            if key in self.by_key:
                return self.by_key[key]
        box = lonlat_box(finest(scene)) if scene.place is None else None
        if box is None:
            return []
        overlapping = self.placed[boxes_overlap(box, self.boxes)].tolist()
        # Without permission to resample, one of them is enough to say so.
        return overlapping if self.warp else overlapping[:1]

    def _keys(self, scene: Scene, grid: Grid) -> Iterable[object]:
        if scene.place is not None:
            return [("place", scene.place)]
        if grid.crs is not None:
            return [("corner", *corner_key(grid))]
        return [("name", below_source(scene, self.config))]


def below_source(scene: Scene, config: DataConfig) -> str:
    """A scene's own name without the folder its modality is in."""
    source = config.settings_of(scene.modality).config.source or ""
    return own_name(scene).removeprefix(f"{source.rstrip('/')}/")


def _timed(
    config: DataConfig, lead: str, draft: _Draft, others: dict[str, list[Scene]], sorting: Sorting
) -> Stack:
    """The stack of a place: its timesteps and what each modality has at them."""
    moving: dict[str, list[Scene]] = {}
    static: dict[str, Timesteps] = {}
    for name, found in others.items():
        if config.settings_of(name).config.static or draft.scenes[0].datetime is None:
            static[name] = _only_one(found, draft.name, sorting)
        else:
            moving[name] = _dated(found, draft.name, sorting)
    tolerance = config.pairing.tolerance_days
    own = [scene.datetime for scene in draft.scenes]
    if tolerance is not None:
        datetimes = own
        pair: Callable[[list[Scene]], Timesteps] = lambda found: nearest(own, found, tolerance)  # noqa: E731
    else:
        dates = {*own, *(s.datetime for found in moving.values() for s in found)}
        datetimes = sorted(dates, key=lambda d: d or "")
        pair = lambda found: exact(datetimes, found)  # noqa: E731
    timed = {
        lead: exact(datetimes, draft.scenes),
        **{n: pair(found) for n, found in moving.items()},
    }
    order = [settings.name for settings in config.all_modalities()]
    every = {**timed, **static}
    return Stack(draft.name, draft.grid, tuple(datetimes), {name: every[name] for name in order})


def _only_one(found: list[Scene], place: str, sorting: Sorting) -> Timesteps:
    if len(found) > 1:
        for scene in found:
            other = next(s for s in found if s is not scene)
            sorting.refused[scene.id] = (
                f"covers place {place} and so does {other.id}, but only one can; give their dates and "
                "those of the first modality, or keep one of them"
            )
        return (None,)
    return (found[0],) if found else (None,)


def _dated(found: list[Scene], place: str, sorting: Sorting) -> list[Scene]:
    for scene in found:
        if scene.datetime is None:
            sorting.refused[scene.id] = (
                f"has no date, but place {place} is a time series; give its date, or set static for "
                f"{scene.modality}"
            )
    return _refuse_doubles([s for s in found if s.datetime is not None], place, sorting)


def _skip_unused(sorting: Sorting, scenes: dict[str, Sequence[Scene]]) -> None:
    used = {
        scene.id
        for stack in sorting.stacks
        for timesteps in stack.scenes.values()
        for scene in timesteps
        if scene is not None
    }
    for found in scenes.values():
        for scene in found:
            if scene.id in used:
                sorting.refused.pop(scene.id, None)
            elif scene.id not in sorting.refused and scene.id not in sorting.skipped:
                sorting.skipped[scene.id] = (
                    "no scene of the first modality is there, or near enough in time"
                )


def _chronological(scene: Scene) -> tuple[str, str]:
    return (scene.datetime or "", scene.id)


def _other_grid(own: Grid, place: str, grid: Grid) -> str:
    known = own.crs is not None and grid.crs is not None
    advice = (
        "set grid.warp to resample it, or" if known else "it cannot be resampled without a CRS:"
    )
    return (
        f"lies on another grid ({own.in_words()}) than {place} ({grid.in_words()}); {advice} keep scenes "
        "of one grid"
    )
