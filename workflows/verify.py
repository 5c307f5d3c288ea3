"""`aptile verify`: whether a store is what was committed."""

from collections import defaultdict
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress

from pipeline.errors import EXIT_INTEGRITY, EXIT_OK
from pipeline.jobs.known import Damage, is_ledger
from pipeline.jobs.verify import VerifyReport
from pipeline.jobs.verify import verify as run_verify
from workflows.terminal import bar_columns, console, note, print_json

# Names shown of each group; --json lists all.
_SHOWN = 20


def verify(
    store: str,
    *,
    workers: Annotated[int | None, Parameter()] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Compare every object of a store with what was committed, and say how damage is mended.

    Parameters
    ----------
    store
        A store made by `aptile preprocess`: a path or a URL.
    workers
        Threads that read and compare; one per CPU core when not given.
    json
        Print the result as JSON on stdout.
    """
    stderr = Console(stderr=True)
    hidden = not stderr.is_terminal
    with Progress(*bar_columns("objects"), console=stderr, disable=hidden, transient=True) as bar:
        task = bar.add_task("verify", total=None, extra="")
        report = run_verify(
            store, workers, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if json:
        print_json(_as_json(report))
    else:
        for line in in_words(report):
            console().print(line, markup=False, soft_wrap=True)
    if report.damaged and not report.remembered:
        note("the store cannot be written, so what is damaged is not remembered in it")
    return EXIT_INTEGRITY if report.damaged else EXIT_OK


def in_words(report: VerifyReport) -> list[str]:
    """The report as lines."""
    state = "unfinished" if report.commit is None else f"commit {report.commit}"
    found = f"{len(report.damaged)} damaged" if report.damaged else "intact"
    if report.commit is None and not report.under_way:
        state = "no commit can be read"
    lines = [f"{report.store}: {state}; {report.objects} objects, {report.bytes} bytes; {found}"]
    for cure, damages in groups(report).items():
        lines.append(cure)
        lines += [f"  {damage.name} {damage.what}" for damage in damages[:_SHOWN]]
        if len(damages) > _SHOWN:
            lines.append(f"  and {len(damages) - _SHOWN} more; --json lists all")
    if any(is_ledger(damage.name) for damage in report.damaged):
        lines.append(
            "what a damaged ledger names could not be compared: verify again after the repair"
        )
    lines += [f"under way: {text}" for text in report.under_way]
    lines += [f"left over: {name}" for name in report.leftovers[:_SHOWN]]
    if len(report.leftovers) > _SHOWN:
        lines.append(f"left over: {len(report.leftovers) - _SHOWN} more objects; --json lists all")
    return lines


def groups(report: VerifyReport) -> dict[str, list[Damage]]:
    """Damage by what to do about it, in words."""
    by_cure = defaultdict[tuple[str, str], list[Damage]](list)
    for damage in report.damaged:
        of = damage.cure.of if damage.cure.kind in {"partition", "record"} else ""
        by_cure[damage.cure.kind, of].append(damage)
    return {_cure(report, kind, of, by_cure[kind, of]): by_cure[kind, of] for kind, of in by_cure}


def _cure(report: VerifyReport, kind: str, of: str, damages: list[Damage]) -> str:
    shards = len({damage.cure.shard for damage in damages})
    objects = f"{len(damages)} objects" if len(damages) > 1 else "1 object"
    again = f"run `aptile preprocess SOURCE {report.store}` again"
    if kind == "shard":
        return f"{again}: it writes {objects} of {shards} shard{'s' * (shards > 1)} anew"
    if kind == "record":
        return f"{again}: it restores {objects} from {of}"
    if kind == "partition":
        modality, name = of.split("/")
        return (
            f"run `aptile repartition {report.store} --name {name} --modality {modality}` again with its "
            f"rule: it writes {objects} anew"
        )
    return f"{objects} cannot be restored; preprocess the archive into a new store"


def _as_json(report: VerifyReport) -> dict[str, Any]:
    cure_of = {d.name: text for text, damages in groups(report).items() for d in damages}
    return {
        "store": report.store,
        "commit": report.commit,
        "intact": report.intact,
        "objects": report.objects,
        "bytes": report.bytes,
        "damaged": [
            {"name": d.name, "what": d.what, "cure": d.cure.kind, "do": cure_of[d.name]}
            for d in report.damaged
        ],
        "under_way": list(report.under_way),
        "unfinished": list(report.unfinished),
        "leftovers": list(report.leftovers),
    }
