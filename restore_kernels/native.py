"""Finds and loads the compiled libraries, once, lazily.

The CPU library is built once per instruction set (``_cpu_avx512``, ``_cpu_avx2``, or
``_cpu_default`` on machines that are not x86-64); the one that PyTorch itself would use on this
machine is loaded. Loading it registers the ``cpu`` overloads of the operators whose schemas
``ops.py`` defines.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

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


@functools.cache
def cpu_library() -> Library:
    name = cpu_library_name()
    if importlib.util.find_spec(f"restore_kernels.{name}") is None:
        return Library(
            name,
            None,
            f"the compiled library restore_kernels.{name} is not installed; "
            "build it with a C++ compiler: pip install --no-build-isolation -e .",
        )
    try:
        return Library(name, importlib.import_module(f"restore_kernels.{name}"), None)
    except ImportError as error:
        built_for = f"restore_kernels.{name} does not load with torch {torch.__version__}"
        return Library(name, None, f"{built_for} ({_one_line(error)}); rebuild it")


def _constant_to_the_compiler(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """What ``torch.compiler.assume_constant_result`` does; that imports the compiler, and so Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@_constant_to_the_compiler
def why_no_cpu_library() -> str | None:
    """Why the compiled CPU library cannot be used, or None. Loads it on first call."""
    return cpu_library().why_not


@_constant_to_the_compiler
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
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
