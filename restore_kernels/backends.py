"""Who can run a call, who runs it, and why the others do not.

``why_not`` lists the backends in order of preference, each with ``None`` if it can run the call and
otherwise one line that says why it cannot. ``choose`` picks; a backend that was asked for by name never
falls back, except to others named after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from restore_kernels import choices, native

NAMES = ("auto", "eager", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "RESTORE_KERNELS_BACKEND"

Backend = str | tuple[str, ...] | list[str]  # a name, or several in order of preference

# Innermost `use_backend` last. A plain list, so that torch.compile guards on its content.
_requested: list[tuple[str, ...]] = []


def check_names(names: Backend, source: str) -> tuple[str, ...]:
    several = tuple(names) if isinstance(names, (tuple, list)) else (names,)
    if not several:
        raise ValueError(f"{source} must name at least one of {', '.join(NAMES)}")
    for name in several:
        if name not in NAMES:
            raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return several


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Name the backend of every call in the block that does not name one itself.

    Args:
        names: ``auto``, ``eager``, ``cpu``, ``triton`` or ``cuda``. Of several, the first that can run a call
            runs it: ``use_backend("cuda", "triton")`` is CUDA C++ wherever that has a kernel.

    Raises:
        ValueError: if a name is none of these, or there is no name.
    """
    _requested.append(check_names(names, "use_backend(name)"))
    try:
        yield
    finally:
        _requested.pop()


def requested(argument: Backend) -> tuple[str, ...]:
    """The backends in force: the call's own, else the block's, else the process's, else auto."""
    own = check_names(argument, "backend")
    if own != ("auto",):
        return own
    if _requested:
        return _requested[-1]
    names = os.environ.get(ENVIRONMENT_VARIABLE, "auto").split(",")
    return check_names([name.strip() for name in names], ENVIRONMENT_VARIABLE)


def is_cpu_first(argument: Backend) -> bool:
    """Whether a call with tensors on the CPU gets the backend ``cpu``, if that is built."""
    if argument == "auto":
        if _requested:
            return _requested[-1][0] in ("auto", "cpu")
        return ENVIRONMENT_VARIABLE not in os.environ
    return argument == "cpu"


@dataclass(frozen=True)
class Call:
    """A call of an operator, as far as the choice of its backend goes.

    Attributes:
        operator: its name.
        kind: what distinguishes kernels of the same operator, such as the layout.
        tensors: its tensor arguments; the first one stands for all: device, dtype, shape.
        refusals: of backends whose kernels do not cover the call, whatever the device: why.
        not_by_default: of backends that are slower than a later one at such a call: why. ``auto`` leaves them
            out.
    """

    operator: str
    kind: str
    tensors: tuple[Tensor, ...]
    refusals: Mapping[str, str] = field(default_factory=dict)
    not_by_default: Mapping[str, str] = field(default_factory=dict)


def why_not(call: Call) -> dict[str, str | None]:
    """For every backend, best first: why it cannot run the call, or None."""
    return {name: _why_not(name, call) for name in _order(call)}


def _why_not(name: str, call: Call) -> str | None:
    return _REASONS[name](call) or call.refusals.get(name)


def _order(call: Call) -> tuple[str, ...]:
    """On a GPU the faster one of its two comes first."""
    x = call.tensors[0]
    if x.device.type == "cuda" and choices.faster(f"{call.operator} {call.kind}", x) == "cuda":
        return "cuda", "triton", "cpu", "eager"
    return tuple(_REASONS)


def _by_default(call: Call) -> tuple[str, ...]:
    return tuple(name for name in _order(call) if name not in call.not_by_default)


def _cpu(call: Call) -> str | None:
    device = call.tensors[0].device
    return native.why_no_cpu_library() if device.type == "cpu" else f"it needs CPU tensors, got {device}"


def _triton(call: Call) -> str | None:
    x = call.tensors[0]
    return _float64(x) or native.why_no_triton(x.device.type, x.device.index)


def _cuda(call: Call) -> str | None:
    x = call.tensors[0]
    return _float64(x) or native.why_no_cuda(x.device.type, x.device.index)


def _float64(x: Tensor) -> str | None:
    return "it computes float32, bfloat16 and float16, got float64" if x.dtype == torch.float64 else None


_REASONS: dict[str, Callable[[Call], str | None]] = {
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
    "eager": lambda call: None,
}


def choose(call: Call, backend: Backend) -> str:
    """The backend that runs this call.

    Raises:
        RuntimeError: if none of those asked for by name can run it; the message says why, for each.
    """
    refusals = []
    for name in requested(backend):
        for candidate in _by_default(call) if name == "auto" else (name,):
            reason = _why_not(candidate, call)
            if reason is None:
                return candidate
            refusals.append(f"backend {candidate!r} cannot run this call: {reason}")
    raise RuntimeError(f"{call.operator}: {'; '.join(refusals)}")


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets (``chosen``, None if no requested one can run it), and why.

    ``why_not`` has None for a backend that can run the call; ``not_by_default`` says why ``auto`` leaves one
    out all the same.
    """

    operator: str
    requested: str
    chosen: str | None
    why_not: dict[str, str | None]
    not_by_default: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: requested {self.requested}, runs on {self.chosen or 'nothing'}"]
        for name, reason in self.why_not.items():
            state = "available" if reason is None else f"no: {reason}"
            if name == self.chosen:
                state = "chosen"
            elif reason is None and name in self.not_by_default:
                state = f"available, not by default: {self.not_by_default[name]}"
            lines.append(f"  {name:<7}{state}")
        return "\n".join(lines)


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend ``operator(*args, **kwargs)`` would use and why each other one is not used.

    The call is checked but not run, so bad arguments raise as they would in the call itself.

    Example:
        >>> print(restore_kernels.explain(restore_kernels.topk_attention, q, k, v, [24, 32]))
    """
    try:
        plan = operator.plan  # type: ignore[attr-defined]
    except AttributeError:
        raise TypeError(f"operator must be a restore_kernels operator; got {operator!r}") from None
    call = plan(*args, **kwargs)
    names = requested(kwargs.get("backend", "auto"))
    reasons = why_not(call)
    runnable = [candidate for candidate, reason in reasons.items() if reason is None]
    default = next(candidate for candidate in _by_default(call) if candidate in runnable)
    chosen = (default if name == "auto" else name for name in names if name in ("auto", *runnable))
    return Explanation(call.operator, ", ".join(names), next(chosen, None), reasons, call.not_by_default)
