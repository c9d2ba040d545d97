"""Writes the tables of README.md from benchmarks/results/*.json; ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
START, END = "<!-- results: python benchmarks/tables.py -->", "<!-- end of results -->"


def tables() -> str:
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))]
    parts = [table(result) for result in results]
    photos = sorted((ROOT / "benchmarks/results/whole_photo").glob("*.json"))
    parts += [photo_table(json.loads(path.read_text())) for path in photos]
    if not any(result["machine"]["gpu"] for result in results):
        parts.append("**NVIDIA GPU**: not measured. `make gpu` measures it.")
    return "\n\n".join(parts)


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        f"**{where}**, torch {machine['torch']}, forward and backward where nothing else is said, "
        "median (20th to 80th percentile):",
        "",
        "| case | backend | time | against eager | FLOP/s of peak | bytes/s of peak | extra memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        limits = result["ceilings"][row["dtype"]]
        eager = row["alternatives"]["eager"]["median"]
        case = f"{row['case']}, {row['dtype']}{', forward' if row['pass'] == 'forward' else ''}"
        for name, entry in row["alternatives"].items():
            seconds, flops = entry["median"], entry.get("flops", row["flops"])
            lines.append(
                f"| {case} | {name} "
                f"| {seconds * 1e3:.2f} ms ({entry['p20'] * 1e3:.2f} to {entry['p80'] * 1e3:.2f}) "
                f"| {eager / seconds:.1f}x "
                f"| {flops / seconds / limits['flops_per_second']:.0%} "
                f"| {row['bytes'] / seconds / limits['copy_bytes_per_second']:.0%} "
                f"| {memory(entry)} |"
            )
        lines += [f"| {case} | {name} | wrong: {why} | | | | |" for name, why in row["wrong"].items()]
    limits = [
        f"{dtype}: copies {values['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"multiplies {values['flops_per_second'] / 1e9:.0f} GFLOP/s"
        for dtype, values in result["ceilings"].items()
    ]
    lines += ["", f"Peaks measured in the same run: {'; '.join(limits)}."]
    if result.get("growth"):
        lines += ["", *growth_table(result["growth"])]
    return "\n".join(lines)


def memory(entry: dict[str, Any]) -> str:
    extra = entry.get("peak_extra_bytes")
    return "not measured" if extra is None else f"{extra / 2**20:.1f} MiB"


def per_pair(row: dict[str, Any], seconds: float) -> str:
    return "" if row["pairs"] is None else f"{seconds / row['pairs'] * 1e9:.3f} ns"


def growth_table(rows: list[dict[str, Any]]) -> list[str]:
    """Of one method at growing sizes: what a pair of positions costs."""
    lines = [
        "| growth | backend | time | per pair of positions | extra memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        case = f"{row['case']}, {row['dtype']}, {row['pass']}"
        for name, entry in row["alternatives"].items():
            seconds = entry["median"]
            lines.append(
                f"| {case} | {name} | {seconds * 1e3:.1f} ms | {per_pair(row, seconds)} | {memory(entry)} |"
            )
        lines += [f"| {case} | {name} | wrong: {why} | | |" for name, why in row["wrong"].items()]
    return lines


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


def main() -> None:
    text = README.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    wanted = f"{before}{START}\n{tables()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if wanted != text:
            sys.exit("README.md does not show benchmarks/results: run python benchmarks/tables.py")
    else:
        README.write_text(wanted)


if __name__ == "__main__":
    main()
