"""`aptile repartition`: another partition of a store, from its score maps."""

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from pipeline.errors import EXIT_OK, ConfigError
from pipeline.jobs.repartition import RepartitionReport
from pipeline.jobs.repartition import repartition as run_repartition
from pipeline.rules import FurtherRule, rule_in_words
from pipeline.settings.canonical import plain
from pipeline.settings.loading import validated
from pipeline.settings.run import RunConfig
from workflows.locations import StoreLocation
from workflows.progress import JobProgress
from workflows.terminal import note, print_json, repaired_in_words


def repartition(
    store: StoreLocation,
    *,
    name: str,
    modality: str | None = None,
    thresholds: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    tokens_per_tile: int | None = None,
    quantile: float | None = None,
    mean_tokens: float | None = None,
    uniform_px: int | None = None,
    shared: Literal["max", "mean"] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Cut the tiles of a store by another rule, from the stored scores; the archive is not needed.

    Give one rule. A second run of the same command completes what was interrupted, or finds nothing
    to do.

    Parameters
    ----------
    store
        A store made by `aptile preprocess`: a path, or a URL (s3://, gs://, az://).
    name
        Name of the new partition, for example tokens-64.
    modality
        The modality whose tiles are cut; the first one when not given.
    thresholds
        Scores from which on a patch is split: comma-separated, fine to coarse; inf and -inf allowed.
    tokens_per_tile
        Exactly so many tokens per tile, or as near below as a quadtree allows.
    quantile
        Share of the patches of each size that stays whole, scene by scene.
    mean_tokens
        Mean tokens per tile over the whole store; its thresholds are computed.
    uniform_px
        Patches of this one size.
    shared
        One partition for all timesteps of a tile, from the max or mean of their scores.
    workers
        Local worker processes; when not given, as many as the work is worth.
    scheduler
        Address of a running Dask scheduler to use instead.
    json
        Print the result as JSON on stdout.
    """
    given = {
        "thresholds": None if thresholds is None else _numbers(thresholds),
        "tokens_per_tile": tokens_per_tile,
        "quantile": quantile,
        "mean_tokens": mean_tokens,
        "uniform_px": uniform_px,
        "shared": shared,
    }
    rule = validated(FurtherRule, given, "repartition")
    run = validated(RunConfig, {"workers": workers, "scheduler": scheduler}, "repartition")
    with JobProgress("repartition") as progress:
        report = run_repartition(store, name, rule, run, progress, modality)
    note(
        f"{store}: partition {name} by {rule_in_words(report.rule)}; {report.mean_tokens:.6g} tokens per "
        f"tile on average, {report.tiles} tiles in {report.shards} shards"
        + (f"; {repaired_in_words(*report.repaired)}" if any(report.repaired) else "")
        + ("; complete already, nothing to do" if _left_alone(report) else "")
    )
    if json:
        print_json(_as_json(report))
    return EXIT_OK


def _left_alone(report: RepartitionReport) -> bool:
    return not report.committed and not any(report.repaired)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--thresholds {text!r}: expected numbers separated by commas, for example 0.8,1.5"
        ) from None


def _as_json(report: RepartitionReport) -> dict[str, Any]:
    content: dict[str, Any] = plain(vars(report))
    objects, shards = content.pop("repaired")
    counts = {"repaired_objects": objects, "repaired_shards": shards}
    return {**content, "store": str(report.store), **counts}
