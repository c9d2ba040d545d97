"""The operator cases under pytest-benchmark, with its options: ``make bench BENCH="--benchmark-compare"``.

A backend is timed if it runs here and its results are right.
"""

from functools import partial

import pytest
import torch

from restore_kernels.profiling.cases import CPU_CASES, GPU_CASES
from restore_kernels.profiling.run import BACKENDS, SLOW, runnable_backends, wrong

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("backend", ["eager", *BACKENDS[DEVICE]])
@pytest.mark.parametrize("case", GPU_CASES if DEVICE == "cuda" else CPU_CASES, ids=str)
def test_step(benchmark, case, backend):
    x = case.inputs(DTYPE, DEVICE)
    if backend == "eager":
        forward = case.published
    elif backend in runnable_backends(case, x, DEVICE):
        assert wrong(case, backend, DEVICE, DTYPE) is None
        forward = partial(case.ours, backend=backend)
    else:
        pytest.skip(f"backend {backend} does not run here: {case.why_not(x)[backend]}")

    def step():
        case.step(x, forward)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    flops = case.published_flops if backend == "eager" else case.flops
    benchmark.group = str(case)
    benchmark.extra_info.update(
        backend=backend, dtype=str(DTYPE), flops=flops, bytes=case.elements * x.grad_out.element_size()
    )
    if flops > SLOW:
        benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    else:
        benchmark(step)
