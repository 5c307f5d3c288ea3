"""The figures of `bench_encoder.py` as the Markdown tables of docs/benchmarks.md."""

from collections.abc import Sequence
from typing import Any

from encoder_clock import FORWARD, PARTS, REST, STEP

Rows = list[dict[str, Any]]


def tables(rows: Rows) -> dict[str, str]:
    """By kind: what the `what` of their rows begins with."""
    by_kind: dict[str, Rows] = {}
    for row in rows:
        kind, _, name = str(row["what"]).partition(": ")
        by_kind.setdefault(kind, []).append({**row, "name": name})
    drawn = {
        "speedup": _speedup,
        "uniform": _uniform,
        "step": _step,
        "share": _share,
        "memory": _memory,
        "operators": _operators,
        "peers": _peers,
        "GPU": _gpu,
    }
    return {kind: draw(by_kind[kind]) for kind, draw in drawn.items() if kind in by_kind}


def _speedup(rows: Rows) -> str:
    names = list(dict.fromkeys(row["name"] for row in rows))
    ratios = [r for r in dict.fromkeys(row["wanted ratio"] for row in rows) if r != 1]
    found = {(row["name"], row["wanted ratio"]): row for row in rows}
    parts = []
    for what in (STEP, FORWARD):
        body = [
            [name, *(_of_flops(found[name, ratio], what) for ratio in ratios)] for name in names
        ]
        parts.append(_table([f"{what}, at a token ratio of", *map(str, ratios)], body))
    return "\n\n".join(parts)


def _of_flops(row: dict[str, Any], what: str) -> str:
    return f"{row[what]:.2f} ({row[f'{what}, of the FLOPs']:.2f})"


def _uniform(rows: Rows) -> str:
    body = [[row["name"], f"{row[FORWARD]:.3f}", f"{row[STEP]:.3f}"] for row in rows]
    return _table(["time over timm's", FORWARD, STEP], body)


def _step(rows: Rows) -> str:
    names = [row["name"].rpartition(", ")[2] for row in rows]
    body = [[part, *(_percent(row[part]) for row in rows)] for part in (*PARTS, REST)]
    body.append(["whole, ms", *(f"{row['ms']:.0f}" for row in rows)])
    return _table(["part, forward and backward", *names], body)


def _share(rows: Rows) -> str:
    columns = ["embedding + merging", "scatter", "together"]
    body = [
        [row["name"].rpartition(", ")[0], *(_percent(row[column]) for column in columns)]
        for row in rows
    ]
    return _table(["share of a step", *columns], body)


def _memory(rows: Rows) -> str:
    body = [
        [
            ", ".join(row["name"].split(", ")[3:]),
            f"{row['peak, MiB']:.0f}",
            f"{row['of the base grid']:.2f}",
        ]
        for row in rows
    ]
    return _table(["a step", "peak, MiB", "of the base grid's"], body)


def _operators(rows: Rows) -> str:
    columns = ["tiles", "tokens", FORWARD, STEP]
    return _table(["batch", *columns], [[row["name"], *(row[c] for c in columns)] for row in rows])


def _peers(rows: Rows) -> str:
    settings = list(dict.fromkeys(_split(row)[0] for row in rows if FORWARD_TIMES in row))
    found = {_split(row): row for row in rows if FORWARD_TIMES in row}
    names = list(dict.fromkeys(name for _, name in found))
    heads = [f"{what}, {setting}" for setting in settings for what in (FORWARD, STEP)]
    body = []
    for name in names:
        cells = []
        for setting in settings:
            row = found.get((setting, name), {})
            cells += [f"{row[key]:.2f}" if row else "" for key in (FORWARD_TIMES, STEP_TIMES)]
        body.append([name, *cells])
    body += [[row["name"], row["note"], *[""] * (len(heads) - 1)] for row in rows if "note" in row]
    return _table(["times aptile's time", *heads], body)


FORWARD_TIMES, STEP_TIMES = f"{FORWARD}, times aptile's", f"{STEP}, times aptile's"


def _split(row: dict[str, Any]) -> tuple[str, str]:
    setting, _, name = row["name"].rpartition(": ")
    return setting.partition(", ratio")[0], name


def _gpu(rows: Rows) -> str:
    columns = [f"{what}, {unit}" for what in (FORWARD, STEP) for unit in ("tokens/s", "speedup")]
    columns += [f"{what}, utilisation" for what in (FORWARD, STEP)]
    body = [
        [row["name"], *(f"{row[c]:.3g}" for c in columns), f"{row['FLOP ratio']:.2f}"]
        for row in rows
    ]
    return _table(["on a GPU", *columns, "FLOP ratio"], body)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(heads: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
