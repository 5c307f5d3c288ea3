"""The pictures of `bench_encoder.py`, from its figures."""

from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from encoder_clock import FORWARD, PARTS, REST, STEP

Rows = list[dict[str, Any]]
SHARES, SPEEDUPS = (0.2, 0.35, 0.5, 0.7, 1.0), (1, 1.5, 2, 3, 4, 6, 8, 12)
COLOURS = ("#b2182b", "#ef8a62", "#2166ac", "#67a9cf", "#d1e5f0", "#f7b538", "#999999")


def draw(folder: Path, rows: Rows) -> None:
    """`encoder_speedup.png` and `encoder_step.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    _speedup(rows).savefig(folder / "encoder_speedup.png", dpi=110)
    _step(rows).savefig(folder / "encoder_step.png", dpi=110)


def _speedup(rows: Rows) -> Figure:
    """Speedup against the token ratio: points measured, lines what the FLOPs allow."""
    settings: dict[str, Rows] = {}
    for row in rows:
        kind, _, name = str(row["what"]).partition(": ")
        if kind == "speedup":
            settings.setdefault(name, []).append(row)
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, what in zip(panels, (FORWARD, STEP), strict=True):
        for number, (name, of_setting) in enumerate(settings.items()):
            of_setting = sorted(of_setting, key=lambda row: row["token ratio"])
            ratios = [row["token ratio"] for row in of_setting]
            ideal = [row["FLOP ratio"] for row in of_setting]
            panel.plot(ratios, ideal, color=f"C{number}", linewidth=0.9, linestyle="--")
            measured = [row[what] for row in of_setting]
            panel.plot(ratios, measured, "o", color=f"C{number}", markersize=5, label=name)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_yticks(SPEEDUPS, [f"{speedup:g}" for speedup in SPEEDUPS])
        panel.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
        panel.minorticks_off()
        panel.set_xlabel("tokens, share of the base grid")
        panel.set_title(what, fontsize=10)
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("times faster than the base grid")
    panels[1].plot([], [], color="gray", linestyle="--", linewidth=0.9, label="ideal: FLOPs")
    panels[1].legend(fontsize=8, frameon=False)
    return figure


def _on(colour: str) -> str:
    """White on dark colours, black on light ones."""
    return "white" if sum(to_rgb(colour)) < 1.5 else "black"


def _step(rows: Rows) -> Figure:
    """Where the time of a step goes, a bar for each ratio."""
    bars = [row for row in rows if str(row["what"]).startswith("step: ")]
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    panel = figure.subplots()
    for place, row in enumerate(bars):
        left = 0.0
        for part, colour in zip((*PARTS, REST), COLOURS, strict=True):
            width = row[part] * row["ms"]
            label = None if place else part
            panel.barh(place, width, left=left, color=colour, label=label, height=0.6)
            if row[part] > 0.045:
                text = f"{100 * row[part]:.0f} %"
                panel.text(
                    left + width / 2,
                    place,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=_on(colour),
                )
            left += width
    names = [str(row["what"]).rpartition(", ")[2] for row in bars]
    panel.set_yticks(range(len(bars)), names)
    panel.set_xlabel("ms of one step (forward, scatter, backward)")
    panel.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panel.spines[["top", "right"]].set_visible(False)
    return figure
