"""The results as one page that needs nothing beside it, no script either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from restore_kernels.profiling import figures
from restore_kernels.profiling.results import HEADINGS, Results, cells, machine_name, write_text


def write_html(results: Results, path: Path) -> None:
    """Write the page, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("restore_kernels.profiling"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    machine = results["machine"]
    write_text(
        path,
        environment.get_template("profile.html").render(
            results=results,
            name=machine_name(results),
            headings=HEADINGS,
            rows=[_row(results, row) for row in results["cases"]],
            growth=[_row(results, row) for row in results["growth"]],
            summary=_summary(results),
            rooflines={dtype: figures.roofline(results, dtype) for dtype in results["ceilings"]},
            times=list(figures.time_against_size(results)),
            memories=list(figures.memory_against_size(results)),
            breakdowns={
                operator: picture
                for operator in figures.operators(results["cases"])
                if (picture := figures.breakdown(results, operator)) is not None
            },
            missing={name: why for name, why in machine["backends"].items() if why != "available"},
        ),
    )


def _row(results: Results, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "lines": {name: cells(results, row, name) for name in row["alternatives"]}}


def _summary(results: Results) -> dict[str, tuple[float, float]]:
    """By operator: how many times as fast as eager the fastest backend is, at least and at most."""
    found: dict[str, list[float]] = {}
    for row in results["cases"]:
        times = {name: entry["median"] for name, entry in row["alternatives"].items()}
        ours = [seconds for name, seconds in times.items() if name not in ("eager", "torch.compile")]
        if ours and "eager" in times:
            found.setdefault(row["case"].split()[0], []).append(times["eager"] / min(ours))
    return {operator: (min(ratios), max(ratios)) for operator, ratios in found.items()}
