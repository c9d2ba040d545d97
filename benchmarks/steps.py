"""Measures where a training step of each network spends its time, and writes docs/training.md from it.

``python benchmarks/steps.py`` measures all steps, ``python benchmarks/steps.py elf panet:48`` those of some
networks or of one image size, into benchmarks/results/steps/<machine>.json; both write the page. ``--device
cuda`` measures them on a GPU, with eight images of 128x128 in bf16. ``--table`` only writes the page.
``--compile`` times torch.compile of eager PyTorch too: compiling takes minutes for every network.
``--no-bf16`` leaves out our step in bf16: judging it takes eager steps in bf16, whose grouped
convolutions take minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from restore_kernels.profiling.machine import processor_name
from restore_kernels.profiling.results import file_name
from restore_nets import figures
from restore_nets.attribution import OUTSIDE
from restore_nets.files import write_text
from restore_nets.kernel_checks import FIRST_MULTIPLE, NOISE_MULTIPLE
from restore_nets.loss_curves import STEPS as CURVE_STEPS
from restore_nets.loss_curves import LossCurves, loss_curves
from restore_nets.models import list_models
from restore_nets.profile_report import kind_seconds, memory, mfu
from restore_nets.profiling import (
    COMPILED,
    EAGER,
    EAGER_LAST,
    FORMATS,
    MIN_RUNS,
    OURS,
    OURS_BF16,
    WAYS,
    Step,
    baseline,
    profile_step,
)
from restore_nets.training import PHASES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "steps"
PAGE = ROOT / "docs" / "training.md"
STEPS = (
    Step("association", 128), Step("ddsa", 128), Step("drsformer", 128), Step("elf", 128),
    Step("pa_edsr", 48), Step("panet", 48), Step("panet", 96),
)  # fmt: skip
ON_GPU = {"size": 128, "batch": 8, "dtype": "bf16", "device": "cuda"}
# Eager PyTorch needs gigabytes and half a minute for a step of this one.
FEW_RUNS = {"panet 96x96": 2}
CURVE_SIZE = 32  # of the images of the loss curves: 100 steps of every network
LARGEST = 6  # operators of each network that the page names

INTRODUCTION = f"""\
# Where a training step spends its time

`python benchmarks/steps.py --compile` measures, `python benchmarks/steps.py --table` writes this page, and
`restore-nets profile --model drsformer --size 128 --batch 1` shows the same, and more, of one network on your
machine. A step is the trainer's: forward, loss, backward, clipping of the gradients, AdamW, at the published
size of the network, in float32. "Ours" and eager PyTorch are the same network with the fused operators and
with `backend="eager"`; they take turns in one process. Eager PyTorch is measured with images and weights in
NCHW and in channels_last: "eager" is the quicker one, "eager NCHW" is what PyTorch does by default and most
people run. torch.compile compiles eager PyTorch, whole and for this one size. Times are medians (20th to 80th
percentile); kinds of operators are from the quickest of three steps under torch.profiler, so a little slower.
On a GPU (`--device cuda`) a step is of {ON_GPU["batch"]} images of {ON_GPU["size"]}x{ON_GPU["size"]} in bf16,
and the time of an operator is that of the kernels that it starts.

MFU (model FLOPs utilisation) is the rate of the convolutions and products of the network's definition, three
times those of forward, as a share of the highest rate of a matrix product or a 1x1 convolution in any run on
the machine. A step's time multiplied by its MFU is what they alone take at that rate; of 3x3 convolutions
minimal filtering makes fewer operations.

A kind has all that its operators call inside, and a gradient counts where the forward operator does that made
it. Dense convolutions are 3x3; depthwise ones are 3x3 to 7x7; grouped ones have two inputs and one output
each. "Other" is concatenation, addition, resizing, pixel shuffling, linear layers, the loss, and Python
between operators.

Before it is timed, the loss and the gradient of every alternative are held to those of eager PyTorch: in
float32 to a multiple of what moving the weights by one rounding does to them, in bf16 to twice what bf16 does
to them in eager PyTorch. What is further off is "wrong" and gets no time.

