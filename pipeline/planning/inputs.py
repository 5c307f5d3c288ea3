"""From an archive and a configuration to a plan: list the scenes, sort them out, lay out the tiles.

Headers only: no pixel is read and nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pipeline.errors import ArchiveError, SceneError
from pipeline.locations import is_url
from pipeline.planning.bands import conform, with_nodata
from pipeline.planning.existing import Existing
from pipeline.planning.harmonize import harmonize
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.stacks import Stack, make_stacks
from pipeline.planning.tilefacts import TileFacts, check_located, tile_facts
from pipeline.readers.external import check_scores, score_files
from pipeline.scenes import Access, Listing, Scene
from pipeline.settings.config import DataConfig, ModalitySettings, PreprocessConfig
from pipeline.sources import archive_access, list_scenes, source_files
from pipeline.storage.header import read_header
from pipeline.storage.objects import objects_at


@dataclass(frozen=True)
class Job:
    """A planned job: what will be made of which inputs.

    `inputs` are the ids of all scenes by modality. `refused` and `skipped` hold reasons by scene id,
    `notes` what was decided and why. `files` are fingerprints by modality and name; `scene_files` are those
    names of them whose scenes the existing store has.
    """

    archive: str
    access: Access
    plan: Plan
    existing: Existing
    inputs: dict[str, tuple[str, ...]]
    refused: dict[str, str]
    skipped: dict[str, str]
    notes: tuple[str, ...]
    files: dict[tuple[str, str], str]
    scene_files: frozenset[str]
    config: PreprocessConfig

    @property
    def num_inputs(self) -> int:
        return sum(len(ids) for ids in self.inputs.values())

    @cached_property
    def facts(self) -> TileFacts:
        """Footprint, label and split of every tile of the plan."""
        return tile_facts(self.plan, self.access.roots[0], self.access)


def plan_job(
    archive: str,
    config: PreprocessConfig,
    existing: Existing | None = None,
    only: frozenset[str] | None = None,
) -> Job:
    """Find the scenes, check their headers, lay out the tiles; nothing is written.

    On top of an existing store, only scenes it has not got are inputs; `only` names those of a batch that
    was planned before. Raises ArchiveError where no scene is left or the scenes contradict each other.
    """
    _refuse_store(archive)
    existing = existing or Existing()
    access, data = archive_access(archive, config.run), config.data()
    found = _Found(existing.inputs)
    scenes: dict[str, Sequence[Scene]] = {}
    offsets = {}
    scene_files: set[str] = set()
    for settings in data.all_modalities():
        listing = _unique(list_scenes(archive, settings.config, access), settings, data)
        scene_files |= _files_of(listing, existing, access)
        listing = _new(listing, settings, existing, only)
        found.take(settings.name, listing, score_files(settings))
        listed = with_nodata(listing.scenes, settings.config.nodata)
        accepted = found.without(conform(settings, listed))
        accepted = found.without(_with_scores(accepted, settings, access))
        harmonized = harmonize(accepted, settings.config, existing.meanings.get(settings.name))
        found.notes += [f"{settings.name}: {note}" for note in harmonized.notes]
        found.refused |= harmonized.refused
        scenes[settings.name] = harmonized.scenes
        offsets[settings.name] = harmonized.scale, harmonized.offset
    stacks = _stacked(archive, data, scenes, existing, found)
    plan = make_plan(data, stacks, offsets, existing)
    job = Job(
        archive=archive,
        access=access,
        plan=plan,
        existing=existing,
        inputs={name: tuple(sorted(ids)) for name, ids in found.ids.items()},
        refused=_without(found.refused, existing.inputs),
        skipped=_without(found.skipped, existing.inputs),
        notes=tuple(found.notes),
        files=found.files,
        scene_files=frozenset(scene_files),
        config=config,
    )
    if data.labels is not None or data.splits is not None:
        # What cannot be labelled or split is better known now than after the last shard.
        _ = job.facts
    return job


def _stacked(
    archive: str,
    data: DataConfig,
    scenes: dict[str, Sequence[Scene]],
    existing: Existing,
    found: "_Found",
) -> list[Stack]:
    """The places of a batch with their scenes; what is left out of them is noted in `found`."""
    if existing.layouts:
        found.require_new(archive)
    found.require(archive, scenes)
    sorting = make_stacks(data, scenes, existing.places)
    found.refused |= sorting.refused
    found.skipped |= sorting.skipped
    if not sorting.stacks:
        found.require(archive, dict.fromkeys(scenes, ()))
    if not existing.layouts:
        found.require_beside(sorting.stacks)
    _refuse_static_series(data, sorting.stacks)
    check_located(data, sorting.stacks)
    return [_without_known_static(data, stack, existing) for stack in sorting.stacks]


def archive_files(archive: str, config: PreprocessConfig) -> dict[tuple[str, str], str]:
    """`Job.files` of the archive as it is now, without opening any raster."""
    access = archive_access(archive, config.run)
    return {
        (settings.name, name): fingerprint
        for settings in config.data().all_modalities()
        for name, fingerprint in {
            **source_files(archive, settings.config, access),
            **score_files(settings),
        }.items()
    }


class NothingNewError(ArchiveError):
    """There is nothing to append."""


@dataclass
class _Found:
    """What the listings of all modalities come to; `known` are ids the store has already."""

    known: frozenset[str] = frozenset()
    ids: dict[str, set[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[tuple[str, str], str] = field(default_factory=dict)

    def take(self, modality: str, listing: Listing, scores: dict[str, str]) -> None:
        own = [scene.id for scene in listing.scenes]
        self.ids[modality] = {*own, *listing.refused, *listing.skipped} - self.known
        self.refused |= listing.refused
        self.skipped |= listing.skipped
        self.notes += [f"{modality}: {note}" for note in listing.notes]
        self.files |= {(modality, name): f for name, f in {**listing.files, **scores}.items()}

    def without(self, outcome: tuple[list[Scene], dict[str, str]]) -> list[Scene]:
        accepted, refused = outcome
        self.refused |= refused
        return accepted

    def require(self, archive: str, scenes: dict[str, Sequence[Scene]]) -> None:
        """Raise ArchiveError if the leading modality has no usable scene."""
        lead = next(iter(scenes))
        if not scenes[lead]:
            require_scenes(archive, len(self.ids[lead]), 0, self.reasons(lead))

    def require_new(self, archive: str) -> None:
        """Raise NothingNewError without any input, ArchiveError if only the leading modality has none."""
        lead, *others = self.ids
        beside = next((name for name in others if self.ids[name]), None)
        if not self.ids[lead] and beside is None:
            raise NothingNewError(f"{archive}: the store has all of its scenes")
        if not self.ids[lead]:
            raise ArchiveError(
                f"{archive}: {len(self.ids[beside or lead])} scenes of modality {beside} are new, but none "
                f"of modality {lead}, whose places and dates lead; append them together"
            )

    def require_beside(self, stacks: Sequence[Stack]) -> None:
        """Raise ArchiveError, which gives the first reason, if another modality has no usable scene."""
        for name in self.ids:
            if any(scene is not None for stack in stacks for scene in stack.scenes[name]):
                continue
            first, reason = next(iter(sorted(self.reasons(name).items())), (name, "there is none"))
            raise ArchiveError(
                f"modality {name} has no scene where modality {next(iter(self.ids))} has one; its first, "
                f"{first}: {reason}"
            )

    def reasons(self, modality: str) -> dict[str, str]:
        """Why scenes of a modality are not used, by id."""
        own = self.ids[modality]
        return {s: r for s, r in {**self.skipped, **self.refused}.items() if s in own}


def _new(
    listing: Listing, settings: ModalitySettings, existing: Existing, only: frozenset[str] | None
) -> Listing:
    """The scenes a store has not got; all of a static modality, which new places need as well."""
    known = existing.inputs if not settings.config.static else frozenset[str]()

    def wanted(scene: str) -> bool:
        return scene not in known and (only is None or scene in only or scene in existing.inputs)

    return replace(
        listing,
        scenes=tuple(scene for scene in listing.scenes if wanted(scene.id)),
        refused={scene: reason for scene, reason in listing.refused.items() if wanted(scene)},
        skipped={scene: reason for scene, reason in listing.skipped.items() if wanted(scene)},
    )


def _files_of(listing: Listing, existing: Existing, access: Access) -> set[str]:
    """Names, as in `Listing.files`, of raster files whose scenes a store has."""
    root = f"{access.roots[0].rstrip('/')}/"
    known = (scene for scene in listing.scenes if scene.id in existing.inputs)
    return {
        asset.href.removeprefix(root)
        for scene in known
        for asset in scene.assets
        if asset.kind == "raster"
    }


def _without_known_static(config: DataConfig, stack: Stack, existing: Existing) -> Stack:
    """Where the store has the place and its static scene, that one is not stored again."""
    if stack.name not in existing.places:
        return stack
    scenes = {
        name: (None,)
        if config.settings_of(name).config.static
        and found[0] is not None
        and found[0].id in existing.inputs
        else found
        for name, found in stack.scenes.items()
    }
    return replace(stack, scenes=scenes)


def _without(reasons: dict[str, str], known: frozenset[str]) -> dict[str, str]:
    return {scene: reason for scene, reason in sorted(reasons.items()) if scene not in known}


def require_scenes(archive: str, inputs: int, usable: int, reasons: dict[str, str]) -> None:
    """Raise ArchiveError, which gives the first reason, unless some scenes can be used."""
    if inputs == 0:
        raise ArchiveError(f"{archive}: no scene found; it lists none, give another source")
    if usable == 0:
        name, reason = next(iter(sorted(reasons.items())), ("", "there is none"))
        raise ArchiveError(
            f"{archive}: none of the {inputs} scenes can be used; the first, {name}: {reason}"
        )


def _refuse_static_series(config: DataConfig, stacks: Sequence[Stack]) -> None:
    """Raise ArchiveError where the first modality is static, but a place has scenes of several dates."""
    lead = config.all_modalities()[0]
    for stack in stacks if lead.config.static else ():
        dates = [scene.datetime for scene in stack.scenes[lead.name] if scene is not None]
        if len(dates) > 1:
            raise ArchiveError(
                f"modality {lead.name} is static, but place {stack.name} has scenes of {len(dates)} dates, "
                f"such as {dates[0]} and {dates[1]}; leave static out, or keep one scene per place"
            )


def _refuse_store(archive: str) -> None:
    """Raise ArchiveError for what is no archive, but a store made of one."""
    if not is_url(archive) and read_header(objects_at(Path(archive))) is not None:
        raise ArchiveError(f"{archive} is an aptile store; give the archive that it was made of")


def _unique(listing: Listing, settings: ModalitySettings, config: DataConfig) -> Listing:
    """Ids that are unique over all modalities: with several, each begins with its modality's name."""
    if len(config.all_modalities()) == 1:
        return listing
    name = settings.name
    return replace(
        listing,
        scenes=tuple(replace(scene, id=f"{name}:{scene.id}") for scene in listing.scenes),
        refused={f"{name}:{scene}": reason for scene, reason in listing.refused.items()},
        skipped={f"{name}:{scene}": reason for scene, reason in listing.skipped.items()},
    )


def _with_scores(
    scenes: Sequence[Scene], settings: ModalitySettings, access: Access
) -> tuple[list[Scene], dict[str, str]]:
    """Scenes that have the score raster they need, and the reason for each that has not."""
    accepted, refused = [], {}
    for scene in scenes:
        try:
            check_scores(scene, settings, access)
            accepted.append(scene)
        except SceneError as error:
            refused[scene.id] = str(error)
    return accepted, refused
