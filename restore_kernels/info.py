"""What is installed here: versions, build flags, backends and why those missing are missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from restore_kernels import native
from restore_kernels.version import __version__


def info() -> dict[str, Any]:
    """Versions, the machine, and for every backend ``"available"`` or the reason why it is not.

    ``python -m restore_kernels`` prints it.
    """
    library = native.cpu_library()
    device = ("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else ("cpu", None)
    why_not = {
        "eager": None,
        "cpu": library.why_not,
        "triton": native.why_no_triton(*device),
        "cuda": native.why_no_cuda(*device),
    }
    return {
        "restore_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability())
        if torch.cuda.is_available()
        else None,
        "cpu_library": library.name,
        "cpu_build": library.module.build_info() if library.module else None,
        "cpu_bfloat16": library.module.bfloat16_instructions() if library.module else None,
        "cuda_build": None if native.cuda_library().why_not else torch.ops.restore_kernels.cuda_build_info(),
        "backend_requested": os.environ.get("RESTORE_KERNELS_BACKEND", "auto"),
        "backends": {name: reason or "available" for name, reason in why_not.items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