The losses are those of {CURVE_STEPS} steps, a whole schedule, on crops of photos of
{CURVE_SIZE}x{CURVE_SIZE}, from one seed. "By rounding" is what moving every weight of eager PyTorch by one
unit in the last place before every step does, the most that it does in several runs. Ours "follows" where
it parts from eager PyTorch after at least half as many steps, or at the first by at most {FIRST_MULTIPLE:g}
times what rounding does to the first loss, and later by at most {NOISE_MULTIPLE:g} times as much.
The learning rate is 1e-3 after a warm-up of one step, far above that of published trainings: these steps
compare implementations, they train nothing."""


def steps_on(device: str) -> tuple[Step, ...]:
    if device == "cpu":
        return STEPS
    return tuple(Step(model, **{**ON_GPU, "device": device}) for model in list_models())


def measure(steps: list[Step], ways: tuple[str, ...], device: str = "cpu") -> Path:
    """Measure these of ``steps_on(device)`` in these ways, and keep what the file has of the others."""
    path = RESULTS / file_name(processor_name() if device == "cpu" else torch.cuda.get_device_name(device))
    results = json.loads(path.read_text()) if path.exists() else []
    for step in steps:

        def say(stage: str, step: Step = step) -> None:
            print(f"{time.strftime('%X')} {_name(asdict(step))}: {stage}", flush=True)

        min_runs = FEW_RUNS.get(_name(asdict(step)), MIN_RUNS)
        try:
            result = profile_step(step, ways, min_runs=min_runs, on_stage=say)
        except torch.OutOfMemoryError as error:
            say(f"not measured: {error}")
            continue
        if step == next(first for first in steps_on(device) if first.model == step.model):
            curve = Step(step.model, CURVE_SIZE, device=device)
            result["losses"] = loss_curves(curve, on_stage=say).data()
        results = [other for other in results if _name(other["step"]) != _name(result["step"])] + [result]
        results.sort(key=lambda result: (result["step"]["model"], result["step"]["size"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results, indent=1) + "\n")
        write_page()
    return path


def _name(step: dict[str, Any]) -> str:
    batch = f"{step['batch']}x" if step["batch"] > 1 else ""
    dtype = f", {step['dtype']}" if step["dtype"] != "float32" else ""
    return f"{step['model']} {batch}{step['size']}x{step['size']}{dtype}"


def write_page() -> None:
    write_text(PAGE, page())
    for path in RESULTS.glob("*.json"):
        panels = {
            model: {EAGER: curve.agreement.eager, OURS: curve.ours, OURS_BF16: curve.narrow}
            for model, curve in _curves(json.loads(path.read_text())).items()
        }
        if panels:
            write_text(_figure(path), figures.svg(figures.loss_panels(panels)))


def _figure(path: Path) -> Path:
    return PAGE.with_name(f"losses-{path.stem}.svg")


def page() -> str:
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        parts.append(machine_tables(results))
        if _curves(results):
            parts.append(f"![Losses in float32 and bf16, ours and eager]({_figure(path).name})")
    return "\n\n".join([INTRODUCTION, *parts]) + "\n"


def machine_tables(results: list[dict[str, Any]]) -> str:
    """All of one machine's results: of steps, of kinds before and after, and the largest operators."""
    machine = results[0]["machine"]
    name = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [f"## {name}, torch {machine['torch']}", "", *_step_table(results)]
    lines += ["", "### Phases and memory", "", *_phase_table(results)]
    for heading, which in (("ours", lambda rows: OURS), ("eager", baseline)):
        lines += ["", f"### Kinds of operators, {heading}: ms (share of the step)", ""]
        lines += _kind_table(results, which)
    lines += ["", "### Largest operators, ours: ms in themselves", "", *_operators(results)]
    return "\n".join([*lines, "", f"### Losses of {CURVE_STEPS} steps", "", *_loss_table(results)])


def _step_table(results: list[dict[str, Any]]) -> list[str]:
    columns = (
        "network, image", "ours", "eager", "against eager", "against eager NCHW", "eager, the slower format",
        "torch.compile", "against torch.compile", "ours, bf16", "against ours", "MFU, ours", "MFU, eager",
    )  # fmt: skip
    lines = _head(columns)
    peak = max(_peaks(results), default=None)
    for result in results:
        rows, name = result["alternatives"], _name(result["step"])
        eager = baseline(rows)
        slower = EAGER_LAST if eager == EAGER else EAGER
        cells = {which: _spread(result, which) for which in WAYS}
        # Older results have eager PyTorch in the quicker format only, which need not be NCHW.
        default = rows[EAGER]["memory_format"] == FORMATS[WAYS[EAGER].memory_format]
        lines.append(_line(
            name, cells[OURS], cells[eager], _ratio(rows, OURS, eager),
            _ratio(rows, OURS, EAGER) if default else "", cells[slower], cells[COMPILED],
            _ratio(rows, OURS, COMPILED), cells[OURS_BF16], _ratio(rows, OURS_BF16, OURS),
            *(mfu(result, which, peak) for which in (OURS, eager)),
        ))  # fmt: skip
    measured = {_name(result["step"]) for result in results}
    on_gpu = ({**asdict(STEPS[0]), **ON_GPU, "model": model} for model in list_models())
    wanted = on_gpu if results[0]["machine"]["gpu"] else map(asdict, STEPS)
    missing = [name for name in map(_name, wanted) if name not in measured]
    lines += [_line(name, "not measured", *[""] * (len(columns) - 2)) for name in missing]
    wrong = [
        f"- {_name(result['step'])}, {which}: {why}"
        for result in results
        for which, why in result["wrong"].items()
    ]
    of_peak = [f"MFU is of {peak / 1e9:,.0f} GFLOP/s."] if peak else []
    return [line for part in (lines, of_peak, wrong) if part for line in ("", *part)][1:]


