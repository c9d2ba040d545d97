"""The results in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from restore_kernels.profiling.results import Results, Row, entry_roof, machine_name


def show(results: Results, console: Console) -> None:
    """One table per case, what the machine can do at the most, and who did not run."""
    if not console.is_terminal:
        console.width = 100
    for row in (*results["cases"], *results["growth"]):
        console.print(f"\n[bold]{escape(row['case'])}[/bold], {row['dtype']}, {row['pass']}")
        console.print(_case(results, row))
        for name, reason in row["wrong"].items():
            console.print(f"[red]{name} is WRONG and gets no speed[/red]: {escape(reason)}")
    console.print(f"\n[bold]{escape(machine_name(results))}[/bold], torch {results['machine']['torch']}")
    for dtype, limits in results["ceilings"].items():
        console.print(
            f"{dtype}: copies {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"multiplies {limits['flops_per_second'] / 1e9:.0f} GFLOP/s"
        )
    console.print(
        "The roof is the least time that the operations and the bytes of a computation take at these rates. "
        "What stays in caches can beat that of copies."
    )
    for name, reason in results["machine"]["backends"].items():
        if reason != "available":
            console.print(f"Not measured: {name}: {escape(reason)}")


def _case(results: Results, row: Row) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "ms (p20 to p80)", "vs eager", "of roof", "rate", "extra memory"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    eager = row["alternatives"].get("eager")
    for name, entry in row["alternatives"].items():
        seconds, limit = entry["median"], entry_roof(results, row, entry)
        arithmetic = limit.bound == "arithmetic"
        amount = entry["flops"] if arithmetic else row["bytes"]
        extra = entry.get("peak_extra_bytes")
        table.add_row(
            name,
            f"{_ms(seconds)} ({_ms(entry['p20'])} to {_ms(entry['p80'])})",
            f"{eager['median'] / seconds:.1f}x" if eager else "",
            f"{limit.seconds / seconds:.0%} ({limit.bound})",
            f"{amount / seconds / 1e9:.1f} {'GFLOP/s' if arithmetic else 'GB/s'}",
            "" if extra is None else f"{extra / 2**20:.1f} MiB",
        )
    return table


def _ms(seconds: float) -> str:
    """Three digits of milliseconds, or all before the point."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"
