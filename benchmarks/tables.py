"""Writes the tables of README.md and docs/performance.md from their data; ``--check`` only compares."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from restore_kernels.profiling.results import HEADINGS, cells, digits, machine_name, roof

ROOT = Path(__file__).parent.parent
START, END = "<!-- results: python benchmarks/tables.py {} -->", "<!-- end of results -->"

Results = dict[str, Any]


def results() -> list[Results]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))]


def summary() -> str:
    """What README.md shows: a line for each case, a column for each machine."""
    parts = [summary_table(results())]
    photos = sorted((ROOT / "benchmarks/results/whole_photo").glob("*.json"))
    parts += [photo_table(json.loads(path.read_text())) for path in photos]
    if not any(result["machine"]["gpu"] for result in results()):
        parts.append("**NVIDIA GPU**: not measured. `make gpu` measures it.")
    return "\n\n".join(parts)


def summary_table(found: list[Results]) -> str:
    lines = [
        f"| case | {' | '.join(map(machine_name, found))} | extra memory, eager / ours |",
        "|---|" + "---|" * (len(found) + 1),
    ]
    rows = [{title(row): row for row in result["cases"]} for result in found]
    for name in dict.fromkeys(name for own in rows for name in own):
        measured = [own[name] for own in rows if name in own]
        times = [summary_cell(own[name]) if name in own else "not measured" for own in rows]
        lines.append(f"| {name} | {' | '.join(times)} | {summary_memory(measured[0])} |")
    return "\n".join(lines)


def summary_cell(row: dict[str, Any]) -> str:
    """The quickest of ours, how many times as long the published computation takes, and what is wrong."""
    found = sorted(ours(row), key=lambda item: item[1]["median"])
    wrong = [name for name in row["wrong"] if name != "torch.compile"]
    faults = ", ".join(f"{name} wrong" for name in wrong)
    if not found:
        return faults or "not measured"
    (name, entry), eager = found[0], row["alternatives"].get("eager")
    ratio = f", {eager['median'] / entry['median']:.1f}x" if eager else ""
    named = f" ({name})" if len(found) + len(wrong) > 1 else ""
    return f"{digits(entry['median'] * 1e3)} ms{ratio}{named}{'; ' if faults else ''}{faults}"


def summary_memory(row: dict[str, Any]) -> str:
    eager = row["alternatives"].get("eager", {})
    return " / ".join([memory(eager), *(memory(entry) for _, entry in ours(row))])


def times() -> str:
    """Every alternative of every case, of each machine."""
    return "\n\n".join(folded(result, time_table(result)) for result in results())


def folded(result: Results, table: str) -> str:
    return f"<details>\n<summary>{machine_name(result)}</summary>\n\n{table}\n\n</details>"


def time_table(result: Results) -> str:
    lines = [
        f"**{machine_name(result)}**, torch {result['machine']['torch']}, forward and backward where nothing "
        "else is said, median (20th to 80th percentile):",
        "",
        f"| case | backend | {' | '.join(HEADINGS)} |",
        "|---|---|" + "---|" * len(HEADINGS),
    ]
    for row in result["cases"]:
        for name in row["alternatives"]:
            shown = [cell or "not measured" for cell in cells(result, row, name)]
            lines.append(f"| {title(row)} | {name} | {' | '.join(shown)} |")
        blank = " |" * (len(HEADINGS) - 1)
        lines += [f"| {title(row)} | {name} | wrong: {why} |{blank}" for name, why in row["wrong"].items()]
    limits = [
        f"{dtype}: copies {values['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"multiplies {values['flops_per_second'] / 1e9:.0f} GFLOP/s"
        for dtype, values in result["ceilings"].items()
    ]
    return "\n".join([*lines, "", f"Measured in the same run: {'; '.join(limits)}."])


def title(row: dict[str, Any]) -> str:
    return f"{row['case']}, {row['dtype']}{', forward' if row['pass'] == 'forward' else ''}"


def ours(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in row["alternatives"].items():
        if name not in ("eager", "torch.compile"):
            yield name, entry


def floors() -> str:
    """Of every case: what each floor alone would take, and what is measured of the higher one."""
    return "\n\n".join(map(floor_table, results()))


def floor_table(result: Results) -> str:
    lines = [
        f"**{machine_name(result)}**:",
        "",
        "| case | operations | bytes | per byte | arithmetic | memory | backend | measured | of the floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        limits = result["ceilings"][row["dtype"]]
        arithmetic = row["flops"] / limits["flops_per_second"]
        memory = row["bytes"] / limits["copy_bytes_per_second"]
        floor = roof(row["flops"], row["bytes"], limits)
        for name, entry in ours(row):
            per_byte = digits(row["flops"] / row["bytes"])
            lines.append(
                f"| {title(row)} | {row['flops'] / 1e9:.3g} G | {row['bytes'] / 1e6:.3g} MB | {per_byte} "
                f"| {digits(arithmetic * 1e3)} ms | {digits(memory * 1e3)} ms | {name} "
                f"| {digits(entry['median'] * 1e3)} ms | {floor.seconds / entry['median']:.0%} |"
            )
    return "\n".join(lines)


def growth() -> str:
    """How time and memory grow: the slope of a line through the points of a log-log plot."""
    return "\n\n".join(growth_table(result) for result in results() if result["growth"])


def growth_table(result: Results) -> str:
    lines = [
        f"**{machine_name(result)}**:",
        "",
        "| growing | backend | from | to | time | power of the size | extra memory | power of the size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for row in result["growth"]:
        for name, entry in row["alternatives"].items():
            label = f"{row['series']}, {row['dtype']}, {row['pass']} | {name}"
            point = row["size"], entry["median"], (entry.get("peak_extra_bytes") or 0) / 2**20
            found.setdefault((label, row["size_name"]), []).append(point)
    for (label, size_name), points in found.items():
        sizes, seconds, extra = zip(*sorted(points), strict=True)
        if len(sizes) < 2:
            continue
        memory = "not measured | "
        if all(extra):
            memory = f"{extra[0]:.1f} to {extra[-1]:.1f} MiB | {slope(sizes, extra):.2f}"
        lines.append(
            f"| {label} | {sizes[0]} {size_name} | {sizes[-1]} | {digits(seconds[0] * 1e3)} to "
            f"{digits(seconds[-1] * 1e3)} ms | {slope(sizes, seconds):.2f} | {memory} |"
        )
    return "\n".join(lines)


def slope(x: tuple[float, ...], y: tuple[float, ...]) -> float:
    """Of the straight line nearest to the points, both logarithmic."""
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return both / sum((a - mean_x) ** 2 for a in log_x)


def photo_table(result: dict[str, Any]) -> str:
    """What benchmarks/whole_photo.py measured."""
    lines = [
        f"**{result['processor']}, {result['threads']} threads**, whole photos, float32:",
        "",
        "| case | time | extra memory |",
        "|---|---|---|",
    ]
    lines += [f"| {row['case']} | {row['seconds']:.1f} s | {memory(row)} |" for row in result["rows"]]
    return "\n".join(lines)


def memory(entry: dict[str, Any]) -> str:
    extra = entry.get("peak_extra_bytes")
    return "not measured" if extra is None else f"{extra / 2**20:.1f} MiB"


# Of each page, what stands between the marks of that name.
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"summary": summary},
    ROOT / "docs/performance.md": {"times": times, "floors": floors, "growth": growth},
}


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with its tables as the results have them."""
    for name, table in tables.items():
        start = START.format(name)
        before, rest = text.split(start)
        _, after = rest.split(END, 1)
        text = f"{before}{start}\n{table()}\n{END}{after}"
    return text


def main() -> None:
    for path, tables in PAGES.items():
        text = path.read_text()
        wanted = filled(text, tables)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif wanted != text:
            sys.exit(f"{path.name} does not show benchmarks/results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
