"""How many inputs may be quarantined before a job stops early."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.errors import EXIT_QUARANTINED, StoreError
from pipeline.settings.run import parse_limit


class QuarantineError(StoreError):
    """More inputs are quarantined than `run.max_quarantine` allows."""

    exit_code = EXIT_QUARANTINED


def allowed(limit: int | str, inputs: int) -> int:
    """The most inputs that may be quarantined."""
    number = parse_limit(limit)
    return number if isinstance(number, int) else int(number * inputs)


class QuarantineLimit:
    """Counts quarantined inputs; raises QuarantineError as soon as they are too many.

    `reasons` are those quarantined so far, by scene id; without a limit nothing is ever too many.
    """

    def __init__(
        self, where: str, limit: int | str | None, inputs: int, reasons: Mapping[str, str]
    ) -> None:
        self._where, self._limit, self._inputs = where, limit, inputs
        self._most = None if limit is None else allowed(limit, inputs)
        self.reasons = dict(reasons)
        self._check()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take the failed scenes of some ledger rows."""
        for row in rows:
            for scene, reason in row["failed"].items():
                self.reasons.setdefault(scene, reason)
        self._check()

    def _check(self) -> None:
        if self._most is None or len(self.reasons) <= self._most:
            return
        scene = min(self.reasons)
        raise QuarantineError(
            f"{self._where}: {len(self.reasons)} of {self._inputs} inputs are quarantined, more than "
            f"run.max_quarantine {self._limit} allows ({self._most}); one of them, {scene}: "
            f"{self.reasons[scene]}; stopped, what is done stays done: the same command with a higher "
            "--max-quarantine goes on"
        )
