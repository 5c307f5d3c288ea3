"""What to do with a task whose workers died: the plan alone, without a process.

Dask blames every task that a dead worker held, and workers die of much else than their task. So nothing
is given up because workers died. The task is run alone, twice; where it dies both times, each of
its scenes is run alone; only a scene that dies both times by itself is given up, and the rest is done.
A run that exceeds its time was not killed from outside: once is enough.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Deaths in a row of processes that nobody else uses: of the task, and of the scene that is then given up.
MAX_DEATHS = 2


@dataclass(frozen=True)
class Death:
    """How a process ended that returned nothing: in words, and whether by exceeding its time."""

    how: str
    by_time: bool = False


@dataclass(frozen=True)
class RunWhole:
    """Run the task without the scenes in `excluded`, reasons by scene id."""

    excluded: Mapping[str, str]


@dataclass(frozen=True)
class RunScene:
    """Read and score one scene of the task alone, without writing."""

    scene: str


@dataclass(frozen=True)
class GiveUp:
    """The task died so, and none of its scenes does when alone."""

    deaths: tuple[Death, ...]


@dataclass(frozen=True)
class Trial:
    """How far the search for what kills a task has come.

    `files` names the files of every scene, by scene id; `excluded` are those found guilty, with reasons,
    and `hung` those of them that exceeded their time. `deaths` are those of the whole task since the last
    of them was found, `scene_deaths` of the scene at hand; `cleared` are scenes that ended well alone.
    `found` says whether a guilty one is among those tried since the task last died.
    """

    files: Mapping[str, str]
    excluded: Mapping[str, str] = field(default_factory=dict)
    deaths: tuple[Death, ...] = ()
    scene_deaths: tuple[Death, ...] = ()
    hung: frozenset[str] = frozenset()
    cleared: frozenset[str] = frozenset()
    found: bool = False

    def next_step(self) -> RunWhole | RunScene | GiveUp:
        """What to run next."""
        if not _enough(self.deaths):
            return RunWhole(self.excluded)
        suspects = self._suspects()
        return RunScene(suspects[0]) if suspects else GiveUp(self.deaths)

    def after(self, death: Death | None) -> "Trial":
        """Once the next step was run; None means that it ended well."""
        step = self.next_step()
        if isinstance(step, RunScene):
            return self._after_scene(step.scene, death)._to_the_whole()
        assert isinstance(step, RunWhole)
        assert death is not None, "a task that ended well needs no further step"
        return replace(self, deaths=(*self.deaths, death))

    def _after_scene(self, scene: str, death: Death | None) -> "Trial":
        if death is None:
            return replace(self, cleared=self.cleared | {scene}, scene_deaths=())
        deaths = (*self.scene_deaths, death)
        if not _enough(deaths):
            return replace(self, scene_deaths=deaths)
        reason = f"{self.files[scene]}: reading it alone {in_words(deaths)}; it is left out"
        excluded = {**self.excluded, scene: reason}
        hung = self.hung | {scene} if death.by_time else self.hung
        return replace(self, excluded=excluded, hung=hung, scene_deaths=(), found=True)

    def _to_the_whole(self) -> "Trial":
        """The whole task again, once every suspect was tried and one was guilty."""
        if self._suspects() or not self.found:
            return self
        return replace(self, deaths=(), found=False)

    def _suspects(self) -> list[str]:
        return [s for s in self.files if s not in self.excluded and s not in self.cleared]


def _enough(deaths: tuple[Death, ...]) -> bool:
    return len(deaths) >= MAX_DEATHS or any(death.by_time for death in deaths)


def in_words(deaths: tuple[Death, ...]) -> str:
    """What deaths in a row have in common, such as "was killed by signal 11 (SIGSEGV), 2 times"."""
    hows = " and ".join(dict.fromkeys(death.how for death in deaths))
    return f"{hows}, {len(deaths)} times" if len(deaths) > 1 else hows
