"""The benchmark cases: what is timed, at which sizes, and what it must move and compute at the least.

An operator is one module: a subclass of ``BenchmarkCase``, whose fields are the operator's options on the
command line, and its cases ``CPU``, ``GPU`` and ``GROWTH``. It joins by its name in ``_MODULES``.
"""

from __future__ import annotations

from restore_kernels.profiling.cases import (
    dense,
    depthwise,
    gate,
    masked,
    norm,
    pointwise,
    pyramid,
    resize,
    topk,
)
from restore_kernels.profiling.cases.case import BenchmarkCase, Excerpt, Inputs
from restore_kernels.profiling.cases.masked import MaskedCase
from restore_kernels.profiling.cases.pyramid import PyramidCase
from restore_kernels.profiling.cases.topk import DRSFORMER_BRANCHES, TopKCase

__all__ = [
    "CPU_CASES",
    "DRSFORMER_BRANCHES",
    "GPU_CASES",
    "GROWTH_CASES",
    "OPERATORS",
    "BenchmarkCase",
    "Excerpt",
    "Inputs",
    "MaskedCase",
    "PyramidCase",
    "TopKCase",
]

_MODULES = (topk, masked, pyramid, dense, depthwise, pointwise, norm, gate, resize)

CPU_CASES: tuple[BenchmarkCase, ...] = tuple(case for module in _MODULES for case in module.CPU)
GPU_CASES: tuple[BenchmarkCase, ...] = tuple(case for module in _MODULES for case in module.GPU)
GROWTH_CASES: tuple[BenchmarkCase, ...] = tuple(case for module in _MODULES for case in module.GROWTH)

OPERATORS: dict[str, type[BenchmarkCase]] = {case.operator.__name__: type(case) for case in CPU_CASES}
