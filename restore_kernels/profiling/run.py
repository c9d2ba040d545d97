"""Runs cases: correctness first, then time and memory against the published computation.

``python -m restore_kernels.profiling.run --device cpu --out benchmarks/results`` writes one results
file, named after the processor, which the tables of the README are made from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restore_kernels.info import info
from restore_kernels.profiling.cases import CPU_CASES, GPU_CASES, GROWTH_CASES, Case, Inputs
from restore_kernels.profiling.machine import ceilings, peak_extra_memory, processor_name
from restore_kernels.profiling.measure import interleave

CASES = {"cpu": CPU_CASES, "cuda": GPU_CASES}
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far a backend may be from the float64 result, in units of the published computation's own distance
# in the same dtype; and a floor in units of the dtype's precision, for results that happen to be exact.
ERROR_RATIO, ERROR_FLOOR = 4.0, 8.0

# A call of more operations than this takes seconds on a CPU: fewer are made of it.
SLOW = 2e10


def runnable_backends(case: Case, device: str, dtype: torch.dtype) -> list[str]:
    why_not = case.why_not(case.inputs(dtype, device))
    return [name for name in BACKENDS[device] if why_not[name] is None]


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((x.detach().double() - t.detach()).norm() / t.detach().norm().clamp(min=1e-30))
        for (name, x), t in zip(results.items(), truth.values(), strict=True)
    }


def wrong(case: Case, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the backend's output or a gradient is not right, or None."""
    excerpt = case.excerpt(case.inputs(dtype, device, seed=1))

    def results(x: Inputs, name: str) -> dict[str, Tensor]:
        return excerpt.cut(x.results(lambda x: case.ours(x, name), case.backward))

    truth = results(excerpt.part.double(), "eager")
    eager = relative_errors(results(excerpt.part, "eager"), truth)
    ours = relative_errors(results(excerpt.whole, backend), truth)
    floor = ERROR_FLOOR * torch.finfo(dtype).eps
    for name, error in ours.items():
        if not error <= max(ERROR_RATIO * eager[name], floor):
            return f"{name}: relative error {error:.1e}, eager's own is {eager[name]:.1e}"
    return None


