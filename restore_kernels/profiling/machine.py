"""What the machine can do at the most, and how much memory a call takes."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from restore_kernels.info import info
from restore_kernels.pointwise_conv import pointwise_conv2d
from restore_kernels.profiling.measure import interleave


def ceilings(device: str, dtype: torch.dtype, seconds: float = 2.0) -> dict[str, float]:
    """Measured copy bandwidth (bytes read plus written, per second) and ``peak_flops`` in this dtype."""
    gpu = torch.device(device).type == "cuda"
    source = torch.randn((1 << 30) if gpu else (1 << 26), device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 2048
    products = _products(device, dtype, size)
    timings = interleave({"copy": lambda: target.copy_(source), **products}, seconds=seconds, device=device)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / timings["copy"].p20,
        "flops_per_second": 2 * size**3 / min(timings[name].p20 for name in products),
    }


def peak_flops(device: str, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Measured FLOP/s of products of (size, size) matrices.

    They are PyTorch's matrix product and a 1x1 convolution of ours; the quicker one counts, since PyTorch's
    library leaves half of the vector units idle on some processors.
    """
    timings = interleave(_products(device, dtype, size), seconds=seconds, device=device)
    return 2 * size**3 / min(timing.p20 for timing in timings.values())


def _products(device: str, dtype: torch.dtype, size: int) -> dict[str, Callable[[], object]]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    image, weight = b.view(1, size, -1, 64), a.view(size, size, 1, 1)
    products: dict[str, Callable[[], object]] = {"product": lambda: a @ b}
    try:
        pointwise_conv2d(image, weight)
        products["convolution"] = lambda: pointwise_conv2d(image, weight)
    except Exception:  # it is among what is to be measured, and may fail
        pass
    return products


def machine(device: str) -> dict[str, Any]:
    """What results of this device are kept with: ``info()`` and the processor; a GPU only if it is meant."""
    described = {**info(), "processor": processor_name()}
    if torch.device(device).type != "cuda":
        described |= {"gpu": None, "compute_capability": None}
    return described


def processor_name() -> str:
    """Model, and generation where Linux tells: virtual machines of many call it "AMD EPYC" and no more."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.MULTILINE))
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def peak_extra_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that one call holds at its peak beyond what is held before it; what it returns counts too.

    On the CPU this is resident memory, so the first call in a process is the one to trust: later calls
    reuse what the allocator kept. None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_bytes("VmRSS")
        call()
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024
