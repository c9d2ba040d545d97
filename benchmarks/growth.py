"""Draws docs/growth.svg from benchmarks/results/*.json: what a pair of positions costs as images grow.

Of pyramid attention with five levels, 32 channels of queries and keys and 64 of values.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator, ScalarFormatter

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "growth.svg"

Curve = list[tuple[float, ...]]  # pixels of a side, then median, p20 and p80 in ns per pair


def machine_name(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"


def curves(result: dict[str, Any]) -> dict[str, Curve]:
    """Of one results file, by what was timed, on which backend, in which dtype."""
    found: dict[str, Curve] = defaultdict(list)
    for row in result.get("growth", []):
        if row["pairs"] is None:
            continue
        side = int(row["case"].rsplit("x", 1)[1])
        for backend, entry in row["alternatives"].items():
            times = (entry[x] / row["pairs"] * 1e9 for x in ("median", "p20", "p80"))
            found[f"{row['pass']}, {backend}, {row['dtype']}"].append((side, *times))
    return {name: sorted(points) for name, points in found.items()}


def draw(machines: dict[str, dict[str, Curve]], picture: Path) -> None:
    """One panel per machine, the time linear from zero, so that flat looks flat."""
    plt.rcParams["svg.hashsalt"] = "restore_kernels"  # the same data draw the same file
    figure, panels = plt.subplots(
        1, len(machines), figsize=(6.5 * len(machines), 4), layout="constrained", squeeze=False
    )
    for axes, (machine, named) in zip(panels[0], machines.items(), strict=True):
        for name, points in named.items():
            sides, medians, lows, highs = zip(*points, strict=True)
            (line,) = axes.plot(sides, medians, marker="o", label=name)
            axes.fill_between(sides, lows, highs, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(sorted({point[0] for points in named.values() for point in points}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set(title=machine, xlabel="height and width of the image", ylabel="ns per pair of positions")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    results = (json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json")))
    machines = {machine_name(result): curves(result) for result in results if result.get("growth")}
    if not machines:
        sys.exit("benchmarks/results has no growth cases: run make bench")
    draw(machines, PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