def measure(
    case: Case, device: str, dtype: torch.dtype, seconds: float, *, compared: bool = True,
    compiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row of the results: every alternative's time, and what it means against the ceilings.

    Args:
        compared: the published computation is timed too, if ``compiled`` under torch.compile as well.
    """
    x = case.inputs(dtype, device)
    row: dict[str, Any] = {
        "case": case.name, "dtype": str(dtype).removeprefix("torch."),
        "pass": case.timed,
        "flops": case.flops, "bytes": case.elements * x.grad_out.element_size(), "pairs": case.pairs,
        "alternatives": {}, "wrong": {},
    }  # fmt: skip
    calls: dict[str, Callable[[], None]] = {}
    if compared:
        calls["eager"] = lambda: case.step(x, case.published)
    if compared and compiled:
        torch.compiler.reset()  # compiled for this shape, not for what earlier cases had in common with it
        function = torch.compile(case.published_function, dynamic=False)
        calls["torch.compile"] = lambda: case.step(x, lambda x: case.published(x, function))
    published = set(calls)
    for backend in runnable_backends(case, device, dtype):
        reason = wrong(case, backend, device, dtype)
        if reason is not None:  # no speed for a wrong result
            row["wrong"][backend] = reason
            continue
        calls[backend] = lambda backend=backend: case.step(x, lambda x: case.ours(x, backend))
    if not calls:
        return row
    effort = {"min_runs": 3, "warm_ups": 1} if case.flops > SLOW else {}
    for name, timing in interleave(calls, seconds=seconds, device=device, **effort).items():
        flops = case.published_flops if name in published else case.flops
        row["alternatives"][name] = {**dataclasses.asdict(timing), "flops": flops}
    for name, call in calls.items():
        if device == "cuda":
            row["alternatives"][name]["peak_extra_bytes"] = peak_extra_memory(call, device)
    return row


def cpu_memory(case: Case, backend: str) -> int | None:
    """Peak extra memory of a case's first step, in a process of its own."""
    index = (*CPU_CASES, *GROWTH_CASES).index(case)
    script = (
        "from restore_kernels.profiling.run import first_step_memory; "
        f"print(first_step_memory({index}, {backend!r}))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return None if run.stdout.strip() == "None" else int(run.stdout)


def first_step_memory(index: int, backend: str) -> int | None:
    torch.set_num_threads(2)
    case = (*CPU_CASES, *GROWTH_CASES)[index]
    steps = []
    for each in (case.small, case):  # the small one loads libraries and starts threads
        x = each.inputs(torch.float32, "cpu")
        forward = each.published if backend == "eager" else partial(each.ours, backend=backend)
        steps.append(partial(each.step, x, forward))
    steps[0]()
    return peak_extra_memory(steps[1], "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operators against the published computation.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="default: float32, on a GPU bfloat16 too"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per case")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the baseline")
    parser.add_argument(
        "--out", type=Path, help="folder for the results file; without it only a table is printed"
    )
    parser.add_argument("--only", metavar="TEXT", help="cases whose names have this in them; not with --out")
    args = parser.parse_args()
    if args.only and args.out:
        parser.error("a results file has every case: give --only or --out")
    torch.set_num_threads(args.threads)

    device = args.device
    names = args.dtype or (["bfloat16", "float32"] if device == "cuda" else ["float32"])
    results: dict[str, Any] = {
        "machine": {**info(), "processor": processor_name()},
        "ceilings": {},
        "cases": [],
        "growth": [],
    }
    for name in names:
        limits = results["ceilings"][name] = ceilings(device, DTYPES[name])
        print(f"{name}: copies {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
              f"multiplies {limits['flops_per_second'] / 1e9:.0f} GFLOP/s")  # fmt: skip
        for kind, cases in (("cases", CASES[device]), ("growth", GROWTH_CASES)):
            for case in cases:
                if args.only and args.only not in case.name:
                    continue
                row = measure(
                    case, device, DTYPES[name], args.seconds, compared=kind == "cases", compiled=args.compile
                )
                if device == "cpu" and name == "float32":
                    for alternative, entry in row["alternatives"].items():
                        if alternative != "torch.compile":
                            entry["peak_extra_bytes"] = cpu_memory(case, alternative)
                results[kind].append(row)
                print(describe(row, limits), flush=True)
    if args.out:
        save(results, args.out)


def describe(row: dict[str, Any], limits: dict[str, float]) -> str:
    """The row in words; operations are those that each alternative makes."""
    alternatives = row["alternatives"]
    lines = [f"{row['case']} {row['dtype']}, {row['pass']}"]
    for name, entry in alternatives.items():
        seconds, extra = entry["median"], entry.get("peak_extra_bytes")
        lines.append(
            f"  {name:<14}{seconds * 1e3:9.3f} ms ({entry['p20'] * 1e3:.3f} to {entry['p80'] * 1e3:.3f})"
            + (f"{alternatives['eager']['median'] / seconds:7.1f}x" if "eager" in alternatives else "")
            + f"  {entry['flops'] / seconds / limits['flops_per_second']:5.0%} of FLOP/s"
            f"  {row['bytes'] / seconds / limits['copy_bytes_per_second']:5.0%} of bandwidth"
            + ("" if row["pairs"] is None else f"  {seconds / row['pairs'] * 1e9:6.3f} ns per pair")
            + ("" if extra is None else f"  {extra / 2**20:8.1f} MiB")
        )
    lines += [f"  {name:<14}WRONG, no speed: {reason}" for name, reason in row["wrong"].items()]
    return "\n".join(lines)


def save(results: dict[str, Any], folder: Path) -> None:
    machine = results["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["processor"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.json"
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, folder / f"{name}.json")
    print(f"wrote {folder / f'{name}.json'}")


if __name__ == "__main__":
    main()
