"""The results as plots: SVG elements that stand inside a page, readable at the width of a phone.

Everything that is drawn is a group with an id, ``plot:series:alternative`` with _ for spaces, that holds one
mark per figure.
"""

from __future__ import annotations

import io
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from restore_kernels.profiling.results import Results, Row, digits

COLORS = {
    "eager": "#8a8f98", "torch.compile": "#d98c21", "cpu": "#0b6fa4", "triton": "#1b7f4b", "cuda": "#8e3b8e",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "restore_kernels",  # the same data draw the same picture
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3,
}  # fmt: skip
WIDTH = 4.4  # inches, which a phone shows at about their size

Point = tuple[int, dict[str, Any]]  # a size, and what was measured of an alternative there
Value = Callable[[Mapping[str, Any]], "float | None"]


def series(results: Results) -> dict[str, dict[str, list[Point]]]:
    """By what grows, and by alternative: the points of every series of two sizes or more."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in (*results["cases"], *results["growth"]):
        for name, entry in row["alternatives"].items():
            found[f"{row['series']}, {row['dtype']}, {row['pass']}"][name][row["size"]] = entry
    return {
        title: {name: sorted(points.items(), key=lambda point: point[0]) for name, points in lines.items()}
        for title, lines in found.items()
        if len({size for points in lines.values() for size in points}) > 1
    }


def size_names(results: Results) -> dict[str, str]:
    """What the size of each series is called."""
    rows = (*results["cases"], *results["growth"])
    return {f"{row['series']}, {row['dtype']}, {row['pass']}": row["size_name"] for row in rows}


def milliseconds(entry: Mapping[str, Any]) -> float:
    return entry["median"] * 1e3


def mebibytes(entry: Mapping[str, Any]) -> float | None:
    extra = entry.get("peak_extra_bytes")
    return extra / 2**20 if extra else None


def time_against_size(results: Results) -> Iterator[tuple[str, str]]:
    """Title and picture of each series; both axes logarithmic, so that proportional is a slope of one."""
    yield from _against_size(results, "time", "ms", milliseconds)


def memory_against_size(results: Results) -> Iterator[tuple[str, str]]:
    """The same of peak extra memory, where it was measured."""
    yield from _against_size(results, "memory", "extra memory, MiB", mebibytes)


def _against_size(results: Results, plot: str, label: str, value: Value) -> Iterator[tuple[str, str]]:
    names = size_names(results)
    for title, lines in series(results).items():
        figure, axes = _axes(2.9)
        for name, line in draw_growth(axes, lines, names[title], label, value).items():
            _name(line, f"{plot}:{title}:{name}")
        picture = svg(figure)
        if axes.lines:
            yield title, picture


def draw_growth(
    axes: Axes,
    lines: Mapping[str, list[Point]],
    size_name: str,
    label: str = "ms",
    value: Value = milliseconds,
) -> dict[str, Line2D]:
    """One line per alternative through its points that have this value."""
    drawn = {}
    for name, points in lines.items():
        shown = [(size, value(entry)) for size, entry in points if value(entry) is not None]
        if shown:
            x, y = zip(*shown, strict=True)
            (drawn[name],) = axes.plot(x, y, "o-", markersize=4, label=name, color=COLORS[name])
    axes.set(xlabel=size_name, ylabel=label)
    if drawn:
        _log_scales(axes, sorted({size for points in lines.values() for size, _ in points}))
        axes.legend(frameon=False, fontsize=8)
    return drawn


def roofline(results: Results, dtype: str) -> str:
    """Operations per second against operations per byte, under what this machine can do.

    The numbers are those of the cases in the table; baselines are hollow.
    """
    limits = results["ceilings"][dtype]
    arithmetic, memory = limits["flops_per_second"], limits["copy_bytes_per_second"]
    rows = [(i, row) for i, row in enumerate(results["cases"], 1) if row["dtype"] == dtype]
    figure, axes = _axes(3.6)
    intensities = [arithmetic / memory]
    points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for i, row in rows:
        for name, entry in row["alternatives"].items():
            intensities.append(entry["flops"] / row["bytes"])
            points[name].append((i, intensities[-1], entry["flops"] / entry["median"] / 1e9))
    ends = [min(intensities) / 2, arithmetic / memory, max(intensities) * 2]
    (roof,) = axes.plot(
        ends, [min(arithmetic, x * memory) / 1e9 for x in ends], color="#1c2630", linewidth=1.5
    )
    _name(roof, f"roofline:{dtype}:roof")
    for name, marks in points.items():
        ours = name not in ("eager", "torch.compile")
        _, x, y = zip(*marks, strict=True)
        (line,) = axes.plot(
            x,
            y,
            "o",
            markersize=5,
            color=COLORS[name],
            label=name,
            markerfacecolor=COLORS[name] if ours else "white",
        )
        _name(line, f"roofline:{dtype}:{name}")
        for i, across, up in marks if ours else []:
            axes.annotate(str(i), (across, up), xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel="operations per byte moved at the least", ylabel="GFLOP/s")
    _log_scales(axes)
    if points:
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    return svg(figure)


def breakdown(results: Results, operator: str) -> str | None:
    """Of every case of an operator, where the time of each alternative's step goes; its sum is written."""
    bars = [
        (f"{i}  {name}", name, row, entry)
        for i, row in enumerate(results["cases"], 1)
        if row["case"].split()[0] == operator
        for name, entry in row["alternatives"].items()
        if entry.get("passes")
    ]
    if not bars:
        return None
    figure, axes = _axes(0.7 + 0.24 * len(bars))
    shades = {"forward": 1.0, "backward": 0.6, "rest": 0.25}
    for at, (_, name, row, entry) in enumerate(bars):
        whole = max(other["median"] for other in row["alternatives"].values())
        left = 0.0
        for part, seconds in entry["passes"].items():
            (bar,) = axes.barh(
                at, seconds / whole, left=left, color=COLORS[name], alpha=shades[part], height=0.7
            )
            _name(bar, f"breakdown:{row['case']}, {row['dtype']}, {row['pass']}:{name}:{part}")
            left += seconds / whole
        axes.text(left + 0.01, at, f"{digits(entry['median'] * 1e3)} ms", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.2), xlabel="of the slowest alternative's step")
    axes.grid(axis="y", visible=False)
    return svg(figure)


def _axes(height: float) -> tuple[Figure, Axes]:
    with plt.rc_context(STYLE):
        return plt.subplots(figsize=(WIDTH, height), layout="constrained")


def _log_scales(axes: Axes, sizes: Sequence[int] | None = None) -> None:
    """Both axes logarithmic, with labels that have room: at the sizes, or at 1, 2 and 5 of a short range."""
    axes.set(xscale="log", yscale="log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    if sizes:
        axes.set_xticks(sizes, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in sizes])
        axes.set_xticks([], minor=True)


def _name(artist: Artist, name: str) -> None:
    artist.set_gid(re.sub(r"\s", "_", name))


def svg(figure: Figure) -> str:
    """The figure as an <svg> element whose ids clash with no other one's in a page; closes it."""
    buffer = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    own = f"p{zlib.crc32(text.encode()):x}"
    text = re.sub(r'(id="|url\(#|href="#)(?=[a-zA-Z0-9_.]+["\)])', rf"\g<1>{own}-", text)
    return text


def operators(rows: list[Row]) -> list[str]:
    return [*dict.fromkeys(row["case"].split()[0] for row in rows)]
