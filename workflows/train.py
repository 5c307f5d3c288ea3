"""`aptile train`: a small self-supervised run from a store."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from model.training import LOSS_FILE, TrainReport
from model.training import train as run_training
from model.training_config import TrainConfig, attention_name
from pipeline.errors import EXIT_OK
from pipeline.settings.loading import load_config
from pipeline.storage.objects import Location
from workflows.locations import StoreLocation
from workflows.terminal import note, print_json, progress_bar


def train(
    store: StoreLocation,
    *,
    out: Path,
    config: Path | None = None,
    set_: Annotated[list[str] | None, Parameter("--set", negative="")] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train an APT encoder on a store's tiles; the same command resumes an interrupted run.

    Hidden tokens are predicted from visible ones; nothing is scored while training.

    Parameters
    ----------
    store
        A store made by `aptile preprocess`: a path, or a URL (s3://, gs://, az://).
    out
        Folder of the run: checkpoint, loss.csv and, at the end, the encoder.
    config
        YAML file with any of the settings.
    set_
        One setting as key=value, for example steps=1000. May be repeated.
    json
        Print the result as JSON on stdout.
    """
    settings = load_config(TrainConfig, config, list(set_ or []))
    report = train_store(store, out, settings)
    if json:
        print_json(
            {
                "out": str(report.out),
                "steps": report.steps,
                "steps_now": report.steps_now,
                "first_loss": report.first_loss,
                "last_loss": report.last_loss,
            }
        )
    return EXIT_OK


def train_store(store: Location, out: Path, settings: TrainConfig) -> TrainReport:
    """Train with a progress bar, and say what came of it."""
    note(f"attention: {attention_name(settings.precision)}")
    with progress_bar("steps") as bar:
        task = bar.add_task("train", total=settings.steps, extra="")
        report = run_training(
            store,
            out,
            settings,
            lambda step, loss: bar.update(task, completed=step, extra=f"loss {loss:.3f}"),
        )
    done = f"{report.steps_now} steps" if report.steps_now else "complete already, nothing to do"
    note(
        f"{out}: {done}; loss {report.first_loss:.3f} at the start, {report.last_loss:.3f} at the end "
        f"(every step in {out / LOSS_FILE})"
    )
    return report
