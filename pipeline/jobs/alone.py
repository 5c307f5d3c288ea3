"""One call in a process of its own, whose death is an answer too.

Imports little, so that the process is soon deaf to Ctrl-C: how a job ends is up to its parent.
"""

import importlib
import json
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from pipeline.jobs.process import be_one_of_many
from pipeline.jobs.retries import Death

_ERRORS = "pipeline.errors"
_STARTED = b"started"


class StoppedError(Exception):
    """The process was ended because the job ends."""


@dataclass
class Solitary:
    """Runs calls one after the other, each in a fresh process, until it is stopped from another thread."""

    limit_s: float | None
    _child: BaseProcess | None = None
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns (plain JSON values), or a Death.

        Raises the errors of `pipeline.errors` that it raises, RuntimeError for others, StoppedError once
        stopped. Nothing that comes back is unpickled.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        call = pickle.dumps((function, arguments))
        child = context.Process(target=_serve, args=(theirs, call, self.limit_s), daemon=True)
        with self._lock:
            if self._stopped:
                raise StoppedError
            # The child inherits what this thread blocks, and is deaf to Ctrl-C from the start.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                child.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self._child = child
        theirs.close()
        try:
            answer = _answer(child, ours, self.limit_s)
        finally:
            child.kill()
            child.join()
            ours.close()
            self._child = None
        if self._stopped:
            raise StoppedError
        return answer if isinstance(answer, Death) else _result(answer)

    def stop(self) -> None:
        """End what runs, and refuse to run more."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()


def _answer(child: BaseProcess, ours: Connection, limit_s: float | None) -> dict[str, Any] | Death:
    try:
        ours.recv_bytes()
        if not ours.poll(limit_s):
            return Death(f"took longer than run.task_timeout_s, {limit_s:g} s", by_time=True)
        return json.loads(ours.recv_bytes())
    except EOFError:
        child.join()
        return Death(_how(child.exitcode or 0, limit_s), by_time=child.exitcode == -signal.SIGALRM)


def _how(exit_code: int, limit_s: float | None) -> str:
    if exit_code == -signal.SIGALRM:
        return f"took longer than run.task_timeout_s, {limit_s:g} s"
    if exit_code >= 0:
        return f"ended its process with code {exit_code}"
    return f"killed its process by signal {-exit_code} ({signal.Signals(-exit_code).name})"


def _result(answer: dict[str, Any]) -> Any:
    if "error" not in answer:
        return answer["result"]
    kind = getattr(importlib.import_module(_ERRORS), answer["error"], None)
    if kind is not None:
        raise kind(answer["text"])
    if answer["error"] == MemoryError.__name__:
        return Death("ran out of memory")
    raise RuntimeError(answer["traceback"])


def _serve(theirs: Connection, call: bytes, limit_s: float | None) -> None:
    """The other process: answer once, in JSON."""
    be_one_of_many()
    function, arguments = pickle.loads(call)  # noqa: S301 (made by our own parent)
    theirs.send_bytes(_STARTED)
    if limit_s is not None:
        # Should the parent be gone by then.
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1)
    try:
        answer = {"result": function(*arguments)}
    except Exception as error:
        text = traceback.format_exc()
        answer = {"error": type(error).__name__, "text": str(error), "traceback": text}
    theirs.send_bytes(json.dumps(answer).encode())
