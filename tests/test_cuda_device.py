"""What the CUDA kernels compile to on devices: resources and instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import host_kernels
import pytest

# Of a processor: 32-bit registers, and bytes of shared memory, of which every block takes 1 KiB besides.
REGISTERS, SHARED = 65536, {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
GRAM_BLOCKS = {"f": 2, "13__nv_bfloat16": 3, "6__half": 3}  # of 128 threads, at once on one processor
PRODUCTS = {"f": "HMMA.1688.F32.TF32", "13__nv_bfloat16": "HMMA.16816.F32.BF16", "6__half": "HMMA.16816.F32"}
GRAM = re.compile(rf"channel_gram_kernelI({'|'.join(PRODUCTS)})Lb[01]E")  # dtype, WIDE


@pytest.fixture(scope="module", params=[80, 90, 100])
def compiled(request, tmp_path_factory) -> tuple[int, list[str], Path]:
    """Architecture, the assembler's report on every kernel (its name first), machine code."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("device") / "device.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += [f"-arch=sm_{request.param}", f"-I{host_kernels.ROOT / 'csrc/cuda'}"]
    result = subprocess.run(
        [*command, host_kernels.ROOT / "tests/cuda_host/device.cu", "-o", cubin],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return request.param, result.stderr.split("Compiling entry function '")[1:], cubin


def test_resources_on_devices(compiled):
    """No kernel spills, and as many blocks of the Gram kernel run at once as its header says."""
    architecture, reports, _ = compiled
    for report in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    grams = [(match, report) for report in reports if (match := GRAM.search(report))]
    assert len(grams) == 3
    for match, report in grams:
        registers, shared = map(int, re.findall(r"Used (\d+) registers.*?(\d+) bytes smem", report)[0])
        granted = -(-registers // 8) * 8 * 128  # in units of eight a thread
        blocks = min(REGISTERS // granted, SHARED[architecture] // (shared + 1024))
        assert blocks >= GRAM_BLOCKS[match[1]], report


def test_instructions_on_devices(compiled):
    """The Gram kernel multiplies by matrix instructions, no more than it needs, and copies 16 bytes."""
    triton = pytest.importorskip("triton")  # whose package has a disassembler; nvcc may come without
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-sass", compiled[2]]
    dumped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = [(match, code) for code in dumped.split("Function : ") if (match := GRAM.search(code))]
    assert len(kernels) == 3
    for match, code in kernels:
        expected = [PRODUCTS[match[1]]] * (3 * 6 * (3 if match[1] == "f" else 1))
        assert re.findall(r"\bHMMA\S*", code) == expected, match[0]
        assert "LDGSTS.E.BYPASS.128" in code, match[0]
