"""A task whose workers died, done alone in processes of the client; see `pipeline.jobs.retries`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.errors import StoreError
from pipeline.jobs.alone import Solitary
from pipeline.jobs.retries import Death, GiveUp, RunScene, Trial, in_words

TaskT = TypeVar("TaskT")


def run_isolated(
    function: Callable[[TaskT], dict[str, Any]], task: TaskT, solitary: Solitary, store: str
) -> tuple[dict[str, Any], Trial]:
    """The task's result, and what was found out about its scenes.

    Raises StoreError if the task dies and no single scene is to blame.
    """
    from pipeline.jobs.shard import try_scene  # it brings all readers along

    trial = Trial(_files(task))
    while True:
        step = trial.next_step()
        if isinstance(step, GiveUp):
            raise StoreError(_given_up(task, step.deaths, store))
        if isinstance(step, RunScene):
            answer = solitary.run(try_scene, task, step.scene)
            trial = trial.after(answer if isinstance(answer, Death) else None)
            continue
        answer = solitary.run(function, excluding(task, step.excluded))
        if not isinstance(answer, Death):
            return answer, trial
        trial = trial.after(answer)


def excluding(task: TaskT, reasons: Any) -> TaskT:
    """The task without some scenes, where it has such."""
    files = _files(task)
    own = {scene: reason for scene, reason in reasons.items() if scene in files}
    if not own:
        return task
    excluded: Any = {**task.excluded, **own}  # type: ignore[attr-defined]
    return replace(task, excluded=excluded)  # type: ignore[type-var]


def name_of(task: object) -> str:
    """How messages name a task."""
    return f"shard {task.shard}" if hasattr(task, "shard") else "a task"


def _files(task: Any) -> dict[str, str]:
    """Files by scene id; none of a task that has no scenes."""
    if not hasattr(task, "modalities"):
        return {}
    return {
        scene.id: ", ".join(dict.fromkeys(asset.href for asset in scene.assets))
        for modality in task.modalities
        for scene in modality.scenes
        if scene.id not in task.excluded
    }


def _given_up(task: object, deaths: tuple[Death, ...], store: str) -> str:
    what = f"{store}: {name_of(task)} {in_words(deaths)}, alone in a process, and no scene of it alone does"
    if deaths[-1].by_time:
        advice = "give run.task_timeout_s more seconds"
    else:
        advice = "most likely memory is short: use a machine with more, or a new store with fewer"
        advice += " store.shard_tiles"
    return f"{what}; {advice}, what is done stays done"
