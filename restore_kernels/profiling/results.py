"""What a run found, as data: against the ceilings of the machine, and in files.

Results are a dictionary as ``benchmarks/results/*.json`` has it: ``machine``, ``ceilings`` by dtype,
``cases`` and ``growth``, which are rows of ``run.measure``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Results = dict[str, Any]
Row = dict[str, Any]


class Roof(NamedTuple):
    """What bounds a computation on this machine: the least seconds it can take, and because of what."""

    seconds: float
    bound: str  # "arithmetic" or "memory"


def roof(flops: float, moved: float, ceilings: dict[str, float]) -> Roof:
    """Of so many operations and bytes moved, at the rates that products and copies reach here."""
    arithmetic = flops / ceilings["flops_per_second"]
    memory = moved / ceilings["copy_bytes_per_second"]
    return Roof(arithmetic, "arithmetic") if arithmetic >= memory else Roof(memory, "memory")


def entry_roof(results: Results, row: Row, entry: dict[str, Any]) -> Roof:
    """Of an alternative: its own operations, the least that any of them must move."""
    return roof(entry["flops"], row["bytes"], results["ceilings"][row["dtype"]])


def machine_name(results: Results) -> str:
    machine = results["machine"]
    return machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"


HEADINGS = ("ms (p20 to p80)", "vs eager", "of roof", "rate", "extra memory")


def cells(results: Results, row: Row, name: str) -> tuple[str, ...]:
    """What is shown of an alternative, under ``HEADINGS``."""
    entry, eager = row["alternatives"][name], row["alternatives"].get("eager")
    seconds, limit = entry["median"], entry_roof(results, row, entry)
    arithmetic = limit.bound == "arithmetic"
    amount = entry["flops"] if arithmetic else row["bytes"]
    extra = entry.get("peak_extra_bytes")
    return (
        f"{digits(seconds * 1e3)} ({digits(entry['p20'] * 1e3)} to {digits(entry['p80'] * 1e3)})",
        f"{eager['median'] / seconds:.1f}x" if eager else "",
        f"{limit.seconds / seconds:.0%} ({limit.bound})",
        f"{amount / seconds / 1e9:.1f} {'GFLOP/s' if arithmetic else 'GB/s'}",
        "" if extra is None else f"{extra / 2**20:.1f} MiB",
    )


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write_csv(results: Results, path: Path) -> None:
    """One line per alternative of every row."""
    lines = [_line(results, kind, row, name) for kind, row, name in _alternatives(results)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(name for line in lines for name in line), restval="")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def _alternatives(results: Results) -> Iterator[tuple[str, Row, str]]:
    for kind in ("cases", "growth"):
        for row in results[kind]:
            for name in (*row["alternatives"], *row["wrong"]):
                yield kind, row, name


def _line(results: Results, kind: str, row: Row, name: str) -> dict[str, Any]:
    line = {
        "kind": kind,
        "case": row["case"],
        "dtype": row["dtype"],
        "pass": row["pass"],
        "alternative": name,
    }
    if name in row["wrong"]:
        return {**line, "wrong": row["wrong"][name]}
    entry = row["alternatives"][name]
    seconds, limit = entry["median"], entry_roof(results, row, entry)
    return {
        **line, "median_seconds": seconds, "p20_seconds": entry["p20"], "p80_seconds": entry["p80"],
        "runs": entry["runs"], "flops": entry["flops"], "bytes": row["bytes"],
        "flops_per_second": entry["flops"] / seconds, "bytes_per_second": row["bytes"] / seconds,
        "bound": limit.bound, "of_roof": limit.seconds / seconds,
        "peak_extra_bytes": entry.get("peak_extra_bytes"),
    }  # fmt: skip


def write_json(results: Results, path: Path) -> None:
    write_text(path, json.dumps(results, indent=1) + "\n")


def is_written_through(path: Path) -> bool:
    """Links, pipes and the like, ``/dev/stdout`` for one: to replace them would break them."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, but for what is written through."""
    if is_written_through(path):
        with path.open("w", newline="") as file:
            file.write(text)
        return
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, newline="")  # lines end as they are
    os.replace(temporary, path)


def file_name(machine: str) -> str:
    """Of a results file, from the name of the processor or GPU."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json"
