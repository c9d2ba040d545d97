"""The CUDA kernels on the host under AddressSanitizer: a few tests of each, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import conformance
import host_kernels
import pytest

pytestmark = pytest.mark.skipif(
    conformance.DEVICE != "cpu" or host_kernels.why_not() is not None, reason="kernels run on the host"
)

TESTS = host_kernels.ROOT / "tests"
CHOSEN = {
    "test_cuda_channel": "out_proj49 or mask_pixel_major",
    "test_topk_attention": "cuda and channel and test_memory_layouts",
    "test_masked_attention_masks": "cuda and channel and test_broadcast_shapes",
    "test_cuda_token": "keys_masked or equal_scores",
    "test_cuda_pyramid": "ways_through_the_kernels and (one or columns or odd) and (float32 or bfloat16)",
}


def test_memory_is_respected():
    host_kernels.build("sanitize")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--cuda-host", "sanitize"]
    command += ["--require-backends", "cuda", *(TESTS / f"{name}.py" for name in CHOSEN)]
    command += ["-k", " or ".join(f"{name} and ({tests})" for name, tests in CHOSEN.items())]
    result = subprocess.run(
        command, env={**os.environ, **host_kernels.sanitizer_environment()},
        cwd=host_kernels.ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert all(f"{name}.py ." in result.stdout for name in CHOSEN), result.stdout
