"""The operator cases under pytest-benchmark: ``pytest benchmarks --benchmark-compare`` and so on."""

from functools import partial

import pytest
import torch

from restore_kernels.profiling.cases import CPU_CASES, GPU_CASES
from restore_kernels.profiling.run import runnable_backends, wrong

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("case", GPU_CASES if DEVICE == "cuda" else CPU_CASES, ids=str)
def test_step(benchmark, case, backend):
    x = case.inputs(DTYPE, DEVICE)
    if backend == "eager":
        forward = case.published
    elif backend in runnable_backends(case, DEVICE, DTYPE):
        assert wrong(case, backend, DEVICE, DTYPE) is None
        forward = partial(case.ours, backend=backend)
    else:
        pytest.skip(f"backend {backend} does not run on this {DEVICE}")

    def step():
        case.step(x, forward)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark(step)
