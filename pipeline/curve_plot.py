"""The picture of a token curve: mean tokens per tile against the threshold of each patch size."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_PNG_DPI = 110


def draw_curve(content: dict[str, Any], file: Path) -> None:
    """Write a PNG of what `aptile inspect --curve` prints; infinite thresholds are left out."""
    rows = content["curve"]
    # The Agg canvas needs no display and leaves the caller's backend alone.
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for level, size in enumerate(content["patch_sizes"][1:]):
            axes.plot(
                [row["thresholds"][level] for row in rows],
                [row["mean_tokens"] for row in rows],
                marker="o",
                markersize=3,
                label=f"{size} px",
            )
        axes.set_xlabel("threshold (score), all sizes at one quantile")
        axes.set_ylabel("mean tokens per tile")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{content['modality']}: {content['tiles']} tiles")
        if len(content["patch_sizes"]) > 1:
            axes.legend(title="patch size")
        figure.savefig(file, dpi=_PNG_DPI)
