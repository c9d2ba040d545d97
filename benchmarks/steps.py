"""Measures where a training step of each network spends its time, and writes docs/training.md from it.

``python benchmarks/steps.py`` measures all steps, ``python benchmarks/steps.py elf panet`` those of some
networks, into benchmarks/results/steps/<machine>.json; both write the page. ``--table`` only writes the
page.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from restore_kernels.profiling.machine import processor_name
from restore_nets.attribution import OUTSIDE
from restore_nets.files import write_text
from restore_nets.models import list_models
from restore_nets.profile_report import kind_seconds, memory
from restore_nets.profiling import EAGER, OURS, Step, profile_step
from restore_nets.training import PHASES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "steps"
PAGE = ROOT / "docs" / "training.md"
STEPS = (
    Step("drsformer", 128), Step("ddsa", 128), Step("elf", 128), Step("association", 128), Step("panet", 48),
    Step("pa_edsr", 48),
)  # fmt: skip
LARGEST = 6  # operators of each network that the page names

INTRODUCTION = """\
# Where a training step spends its time

`python benchmarks/steps.py` measures, `python benchmarks/steps.py --table` writes this page, and
`restore-nets profile --model drsformer --size 128 --batch 1` shows the same, and more, of one network on your
machine. A step is the trainer's: forward, loss, backward, clipping of the gradients, AdamW, at the published
size of the network, in float32. "Ours" and eager PyTorch are the same network with the fused operators and
with `backend="eager"`; they take turns in one process. Times are medians (20th to 80th percentile); kinds of
operators are from the quickest of three steps under torch.profiler, so a little slower.

A kind has all that its operators call inside, and a gradient counts where the forward operator does that made
it. Dense convolutions are 3x3; depthwise ones are 3x3 to 7x7; grouped ones have two inputs and one output
each. "Other" is concatenation, addition, resizing, pixel shuffling, linear layers, the loss, and Python
between operators."""


def measure(names: list[str]) -> Path:
    """Measure the steps of these networks, and keep those of the others that the file has."""
    machine = re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    path = RESULTS / f"{machine}.json"
    results = json.loads(path.read_text()) if path.exists() else []
    for step in STEPS:
        if step.model not in names:
            continue
        result = profile_step(step, on_stage=lambda stage, step=step: print(step.model, stage, flush=True))
        results = [other for other in results if other["step"]["model"] != step.model] + [result]
        results.sort(key=lambda result: list_models().index(result["step"]["model"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results, indent=1) + "\n")
    return path


def page() -> str:
    parts = [machine_tables(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    return "\n\n".join([INTRODUCTION, *parts]) + "\n"


def machine_tables(results: list[dict[str, Any]]) -> str:
    """All of one machine's results: of steps, of kinds before and after, and the largest operators."""
    machine = results[0]["machine"]
    name = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [f"## {name}, torch {machine['torch']}", "", *_step_table(results)]
    for alternative in (OURS, EAGER):
        lines += ["", f"### Kinds of operators, {alternative}: ms (share of the step)", ""]
        lines += _kind_table(results, alternative)
    return "\n".join([*lines, "", "### Largest operators, ours: ms in themselves", "", *_operators(results)])


def _step_table(results: list[dict[str, Any]]) -> list[str]:
    columns = ("network", "image", "ours", "eager", "against eager", *PHASES, "memory, ours", "memory, eager")
    lines = _head(columns)
    for result in results:
        step, rows = result["step"], result["alternatives"]
        image = f"{step['batch']}x3x{step['size']}x{step['size']}"
        if OURS not in rows:
            lines.append(_line(step["model"], image, f"wrong: {result['wrong'][OURS]}", *[""] * 8))
            continue
        ours, eager = rows[OURS], rows[EAGER]
        phases = (f"{ours['phases'][phase]['share']:.1%}" for phase in PHASES)
        ratio = f"{eager['median'] / ours['median']:.2f}x"
        times = (_spread(ours), _spread(eager), ratio)
        lines.append(_line(step["model"], image, *times, *phases, memory(ours), memory(eager)))
    missing = {step.model for step in STEPS} - {result["step"]["model"] for result in results}
    lines += [_line(name, "not measured", *[""] * 9) for name in sorted(missing)]
    note = (
        "Phases are shares of our step; memory is a step's peak beyond weights, gradients and AdamW's state."
    )
    return [*lines, "", note]


def _kind_table(results: list[dict[str, Any]], alternative: str) -> list[str]:
    found = {result["step"]["model"]: result["alternatives"].get(alternative) for result in results}
    breakdowns = {model: row["breakdown"] for model, row in found.items() if row is not None}
    by_model = {model: kind_seconds(breakdown) for model, breakdown in breakdowns.items()}
    lines = _head(("kind", *breakdowns))
    for label in dict.fromkeys(label for kinds in by_model.values() for label in kinds):
        cells = []
        for model, kinds in by_model.items():
            seconds, whole = kinds.get(label), breakdowns[model]["seconds"]
            cells.append("" if seconds is None else f"{seconds * 1e3:,.1f} ({seconds / whole:.1%})")
        lines.append(_line(label, *cells))
    wholes = (f"{breakdown['seconds'] * 1e3:,.0f}" for breakdown in breakdowns.values())
    return [*lines, _line("the step under the profiler", *wholes)]


def _operators(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        if OURS not in result["alternatives"]:
            continue
        operators = result["alternatives"][OURS]["breakdown"]["operators"]
        largest = sorted(operators.items(), key=lambda item: -item[1][1])[:LARGEST]
        named = (
            f"{name} {seconds * 1e3:,.1f}" + ("" if name == OUTSIDE else f" ({calls} calls)")
            for name, (calls, seconds) in largest
        )
        lines.append(f"- {result['step']['model']}: {', '.join(named)}")
    return lines


def _spread(row: dict[str, Any]) -> str:
    return f"{row['median'] * 1e3:,.0f} ms ({row['p20'] * 1e3:,.0f} to {row['p80'] * 1e3:,.0f})"


def _head(columns: tuple[str, ...]) -> list[str]:
    return [_line(*columns), "|" + "---|" * len(columns)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps and write docs/training.md.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(list_models())}; all")
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args()
    if unknown := set(args.models) - set(list_models()):
        parser.error(f"MODEL must be of {', '.join(list_models())}; got {', '.join(sorted(unknown))}")
    if not args.table:
        print(f"wrote {measure(args.models or list_models())}")
    write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
