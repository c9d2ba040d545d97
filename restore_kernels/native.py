"""Finds and loads the compiled libraries, once, lazily.

The CPU library is built once per instruction set (``_cpu_avx512``, ``_cpu_avx2``, or
``_cpu_default`` on machines that are not x86-64); the one that PyTorch itself would use on this
machine is loaded. Loading it registers the ``cpu`` overloads of the operators whose schemas
``ops.py`` defines.

The CUDA library (``_cuda.so``) is built on PyTorch's stable ABI, one for all versions of Python and
PyTorch. For debugging kernels without a GPU, ``RESTORE_KERNELS_CUDA_HOST`` may name a build of the same
sources that runs them on the host: then the ``cuda`` backend takes CPU tensors, slowly.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Library:
    """A loaded library (``module``), or why there is none (``why_not``, one line)."""

    name: str
    module: ModuleType | None
    why_not: str | None


def cpu_library_name() -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "_cpu_default"
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "_cpu_avx512", "AVX2": "_cpu_avx2"}.get(capability, "_cpu_default")


# The module of the CPU library, once it is loaded.
loaded_cpu_module: ModuleType | None = None


@functools.cache
def cpu_library() -> Library:
    global loaded_cpu_module
    name = cpu_library_name()
    if importlib.util.find_spec(f"restore_kernels.{name}") is None:
        return Library(
            name,
            None,
            f"the compiled library restore_kernels.{name} is not installed; "
            "build it on this machine with a C++ compiler: pip install --no-build-isolation -e .",
        )
    try:
        loaded_cpu_module = importlib.import_module(f"restore_kernels.{name}")
        return Library(name, loaded_cpu_module, None)
    except ImportError as error:
        built_for = f"restore_kernels.{name} does not load with torch {torch.__version__}"
        return Library(name, None, f"{built_for} ({_one_line(error)}); rebuild it")


Function = TypeVar("Function", bound=Callable)

CUDA_HOST_VARIABLE = "RESTORE_KERNELS_CUDA_HOST"


@functools.cache
def cuda_library() -> Library:
    host = os.environ.get(CUDA_HOST_VARIABLE)
    path = Path(host) if host else Path(__file__).with_name("_cuda.so")
    if not path.exists():
        return Library(
            path.name,
            None,
            f"the compiled library {path if host else 'restore_kernels/_cuda.so'} is not installed; "
            "build it where nvcc is: pip install --no-build-isolation -e .",
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(path.name, None, f"{path.name} does not load ({_one_line(error)}); rebuild it")
    return Library(path.name, None, None)


def constant_to_the_compiler(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does; that imports the compiler, and so Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@constant_to_the_compiler
def why_no_cpu_library() -> str | None:
    """Why the compiled CPU library cannot be used, or None. Loads it on first call."""
    return cpu_library().why_not


@constant_to_the_compiler
def why_no_cuda_library() -> str | None:
    """Why there is no compiled CUDA library, or None. Loads it on first call."""
    return cuda_library().why_not


@constant_to_the_compiler
def why_no_cuda(device_type: str, device_index: int | None) -> str | None:
    """Why the CUDA C++ kernels cannot run on this device, or None. Loads the library on first call."""
    if os.environ.get(CUDA_HOST_VARIABLE):
        return cuda_library().why_not if device_type == "cpu" else "its host build needs CPU tensors"
    if device_type != "cuda":
        return f"it needs a CUDA tensor, got one on {device_type!r}"
    return cuda_library().why_not or _too_old(device_index)


@constant_to_the_compiler
def why_little_shared_memory(device_type: str, device_index: int | None, needed: int) -> str | None:
    """Why a block of CUDA threads cannot have so many bytes of shared memory, or None."""
    if device_type != "cuda":
        return None
    most = torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin
    return f"it needs {needed} bytes of shared memory a block, this GPU has {most}" if most < needed else None


@constant_to_the_compiler
def why_no_triton(device_type: str, device_index: int | None) -> str | None:
    """Why Triton kernels cannot run on this device, or None. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return (
            f"it needs a CUDA tensor, got one on {device_type!r} (TRITON_INTERPRET=1 runs it there, slowly)"
        )
    return _too_old(device_index)


def _too_old(device_index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
