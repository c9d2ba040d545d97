"""Times alternatives against each other, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the 20th and 80th percentile of ``runs`` calls."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], 1)
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), p20, p80, len(samples))


def interleave(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    min_runs: int = 5,
    warm_ups: int = 2,
    device: str = "cpu",
    head_start: bool = True,
) -> dict[str, Timing]:
    """Time each alternative, one call of each in turn, until ``seconds`` have passed.

    Turns make drifts of the machine (clock speed, other load) fall on all alternatives alike. On a
    GPU, device events are read and the cache is swept between calls.

    Args:
        alternatives: name -> call without arguments.
        seconds: time to spend on measuring, for all alternatives together.
        min_runs: calls of each at the least, whatever the time.
        warm_ups: calls of each that come first and do not count.
        device: where the calls run: ``"cpu"`` or ``"cuda"``.
        head_start: a GPU idles for two milliseconds before a call, and as much of launching from Python is
            not in its time.
    """
    gpu = torch.device(device).type == "cuda"
    once = _once_on_gpu(torch.device(device), HEAD_START if head_start else 0) if gpu else _once_on_cpu
    for call in alternatives.values():
        for _ in range(warm_ups):
            once(call)
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, samples.values())) < min_runs:
        for name, call in alternatives.items():
            samples[name].append(once(call))
    return {name: Timing.of(values) for name, values in samples.items()}


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, cuDNN multiplies float32 as such, not as TF32: results differ by float32's rounding alone."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = was


HEAD_START = 4_000_000  # cycles, some two milliseconds


def _once_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _once_on_gpu(device: torch.device, idle: int) -> Callable[[Callable[[], object]], float]:
    """Between events, behind kernels that sweep the cache and idle for so many cycles."""
    sweep = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # several times the L2 cache

    def once(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sweep.zero_()
        if idle:
            torch.cuda._sleep(idle)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return once
