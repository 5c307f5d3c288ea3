"""`aptile log`: the commits of a store, each of which can still be read."""

from datetime import UTC, datetime
from typing import Annotated, Any

from cyclopts import Parameter

from pipeline.errors import EXIT_OK, StoreError
from pipeline.storage.commit import Commit, all_commits, commit_name
from pipeline.storage.objects import Objects, objects_at
from workflows.locations import StoreLocation
from workflows.terminal import console, plain_table, print_json


def log(store: StoreLocation, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """List the commits of a store, the newest last.

    `aptile inspect STORE --commit N` and `open_store(STORE, commit=N)` read an earlier one.

    Parameters
    ----------
    store
        A store made by `aptile preprocess`.
    json
        Print the commits as JSON on stdout.
    """
    objects = objects_at(store)
    rows = [_row(objects, commit) for commit in all_commits(objects)]
    if not rows:
        raise StoreError(f"{store}: no commit here; `aptile preprocess` makes the first")
    if json:
        print_json(rows)
        return EXIT_OK
    table = plain_table(
        "commit", "when (UTC)", "by", "inputs", "quarantined", "tiles", "shards", "partitions"
    )
    for row in rows:
        named = sorted({name for names in row["partitions"].values() for name in names})
        table.add_row(
            str(row["commit"]),
            row["when"].replace("T", " ").removesuffix("+00:00"),
            row["kind"],
            *(str(row[what]) for what in ("inputs", "quarantined", "tiles", "shards")),
            ", ".join(["default", *named]),
        )
    console().print(table)
    return EXIT_OK


def _row(objects: Objects, commit: Commit) -> dict[str, Any]:
    """What one commit comes to; the time is that of its object."""
    when = datetime.fromtimestamp(objects.modified(commit_name(commit.number)), UTC)
    return {
        "commit": commit.number,
        "kind": commit.kind,
        "when": when.isoformat(timespec="seconds"),
        **{
            what: commit.summary[what]
            for what in ("inputs", "quarantined", "skipped", "tiles", "shards")
        },
        "partitions": {name: sorted(made) for name, made in commit.partitions.items()},
        "manifest_sha256": commit.manifest["sha256"],
    }
