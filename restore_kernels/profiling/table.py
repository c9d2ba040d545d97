"""The results in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from restore_kernels.profiling.results import HEADINGS, Results, Row, cells, machine_name


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
    for heading in ("", *HEADINGS):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in row["alternatives"]:
        table.add_row(name, *cells(results, row, name))
    return table
