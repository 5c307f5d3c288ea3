"""The `aptile` command: parse, one call, exit code. Each command lives in its own module."""

import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import FrameType
from typing import Any

from cyclopts import App, CycloptsError, UnusedCliTokensError

from pipeline.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE, AptileError

_EXTRA_OF = {
    "torch": "train",
    "lightning": "train",
    "safetensors": "train",
    "matplotlib": "viz",
    "spyndex": "demo",
    "xarray": "xarray",
    "h5netcdf": "xarray",
    "h5py": "xarray",
    "pystac_client": "stac",
    "obstore": "cloud",
}

app = App(
    name="aptile",
    help="From satellite archive to training-ready adaptive tokens.",
    version=lambda: version("aptile"),
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
# As text, so that a command's imports cost nothing until it is called.
for _command, _help in (
    ("preprocess", "Score, partition and store every tile of an archive."),
    ("inspect", "Show token counts of a store, and pictures of its tiles."),
    ("log", "List the commits of a store."),
    ("repartition", "Cut the tiles of a store by another rule, from its score maps."),
    ("verify", "Compare a store with what was committed, and say how damage is mended."),
    ("train", "Train an APT encoder on the tiles of a store."),
    ("demo", "Try all of it on a real Sentinel-2 chip."),
):
    app.command(f"workflows.{_command}:{_command}", name=_command, help=_help)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems and `kill` send it: ends a job like Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    # After an interrupt Python's tracker of semaphores would complain of what it then tidies up.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    code = run(lambda: app(arguments, exit_on_error=False, print_error=False))
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        # Python would wait for threads that wait for a server, and a third Ctrl-C says nothing new.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command; errors a user can cause become one line on stderr."""
    try:
        return int(command() or 0)
    except AptileError as error:
        return _complain(str(error), error.exit_code)
    except UnusedCliTokensError as error:
        return _complain(
            f"{(error.unused_tokens or [''])[0]!r} is one argument too many; put globs in quotes, as "
            "'scenes/*.tif', and see `aptile --help`",
            EXIT_USAGE,
        )
    except CycloptsError as error:
        message = " ".join(str(error).split())
        return _complain(f"{message} See `aptile --help`.", EXIT_USAGE)
    except PermissionError as error:
        return _complain(
            f"{error.filename}: {error.strerror}; change who may use it, or give another path",
            EXIT_USAGE,
        )
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        return _complain(
            f"{'terminated' if terminated else 'interrupted'}; nothing is lost, run the same command again "
            "to go on",
            EXIT_TERMINATED if terminated else EXIT_INTERRUPTED,
        )
    except ImportError as error:
        package = _missing_package(error)
        if package not in _EXTRA_OF:
            raise
        return _complain(
            f"this command needs {package}; install it with: pip install 'aptile[{_EXTRA_OF[package]}]'",
            EXIT_USAGE,
        )


def _missing_package(error: BaseException | None) -> str:
    """The package whose absence an import error goes back to; empty if it is none."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.split(".")[0]
        error = error.__cause__
    return ""


def _complain(message: str, code: int) -> int:
    # Names that users give may hold line breaks; a complaint is one line.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    print(f"aptile: {line}", file=sys.stderr)  # noqa: T201 (the one place errors are shown)
    return code


if __name__ == "__main__":
    main()
