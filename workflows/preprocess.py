"""`aptile preprocess`: a folder of scenes to a store."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import EXIT_OK, EXIT_QUARANTINED, ConfigError
from pipeline.jobs.engine import check_report
from pipeline.jobs.job import JobReport, run_job
from pipeline.planning.explain import explain, in_words
from pipeline.planning.inputs import Job, plan_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.storage.objects import Location
from workflows.locations import StoreLocation
from workflows.progress import Effort, JobProgress
from workflows.terminal import note, print_json, repaired_in_words


def preprocess(
    source: str,
    store: StoreLocation,
    *,
    config: Path | None = None,
    preset: str | None = None,
    set_: Annotated[list[str] | None, Parameter("--set", negative="")] = None,
    workers: int | None = None,
    scheduler: str | None = None,
    append: Annotated[bool, Parameter(negative="")] = False,
    retry_quarantined: Annotated[bool, Parameter(negative="")] = False,
    max_quarantine: str | None = None,
    report: Path | None = None,
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
        The store to make or complete: a path, or a URL (s3://, gs://, az://).
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
    append
        Add the scenes that a finished store has not got, as its next commit.
    retry_quarantined
        With --append: take in once more what could not be read before.
    max_quarantine
        Stop as soon as more inputs are quarantined: a number, or a share such as 1%.
    report
        Write Dask's performance report of the run to this HTML file.
    dry_run
        Show the plan; write nothing.
    json
        Print the result as JSON on stdout.
    """
    overrides = list(set_ or [])
    run = {
        "workers": workers,
        "scheduler": scheduler,
        "max_quarantine": max_quarantine,
        "report": report,
    }
    overrides += [f"run.{key}={value}" for key, value in run.items() if value is not None]
    settings = load_config(PreprocessConfig, config, overrides, preset)
    if retry_quarantined and not append:
        raise ConfigError("--retry-quarantined has no effect without --append; add it")
    if dry_run:
        if append:
            raise ConfigError("--dry-run shows the plan of a new store; leave out --append")
        _show_plan(plan_job(source, settings), json)
        return EXIT_OK
    done, effort = preprocess_archive(source, store, settings, append, retry_quarantined)
    if json:
        print_json({**_as_json(done), "run": effort.as_json()})
    return EXIT_QUARANTINED if done.quarantined else EXIT_OK


def preprocess_archive(
    source: str,
    store: Location,
    settings: PreprocessConfig,
    append: bool = False,
    retry_quarantined: bool = False,
) -> tuple[JobReport, Effort]:
    """Run the job with a progress bar, and say what came of it."""
    check_report(settings.run)
    with JobProgress("preprocess") as progress:
        report = run_job(
            source, store, settings, progress, append=append, retry_quarantined=retry_quarantined
        )
    _say(report)
    return report, progress.effort


def _say(report: JobReport) -> None:
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
        f"{report.store}: {report.inputs} inputs = {report.done} done"
        f" + {len(report.quarantined)} quarantined"
        f" + {len(report.skipped)} skipped; {report.tiles} tiles in {report.shards} shards"
        + (f"; {left_out[0]} tiles and {left_out[1]} frames left out" if any(left_out) else "")
        + (f"; splits {_counts(report.splits)}" if report.splits else "")
        + (f"; commit {report.commit}" if report.commit > 1 else "")
        + (f"; {repaired_in_words(*report.repaired)}" if any(report.repaired) else "")
        + ("; complete already, nothing to do" if _left_alone(report) else "")
    )


def _left_alone(report: JobReport) -> bool:
    return not report.committed and not any(report.repaired)


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _as_json(report: JobReport) -> dict[str, object]:
    return {
        "store": report.store,
        "commit": report.commit,
        "committed": report.committed,
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
