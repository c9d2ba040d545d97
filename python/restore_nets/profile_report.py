"""What ``profiling.profile_step`` found, as tables on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from restore_nets import figures
from restore_nets.attribution import KINDS
from restore_nets.flops import utilisation
from restore_nets.profiling import PROFILED_STEPS, WAYS, baseline
from restore_nets.training import PHASES

MODULES, OPERATORS = 14, 18  # rows of the tables: the largest

Result = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A table: a title, column names and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def title(result: Result) -> str:
    step, machine = result["step"], result["machine"]
    shape = f"{step['batch']}x3x{step['size']}x{step['size']}"
    options = "".join(f", {name}={value}" for name, value in step["options"].items())
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    return (
        f"Training step of {step['model']}{options}, {shape}, {step['dtype']}, on {where}, "
        f"torch {machine['torch']}"
    )


def tables(result: Result) -> list[Rows]:
    """All tables of a result."""
    return [_steps(result), _kinds(result), _modules(result), _operators(result)]


def kind_seconds(breakdown: dict[str, Any]) -> dict[str, float]:
    """Of a breakdown, ``"attention, forward"`` and so on -> seconds, in the order of ``KINDS``."""
    seconds = {}
    for kind in KINDS:
        for which in ("forward", "backward"):
            label = kind if kind == "optimizer" else f"{kind}, {which}"
            if which in breakdown["kinds"][kind]:
                seconds[label] = breakdown["kinds"][kind][which]
    return seconds


def _steps(result: Result) -> Rows:
    rows = []
    eager = result["alternatives"][baseline(result["alternatives"])]["median"]
    for name, row in result["alternatives"].items():
        phases = (
            f"{_ms(row['phases'][phase]['median'])} ({row['phases'][phase]['share']:.0%})" for phase in PHASES
        )
        rows.append((
            name, f"{_ms(row['median'])} ({_ms(row['p20'])} to {_ms(row['p80'])})",
            f"{eager / row['median']:.2f}x", mfu(result, name), *phases, memory(row), f"{row['loss']:.6f}",
        ))  # fmt: skip
    rows += [(name, f"wrong: {why}", *[""] * 8) for name, why in result["wrong"].items()]
    columns = ("", "ms a step (p20 to p80)", "against eager", "MFU", *(f"{phase}, ms" for phase in PHASES))
    return Rows("Steps", (*columns, "peak memory", "loss"), rows)


def mfu(result: Result, which: str, peak: float | None = None) -> str:
    """Model FLOPs utilisation of an alternative, if it is known; ``peak`` instead of the result's own."""
    peak = peak or result["machine"].get("flops_per_second")
    row = result["alternatives"].get(which)
    if peak is None or row is None or "flops" not in result or WAYS[which].dtype is not None:
        return ""
    return f"{utilisation(result['flops'], row['median'], peak):.0%}"


def memory(row: dict[str, Any]) -> str:
    extra = row["peak_extra_bytes"]
    return "not measured" if extra is None else f"{extra / 2**20:,.0f} MiB"


def _breakdowns(result: Result) -> dict[str, dict[str, Any]]:
    return {name: row["breakdown"] for name, row in result["alternatives"].items() if "breakdown" in row}


def _kinds(result: Result) -> Rows:
    return _compared(result, "Kinds of operators", "kind", kind_seconds)


def _operators(result: Result) -> Rows:
    def seconds(breakdown: dict[str, Any]) -> dict[str, float]:
        return {name: seconds for name, (_, seconds) in breakdown["operators"].items()}

    def calls(breakdown: dict[str, Any], name: str) -> str:
        return f"{breakdown['operators'].get(name, (0, 0))[0]:.0f}"

    return _compared(result, "Operators, time in themselves", "operator", seconds, calls, OPERATORS)


def _modules(result: Result) -> Rows:
    def seconds(breakdown: dict[str, Any]) -> dict[str, float]:
        return {name: module["exclusive"] for name, module in breakdown["modules"].items()}

    def inclusive(breakdown: dict[str, Any], name: str) -> str:
        module = breakdown["modules"].get(name, {"forward": 0.0, "backward": 0.0, "calls": 0.0})
        return f"{module['calls']:.0f} / {_ms(module['forward'])} / {_ms(module['backward'])}"

    heading = "Modules by class, time in themselves; calls / ms forward / ms backward with all inside"
    return _compared(result, heading, "module", seconds, inclusive, MODULES)


def _compared(
    result: Result, heading: str, what: str, seconds: Callable[[dict[str, Any]], dict[str, float]],
    more: Callable[[dict[str, Any], str], str] | None = None, largest: int | None = None,
) -> Rows:  # fmt: skip
    """Rows of names; for every alternative ms, share of the step and, with ``more``, another column."""
    found = _breakdowns(result)
    by_name = {alternative: seconds(breakdown) for alternative, breakdown in found.items()}
    names = list(dict.fromkeys(name for times in by_name.values() for name in times))
    if largest is not None:
        names = sorted(names, key=lambda name: -max(times.get(name, 0) for times in by_name.values()))[
            :largest
        ]
    rows = []
    for name in names:
        row = [name]
        for alternative, breakdown in found.items():
            time = by_name[alternative].get(name, 0.0)
            row += [_ms(time), f"{time / breakdown['seconds']:.1%}"]
            row += [] if more is None else [more(breakdown, name)]
        rows.append(tuple(row))
    columns = [what]
    for alternative in found:
        columns += [f"{alternative}, ms", "share", *([] if more is None else ["calls"])]
    return Rows(heading, tuple(columns), rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def notes(result: Result) -> list[str]:
    """What the figures are."""
    quicker = baseline(result["alternatives"])
    profiled = (f"{name} {_ms(breakdown['seconds'])} ms" for name, breakdown in _breakdowns(result).items())
    of_kernels = " (all times of kernels added up)" if result["machine"]["gpu"] else ""
    return [
        f"Alternatives take turns in one process; medians, compared with {quicker}. Kinds, modules "
        f"and operators are from the quickest of {PROFILED_STEPS} steps under the profiler{of_kernels}: "
        f"{', '.join(profiled)}.",
        "Peak memory is what a step holds at its peak beyond weights, gradients and the optimizer's state.",
        *_of_utilisation(result),
    ]


def _of_utilisation(result: Result) -> list[str]:
    peak = result["machine"]["flops_per_second"]
    if peak is None:
        return []
    return [
        f"MFU: the rate of the {result['flops'] / 1e9:,.1f} GFLOP that the convolutions and products of the "
        "network's definition are, as a share of that of a matrix product or a 1x1 convolution, the quicker "
        f"one: {peak / 1e9:,.0f} GFLOP/s."
    ]


def print_report(result: Result, console: Console) -> None:
    console.print(title(result), highlight=False)
    for table in tables(result):
        shown = Table(*table.columns, title=table.title, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for note in notes(result):
        console.print(note, highlight=False)


def page(result: Result) -> str:
    """One HTML page that needs nothing beside it."""
    environment = Environment(
        loader=PackageLoader("restore_nets"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    kinds = {name: kind_seconds(breakdown) for name, breakdown in _breakdowns(result).items()}
    phases = {
        name: {phase: row["phases"][phase]["median"] for phase in PHASES}
        for name, row in result["alternatives"].items()
    }
    bars = {"Phases of a step": phases, **({"Kinds of operators": kinds} if kinds else {})}
    return environment.get_template("profile.html").render(
        title=title(result), tables=tables(result), notes=notes(result),
        plots={name: figures.svg(figures.stacked_bars(times)) for name, times in bars.items()},
    )  # fmt: skip
