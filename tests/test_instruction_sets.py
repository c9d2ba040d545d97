"""The conformance suites again, on the CPU kernels for processors that can do less than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from restore_kernels import info

TESTS = Path(__file__).parent
SUITES = (
    "topk_attention", "masked_attention", "masked_attention_masks", "pyramid_attention",
    "pyramid_attention_hard", "channel_norm", "channel_gate", "bilinear_resize", "dense_conv",
    "depthwise_conv", "pointwise_conv",
)  # fmt: skip


def check_conformance(pytestconfig, suites, cases, environment):
    if "cpu" not in pytestconfig.getoption("--require-backends"):
        pytest.skip("takes a minute; --require-backends cpu asks for it")
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--require-backends", "cpu",
        "-k", cases, *(str(TESTS / f"test_{name}.py") for name in suites),
    ]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = inherited | environment | {"OMP_NUM_THREADS": "1"}  # other tests have the other cores
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "failed" not in result.stdout and " passed" in result.stdout


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is all that this machine has"
)
def test_avx2_kernels_conform(pytestconfig):
    """PyTorch takes the processor for an older one, and so does this package."""
    check_conformance(pytestconfig, SUITES, "cpu and float32", {"ATEN_CPU_CAPABILITY": "avx2"})


@pytest.mark.skipif(info()["cpu_bfloat16"] != "AMX", reason="this machine has no AMX to do without")
def test_bfloat16_conforms_without_amx(pytestconfig):
    check_conformance(pytestconfig, ["pointwise_conv"], "cpu and bfloat16", {"RESTORE_KERNELS_AMX": "0"})
