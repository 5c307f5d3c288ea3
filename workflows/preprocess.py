"""`aptile preprocess`: a folder of scenes to a store."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import EXIT_OK, EXIT_QUARANTINED
from pipeline.jobs.job import JobReport, run_job
from pipeline.planning.explain import explain, in_words
from pipeline.planning.inputs import Job, plan_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from workflows.terminal import (
    ShardProgress,
    note,
    print_json,
    progress_bar,
    repaired_in_words,
)


def preprocess(
    source: str,
    store: Path,
    *,
    config: Path | None = None,
    preset: str | None = None,
    set_: Annotated[list[str] | None, Parameter("--set", negative="")] = None,
    workers: int | None = None,
    scheduler: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Score, partition and store every tile of an archive, as a Dask job.

    A second run of the same command completes what was interrupted, or finds nothing to do.

    Parameters
    ----------
    source
        Folder of scenes, a quoted glob, a Zarr or netCDF dataset, a STAC catalogue or a URL.
    store
        Path of the store to make or complete.
    config
        YAML file with any of the settings.
    preset
        Sensor preset to start from, or a YAML file of one: s2_l2a, s2_l1c, s1_rtc, landsat_c2_l2, naip,
        dem, rgb.
    set_
        One setting as key=value, for example partition.num_scales=2. May be repeated.
    workers
        Local worker processes; one per CPU core when not given.
    scheduler
        Address of a running Dask scheduler to use instead.
    dry_run
        Show the plan; write nothing.
    json
        Print the result as JSON on stdout.
    """
    overrides = list(set_ or [])
    if workers is not None:
        overrides.append(f"run.workers={workers}")
    if scheduler is not None:
        overrides.append(f"run.scheduler={scheduler}")
    settings = load_config(PreprocessConfig, config, overrides, preset)
    if dry_run:
        _show_plan(plan_job(source, settings), json)
        return EXIT_OK
    report = preprocess_archive(source, store, settings)
    if json:
        print_json(_as_json(report))
    return EXIT_QUARANTINED if report.quarantined else EXIT_OK


def preprocess_archive(source: str, store: Path, settings: PreprocessConfig) -> JobReport:
    """Run the job with a progress bar, and say what came of it."""
    with progress_bar("tiles") as bar:
        report = run_job(source, store, settings, ShardProgress(bar, "preprocess"))
    for text in report.notes:
        note(f"note: {text}")
    for word, reasons in (
        ("quarantined", report.quarantined),
        ("skipped", report.skipped),
        ("doubtful", report.findings),
    ):
        for scene, reason in reasons.items():
            note(f"{word} {scene}: {reason}")
    left_out = report.tiles_left_out, report.frames_left_out
    note(
        f"{store}: {report.inputs} inputs = {report.done} done + {len(report.quarantined)} quarantined"
        f" + {len(report.skipped)} skipped; {report.tiles} tiles in {report.shards} shards"
        + (f"; {left_out[0]} tiles and {left_out[1]} frames left out" if any(left_out) else "")
        + (f"; splits {_counts(report.splits)}" if report.splits else "")
        + (f"; {repaired_in_words(*report.repaired)}" if any(report.repaired) else "")
        + ("; complete already, nothing to do" if _left_alone(report) else "")
    )
    return report


def _left_alone(report: JobReport) -> bool:
    return report.shards_written == 0 and not any(report.repaired)


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _as_json(report: JobReport) -> dict[str, object]:
    return {
        "store": str(report.store),
        "inputs": report.inputs,
        "done": report.done,
        "quarantined": report.quarantined,
        "skipped": report.skipped,
        "findings": report.findings,
        "notes": list(report.notes),
        "tiles": report.tiles,
        "tiles_left_out": report.tiles_left_out,
        "frames_left_out": report.frames_left_out,
        "splits": report.splits,
        "shards": report.shards,
        "shards_written": report.shards_written,
        "repaired_objects": report.repaired[0],
        "repaired_shards": report.repaired[1],
    }


def _show_plan(job: Job, as_json: bool) -> None:
    content = explain(job)
    if as_json:
        print_json(content)
        return
    for line in in_words(content):
        note(line)
