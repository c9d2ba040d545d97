"""Registers the passes of an operator with PyTorch: schemas, fake kernels, one overload per backend.

Each pass is one operator with one overload per backend, for example
``torch.ops.restore_kernels.topk_attention_channel.cpu``. The compiled libraries register theirs
when they are loaded; Triton's are Python and import their kernels on the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from restore_kernels import native, recording

BACKENDS = ("cpu", "triton", "cuda")

# The operators stay registered for as long as this object lives.
_library = torch.library.Library("restore_kernels", "FRAGMENT")


def register(
    schemas: Mapping[str, str], fakes: Mapping[str, Callable], triton_module: str | None
) -> Callable[[str, str], Callable[..., Any]]:
    """Define the passes of an operator; returns what finds one: ``overload(name, backend)``.

    Args:
        schemas: arguments and results of every pass, by its name.
        fakes: the meta kernel of every pass.
        triton_module: has a function of the name of every pass; None: Triton has none.
    """
    # {(name, backend): operator}. Looking an overload up by name takes longer than calling it.
    overloads: dict[tuple[str, str], torch._ops.OpOverload] = {}
    for name, schema in schemas.items():
        for backend in BACKENDS:
            full_name = f"{name}.{backend}"
            tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
            _library.define(full_name + schema, tags=tags)
            torch.library.register_fake(f"restore_kernels::{full_name}", fakes[name], lib=_library)
            overloads[name, backend] = getattr(getattr(torch.ops.restore_kernels, name), backend)
        if triton_module is not None:
            _library.impl(f"{name}.triton", _imported(triton_module, name), "CompositeExplicitAutograd")

    def overload(name: str, backend: str) -> Callable[..., Any]:
        """The operator ``restore_kernels::name`` of a backend, its library loaded."""
        if backend == "cpu":
            native.why_no_cpu_library()
        elif backend == "cuda":
            native.why_no_cuda_library()
        op = overloads[name, backend]
        if not torch.compiler.is_compiling() and recording.active:
            return recording.recorded(name, backend, op)
        return op

    return overload


def _imported(module: str, name: str) -> Callable:
    """The function of that name, its module imported by the first call."""
    return lambda *args: getattr(importlib.import_module(module), name)(*args)
