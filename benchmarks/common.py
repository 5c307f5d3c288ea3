"""What the benchmark scripts share: arguments, timing, output."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny input: does the script work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Shortest of several runs, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print rows as a Markdown table, and write them with a word on the machine."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |")
    if file is not None:
        machine = {"processor": platform.machine(), "cores": os.cpu_count()}
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
