"""Which scene of a modality stands at which timestep. Pure."""

from collections.abc import Sequence
from datetime import datetime

import numpy as np

from pipeline.scenes import Scene

Timesteps = tuple[Scene | None, ...]
_SECONDS_PER_DAY = 86_400.0


def exact(datetimes: Sequence[str | None], found: Sequence[Scene]) -> Timesteps:
    """The scene of every date, or None."""
    by_date = {scene.datetime: scene for scene in found}
    return tuple(by_date.get(when) for when in datetimes)


def nearest(
    datetimes: Sequence[str | None], found: Sequence[Scene], tolerance_days: float
) -> Timesteps:
    """Mutually nearest pairs: each scene serves the timestep nearest to it, and each timestep takes the
    nearest of the scenes that serve it. Earlier wins a tie. No scene is used twice."""
    taken: list[Scene | None] = [None] * len(datetimes)
    if not datetimes or not found:
        return tuple(taken)
    steps = np.array([_seconds(when) for when in datetimes])
    best = np.full(len(steps), tolerance_days * _SECONDS_PER_DAY)
    for scene in found:
        apart = np.abs(steps - _seconds(scene.datetime))
        nearest = int(apart.argmin())
        if apart[nearest] < best[nearest] or (
            taken[nearest] is None and apart[nearest] <= best[nearest]
        ):
            best[nearest], taken[nearest] = apart[nearest], scene
    return tuple(taken)


def _seconds(when: str | None) -> float:
    assert when is not None
    return datetime.fromisoformat(when).timestamp()
