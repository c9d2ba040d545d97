"""Runs a case: correctness first, then time and memory against the published computation."""

from __future__ import annotations

import dataclasses
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restore_kernels.profiling.cases import BenchmarkCase, Inputs
from restore_kernels.profiling.machine import peak_extra_memory
from restore_kernels.profiling.measure import interleave
from restore_kernels.recording import record

BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

# How far a backend may be from the float64 result, in units of the published computation's own distance
# in the same dtype; and a floor in units of the dtype's precision, for results that happen to be exact.
ERROR_RATIO, ERROR_FLOOR = 4.0, 8.0

# A single number, such as the gradient of a temperature, may come out right by luck. What is further off
# is held to what it changes by in float64 when every input is rounded once to float32, in the largest of
# some draws; a computation rounds several times.
DRAWS, ROUNDINGS = 3, 8.0

# Of calls that take seconds on a CPU, with more operations than this, fewer are made.
SLOW = 2e10

# Growing sizes are compared with the published computation as long as it takes no more operations and
# elements than this: minutes and many gigabytes are spent better.
AFFORDABLE = {"cpu": (5e11, 1e9), "cuda": (5e13, 1e10)}


def runnable_backends(case: BenchmarkCase, x: Inputs, device: str) -> list[str]:
    why_not = case.why_not(x)
    return [name for name in BACKENDS[device] if why_not[name] is None]


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((x.detach().double() - t.detach()).norm() / t.detach().norm().clamp(min=1e-30))
        for (name, x), t in zip(results.items(), truth.values(), strict=True)
    }


