"""Schedulers and workers as processes of their own, started with Dask's commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

DASK = (sys.executable, "-m", "dask")


class Dask:
    """Starts Dask's commands, and ends all it started when it is left."""

    def __init__(self, folder: Path, **config: str) -> None:
        self.folder = folder
        self.env = {**os.environ, **{f"DASK_{key}": value for key, value in config.items()}}
        self.groups: list[subprocess.Popen] = []

    def start(
        self, *command: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen:
        """A process group; what it says goes to a file of the folder."""
        log = self.folder / f"{len(self.groups)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd or self.folder,
                env={**self.env, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.groups.append(process)
        return process

    def scheduler(self, *options: object, within: Sequence[str] = ()) -> str:
        """Start a scheduler; its address."""
        file = self.folder / f"scheduler-{len(self.groups)}.json"
        process = self.start(
            *within, *DASK, "scheduler", "--port", 0, "--dashboard-address", "127.0.0.1:0",
            "--scheduler-file", file, *options,
        )  # fmt: skip
        while True:
            with contextlib.suppress(OSError, json.JSONDecodeError):
                return json.loads(file.read_text())["address"]
            assert process.poll() is None, self.said()
            time.sleep(0.02)

    def worker(
        self, address: str, *options: object, within: Sequence[str] = (), **how
    ) -> subprocess.Popen:
        """Start a single-threaded worker without a nanny."""
        return self.start(
            *within, *DASK, "worker", address, "--nthreads", 1, "--no-nanny",
            "--dashboard-address", "127.0.0.1:0", "--local-directory", self.folder, *options, **how,
        )  # fmt: skip

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.folder.glob("*.log"))

    def end(self) -> None:
        for process in self.groups:
            send(process, signal.SIGKILL)
        for process in self.groups:
            process.wait()


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """A signal to a whole process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def dask_processes(folder: Path, **config: str) -> Iterator[Dask]:
    folder.mkdir()
    started = Dask(folder, **config)
    try:
        yield started
    finally:
        started.end()
