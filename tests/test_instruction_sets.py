"""The conformance suites again, on the build of the CPU kernels for processors without AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SUITES = (
    "topk_attention", "masked_attention", "masked_attention_masks", "pyramid_attention",
    "pyramid_attention_hard", "channel_norm", "dense_conv", "depthwise_conv", "pointwise_conv",
)  # fmt: skip


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is all that this machine has"
)
def test_avx2_kernels_conform(pytestconfig):
    """PyTorch takes the processor for an older one, and so does this package."""
    if "cpu" not in pytestconfig.getoption("--require-backends"):
        pytest.skip("takes a minute; --require-backends cpu asks for it")
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--require-backends", "cpu",
        "-k", "cpu and float32", *(str(TESTS / f"test_{name}.py") for name in SUITES),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}  # other tests have the other cores
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "failed" not in result.stdout and " passed" in result.stdout