def _peaks(results: list[dict[str, Any]]) -> list[float]:
    """What the machine multiplied at in the runs, where it was measured."""
    peaks = (result["machine"].get("flops_per_second") for result in results)
    return [peak for peak in peaks if peak is not None]


def _ratio(rows: dict[str, Any], quick: str, slow: str) -> str:
    return f"{rows[slow]['median'] / rows[quick]['median']:.2f}x" if quick in rows and slow in rows else ""


def _phase_table(results: list[dict[str, Any]]) -> list[str]:
    lines = _head(("network, image", *PHASES, "memory, ours", "memory, eager"))
    for result in results:
        rows = result["alternatives"]
        if OURS in rows:
            phases = (f"{rows[OURS]['phases'][phase]['share']:.1%}" for phase in PHASES)
            peaks = memory(rows[OURS]), memory(rows[baseline(rows)])
            lines.append(_line(_name(result["step"]), *phases, *peaks))
    note = (
        "Phases are shares of our step; memory is a step's peak beyond weights, gradients and AdamW's state."
    )
    return [*lines, "", note]


def _curves(results: list[dict[str, Any]]) -> dict[str, LossCurves]:
    return {r["step"]["model"]: LossCurves.of(r["losses"]) for r in results if "losses" in r}


def _loss_table(results: list[dict[str, Any]]) -> list[str]:
    columns = (
        "network", "first loss", "last loss", "largest difference from eager", "by rounding",
        "steps without difference", "by rounding", "verdict", "largest difference of bf16",
    )  # fmt: skip
    lines = _head(columns)
    curves = _curves(results)
    for model, curve in curves.items():
        agreement = curve.agreement
        lines.append(_line(
            model, f"{curve.ours[0]:.4f}", f"{curve.ours[-1]:.4f}", f"{max(agreement.differences):.1e}",
            f"{agreement.largest_noise:.1e}", str(agreement.agreeing_steps),
            str(agreement.noise_agreeing_steps), "follows" if agreement.passed else "does NOT follow",
            f"{curve.largest_narrow_difference:.1e}",
        ))  # fmt: skip
    missing = [name for name in list_models() if name not in curves]
    return lines + [_line(name, "not measured", *[""] * 7) for name in missing]


def _kind_table(results: list[dict[str, Any]], which: Callable[[dict[str, Any]], str]) -> list[str]:
    alternatives = {_name(result["step"]): result["alternatives"] for result in results}
    found = {name: rows.get(which(rows)) for name, rows in alternatives.items()}
    breakdowns = {model: row["breakdown"] for model, row in found.items() if row and "breakdown" in row}
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
        if "breakdown" not in result["alternatives"].get(OURS, {}):
            continue
        operators = result["alternatives"][OURS]["breakdown"]["operators"]
        largest = sorted(operators.items(), key=lambda item: -item[1][1])[:LARGEST]
        named = (
            f"{name} {seconds * 1e3:,.1f}" + ("" if name == OUTSIDE else f" ({calls} calls)")
            for name, (calls, seconds) in largest
        )
        lines.append(f"- {_name(result['step'])}: {', '.join(named)}")
    return lines


def _spread(result: dict[str, Any], which: str) -> str:
    if which not in result["alternatives"]:
        return "wrong" if which in result["wrong"] else "not measured"
    row = result["alternatives"][which]
    times = f"{row['median'] * 1e3:,.0f} ms ({row['p20'] * 1e3:,.0f} to {row['p80'] * 1e3:,.0f})"
    return f"{times}, {row['memory_format']}"


def _head(columns: tuple[str, ...]) -> list[str]:
    return [_line(*columns), "|" + "---|" * len(columns)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def chosen(names: list[str], device: str = "cpu") -> list[Step]:
    """The steps of networks given as NAME or NAME:SIZE, or all.

    Raises:
        ValueError: there is no such network, size or device.
    """
    steps = steps_on(device)
    known = {name for step in steps for name in (step.model, f"{step.model}:{step.size}")}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"MODEL must be of {', '.join(sorted(known))}; got {', '.join(unknown)}")
    return [step for step in steps if not names or {step.model, f"{step.model}:{step.size}"} & set(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps and write docs/training.md.")
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="network, or network:size; all, if none is given"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes each")
    parser.add_argument("--no-bf16", action="store_true", help="without ours in bf16, which takes minutes")
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args()
    try:
        steps = chosen(args.models, args.device)
    except ValueError as error:
        parser.error(str(error))
    if not args.table:
        no_bf16 = args.no_bf16 or args.device != "cpu"  # where all are in bf16
        left_out = {way for way, out in ((COMPILED, not args.compile), (OURS_BF16, no_bf16)) if out}
        ways = tuple(way for way in WAYS if way not in left_out)
        print(f"wrote {measure(steps, ways, args.device)}")
    write_page()
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
