"""What the CUDA library takes of a device, and that it loads without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import cuda_device
import pytest

from restore_kernels import native

pytestmark = pytest.mark.skipif(cuda_device.compiler() is None, reason="no nvcc")

LIBRARY = cuda_device.ROOT / "restore_kernels/_cuda.so"


@pytest.fixture(scope="module")
def kernels() -> cuda_device.Kernels:
    if not cuda_device.brought_up_to_date():
        pytest.skip("the library was not built here")
    if cuda_device.disassembler() is None:
        pytest.skip("no disassembler")
    return cuda_device.measured()


def test_no_kernel_spills(kernels):
    """Nor lies any array of a thread in memory."""
    assert kernels
    for name, architectures in kernels.items():
        for architecture, taken in architectures.items():
            assert taken["spilled"] == taken["stack"] == 0, f"{name}, {architecture}: {taken}"


def test_the_table_says_what_kernels_take(kernels):
    """After a change: ``python tests/cuda_device.py``, and look at the difference."""
    table = json.loads(cuda_device.TABLE.read_text())
    if table["nvcc"] != cuda_device.compiler():
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    assert kernels.keys() == table["kernels"].keys()
    for name, architectures in kernels.items():
        assert architectures.items() <= table["kernels"][name].items(), name


def test_library_loads_on_this_pytorch():
    """On a build of PyTorch without CUDA too."""
    if not LIBRARY.exists():
        pytest.skip("the library was not built here")
    script = (
        "import torch; from restore_kernels import native; library = native.cuda_library(); "
        "assert library.why_not is None, library.why_not; print(torch.ops.restore_kernels.cuda_build_info())"
    )
    environment = {k: v for k, v in os.environ.items() if k != native.CUDA_HOST_VARIABLE}
    environment["PYTHONPATH"] = str(cuda_device.ROOT)
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"nvcc {cuda_device.compiler()}, sm ")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_library_brings_what_knows_the_current_stream():
    """PyTorch's torch_cuda, by way of torch: without it a CUDA build of PyTorch gives kernels no stream."""
    if not LIBRARY.exists():
        pytest.skip("the library was not built here")
    output = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(re.findall(r"\(NEEDED\).*\[(.*)\]", output))


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    library = tmp_path / "broken.so"
    library.write_bytes(b"no library")
    monkeypatch.setenv(native.CUDA_HOST_VARIABLE, str(library))
    native.cuda_library.cache_clear()
    try:
        reason = native.cuda_library().why_not
    finally:
        native.cuda_library.cache_clear()
    assert reason is not None and "broken.so does not load" in reason and "\n" not in reason