def wrong(case: BenchmarkCase, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the backend's output or a gradient is not right, or None."""
    excerpt = case.excerpt(case.inputs(dtype, device, seed=1))

    def results(x: Inputs, name: str) -> dict[str, Tensor]:
        return excerpt.cut(x.results(lambda x: case.ours(x, name), case.backward))

    truth = results(excerpt.part.double(), "eager")
    eager = relative_errors(results(excerpt.part, "eager"), truth)
    ours = relative_errors(results(excerpt.whole, backend), truth)
    floor = ERROR_FLOOR * torch.finfo(dtype).eps
    suspects = [name for name, error in ours.items() if not error <= max(ERROR_RATIO * eager[name], floor)]
    if suspects:
        draws = [
            relative_errors(results(excerpt.part.double().perturbed(seed), "eager"), truth)
            for seed in range(DRAWS)
        ]
        for name in suspects:
            if not ours[name] <= ROUNDINGS * max(draw[name] for draw in draws):
                return f"{name}: relative error {ours[name]:.1e}, eager's own is {eager[name]:.1e}"
    return None


def failure(attempt: Callable[[], str | None]) -> str | None:
    """What it returns, or how it fails: a kernel that does not compile takes no time from the others."""
    try:
        return attempt()
    except Exception as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def measure(
    case: BenchmarkCase, device: str, dtype: torch.dtype, seconds: float, *, compared: bool = True,
    compiled: bool = False, passes: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row of the results: every alternative's time and memory, and what it had to move and compute.

    Args:
        compared: the published computation is timed too, if ``compiled`` under torch.compile as well.
        passes: say what the passes take of a step.
    """
    x = case.inputs(dtype, device)
    row: dict[str, Any] = {
        "case": case.name, "series": case.series, "size": case.size, "size_name": case.size_name,
        "dtype": str(dtype).removeprefix("torch."),
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
        if (reason := failure(calls["torch.compile"])) is not None:
            row["wrong"]["torch.compile"] = reason
            del calls["torch.compile"]
    published = set(calls)
    for backend in runnable_backends(case, x, device):
        reason = failure(partial(wrong, case, backend, device, dtype))
        if reason is not None:  # no speed for a wrong result
            row["wrong"][backend] = reason
            continue
        calls[backend] = lambda backend=backend: case.step(x, lambda x: case.ours(x, backend))
    if not calls:
        return row
    effort: dict[str, Any] = (
        {"min_runs": 3, "warm_ups": 1} if max(case.flops, case.published_flops) > SLOW else {}
    )
    for name, timing in interleave(calls, seconds=seconds, device=device, **effort).items():
        flops = case.published_flops if name in published else case.flops
        row["alternatives"][name] = {**dataclasses.asdict(timing), "flops": flops}
        if device == "cuda":
            row["alternatives"][name]["peak_extra_bytes"] = peak_extra_memory(calls[name], device)
        if passes and name != "torch.compile":
            shares = pass_shares(case, x, name, device)
            taken = {part: share * timing.median for part, share in shares.items()}
            row["alternatives"][name]["passes"] = taken
    if device == "cpu":
        names = [name for name in calls if name != "torch.compile"]
        with ThreadPoolExecutor(2) as pool:  # two processes at a time
            for name, extra in zip(names, pool.map(partial(cpu_memory, case, dtype), names), strict=True):
                row["alternatives"][name]["peak_extra_bytes"] = extra
    return row


def pass_shares(case: BenchmarkCase, x: Inputs, name: str, device: str, steps: int = 3) -> dict[str, float]:
    """What the passes of an alternative take of the same step, the median of a few, and what is left over."""
    found: list[dict[str, float]] = []
    for _ in range(steps):
        if name == "eager":
            start = _done(device)
            with torch.set_grad_enabled(case.backward):
                case.published(x)
            forward = _done(device) - start
        start = _done(device)
        with record() as records:
            case.step(x, case.published if name == "eager" else partial(case.ours, backend=name))
        total = _done(device) - start
        if name == "eager":
            passes = {"forward": min(forward, total)}
            if case.backward:
                passes["backward"] = total - passes["forward"]
        else:
            passes = {each.direction: each.seconds for each in records}
        found.append({part: seconds / total for part, seconds in passes.items()})
    shares = {part: statistics.median(step[part] for step in found) for part in found[0]}
    return {**shares, "rest": max(0.0, 1 - sum(shares.values()))}


def _done(device: str) -> float:
    """The time when the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def affordable(case: BenchmarkCase, device: str) -> bool:
    """Whether the published computation of a case is worth waiting for."""
    flops, elements = AFFORDABLE[device]
    return case.published_flops <= flops and case.published_elements <= elements


def cpu_memory(case: BenchmarkCase, dtype: torch.dtype, backend: str) -> int | None:
    """Peak extra memory of a case's first step, in a process of its own."""
    script = "from restore_kernels.profiling.run import print_first_step_memory as run; run()"
    call = pickle.dumps((case, backend, dtype, torch.get_num_threads()))
    run = subprocess.run([sys.executable, "-c", script], input=call, capture_output=True, check=True)
    return None if run.stdout.strip() == b"None" else int(run.stdout)


def print_first_step_memory() -> None:
    """In that process."""
    case, backend, dtype, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    steps = []
    for each in (case.small, case):  # the small one loads libraries and starts threads
        x = each.inputs(dtype, "cpu")
        forward = each.published if backend == "eager" else partial(each.ours, backend=backend)
        steps.append(partial(each.step, x, forward))
    steps[0]()
    print(peak_extra_memory(steps[1], "cpu"))


def trace(cases: Sequence[tuple[BenchmarkCase, torch.dtype, Sequence[str]]], device: str, path: Path) -> None:
    """Write a Chrome trace of one step of every case's alternatives, but for torch.compile's."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for case, dtype, names in cases:
            x = case.inputs(dtype, device)
            for name in names:
                if name == "torch.compile":
                    continue
                forward = case.published if name == "eager" else partial(case.ours, backend=name)
                with torch.profiler.record_function(f"{case}: {name}"):
                    case.step(x, forward)
    profiler.export_chrome_trace(str(path))
