"""Draws docs/growth.svg from benchmarks/results/*.json: time against size, one panel per growing case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from restore_kernels.profiling.figures import STYLE, draw_growth, series, size_names
from restore_kernels.profiling.results import machine_name

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "growth.svg"
COLUMNS = 3


def draw(results: list[dict[str, Any]], picture: Path) -> int:
    """Returns how many panels there are."""
    panels = [
        ("\n".join((machine_name(result), *title.rsplit(", ", 1))), lines, size_names(result)[title])
        for result in results
        for title, lines in series(result).items()
    ]
    if not panels:
        return 0
    rows = -(-len(panels) // COLUMNS)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, COLUMNS, figsize=(4.2 * COLUMNS, 3.4 * rows), layout="constrained", squeeze=False
        )
        for axes, (title, lines, size_name) in zip(grid.flat, panels, strict=False):
            draw_growth(axes, lines, size_name)
            axes.set_title(title, fontsize=8)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        picture.parent.mkdir(exist_ok=True)
        figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)
    return len(panels)


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))]
    if not draw(results, PICTURE):
        sys.exit("benchmarks/results has nothing that grows: run make results")
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
