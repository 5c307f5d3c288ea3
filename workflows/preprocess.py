"""`aptile preprocess`: a folder of scenes to a store."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.config import PreprocessConfig, load_config
from pipeline.errors import EXIT_OK, EXIT_QUARANTINED
from pipeline.job import Job, JobReport, plan_job, run_job
from workflows.terminal import ShardProgress, note, print_json, progress_bar


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
        Folder of GeoTIFF/COG scenes of one modality, or a quoted glob.
    store
        Path of the store to make or complete.
    config
        YAML file with any of the settings.
    preset
        Sensor preset to start from: s2_l2a.
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
    for scene, reason in report.quarantined.items():
        note(f"quarantined {scene}: {reason}")
    note(
        f"{store}: {report.inputs} inputs = {report.done} done + {len(report.quarantined)} quarantined; "
        f"{report.tiles} tiles in {report.shards} shards"
        + ("; complete already, nothing to do" if report.shards_written == 0 else "")
    )
    return report


def _as_json(report: JobReport) -> dict[str, object]:
    return {
        "store": str(report.store),
        "inputs": report.inputs,
        "done": report.done,
        "quarantined": report.quarantined,
        "tiles": report.tiles,
        "shards": report.shards,
        "shards_written": report.shards_written,
    }


def _show_plan(job: Job, as_json: bool) -> None:
    plan = job.plan
    content = {
        "inputs": len(job.source.files),
        "scenes": len(plan.scenes),
        "refused": job.refused,
        "bands": list(plan.bands),
        "scored_bands": [plan.bands[band] for band in plan.scored_bands],
        "dtype": plan.dtype,
        "tiles": len(plan.tiles),
        "shards": plan.num_shards,
        "tiles_per_shard": plan.shard_capacity,
        "config_digest": plan.config.digest(),
    }
    if as_json:
        print_json(content)
        return
    for name, value in content.items():
        note(f"{name}: {value}")
