"""What the autograd Functions of all operators share.

Small arguments (temperature, weights) come to them as the caller gave them and are broadcast inside,
where autograd does not watch: a view costs it more than the kernel that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from restore_kernels import backends, checks, native, recording
from restore_kernels.tensors import accumulate_dtype


class OperatorFunction(torch.autograd.Function):
    """A Function whose ``apply`` takes every argument of ``forward`` by position."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As ``torch.autograd.Function.apply``, which binds defaults by inspection: 0.1 ms per call."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def call(cls, *args: Any) -> Any:
        """``apply`` for any arguments: torch.compile traces it only where no tensor is given twice."""
        if not torch.compiler.is_compiling():
            return cls.apply(*args)
        different: list[Any] = []
        for x in args:
            again = isinstance(x, Tensor) and any(x is other for other in different)
            different.append(x.view_as(x) if again else x)
        return cls.apply(*different)


def plain_calls(backend: backends.Backend) -> ModuleType | None:
    """The library that takes calls of plain tensors on the CPU whole, with less overhead than Python.

    Its functions give None for a call that is not clearly theirs. The first call of a process goes through
    Python, which loads the library.
    """
    if torch.compiler.is_compiling() or recording.active or torch._C._are_functorch_transforms_active():
        return None
    return native.loaded_cpu_module if backends.is_cpu_first(backend) else None


def compiled_functions(backend: str) -> ModuleType | None:
    """The library whose autograd nodes can stand for the Functions here: same results, less overhead.

    Compilers and ``torch.func`` transforms see through Python's Functions only.
    """
    if backend != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if recording.active:  # sees the passes of Python's
        return None
    return native.loaded_cpu_module


def eager(name: str, definition: Callable[..., Tensor], *args: Any) -> Tensor:
    """The eager definition of the operator ``name``, which keeps the dtypes of its arguments."""
    with checks.no_autocast(args[0].device.type):
        if not torch.compiler.is_compiling() and recording.active:
            return recording.recorded_eager(name, definition, args)
        return definition(*args)


class BackwardFunction(OperatorFunction):
    """A backward pass as a Function of its own, so that ``torch.func`` transforms compose over it.

    Its last argument is the backend. A second derivative, which only ``backend="eager"`` has, says so
    instead of being wrong. Subclasses name their ``operator``.
    """

    operator = ""

    @classmethod
    def run(cls, *args: Any) -> tuple[Tensor, ...]:
        """The pass as a Function, or, where nothing could transform it, without the cost of one."""
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        return cls.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[-1]

    @classmethod
    def backward(cls, ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{cls.operator} has no second derivative on backend {ctx.backend!r}; backend='eager' has one"
        )


def call_temperature(temperature: Tensor | float | None, q: Tensor, normalize: bool) -> Tensor:
    """The temperature of a call, with its default, as a tensor broadcastable to (B, H, 1, 1).

    Within ``torch.func`` transforms it has all dimensions, see ``map_over_batch``.
    """
    if temperature is None:
        temperature = 1.0 if normalize else float(q.shape[-1] ** -0.5)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((1, 1), temperature, dtype=accumulate_dtype(q.dtype), device=q.device)
    if torch._C._are_functorch_transforms_active():
        temperature = temperature.expand(*q.shape[:2], 1, 1)
    return temperature


def per_head(temperature: Tensor, dtype: torch.dtype, batch: int, heads: int) -> Tensor:
    """A temperature broadcastable to (B, H, 1, 1) as (B, H) in this dtype, any strides."""
    return temperature.to(dtype).expand(batch, heads, 1, 1).view(batch, heads)


def sum_to(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of x broadcast."""
    same = grad.numel() == x.numel()
    return (grad.view(x.shape) if same else grad.sum_to_size(x.shape)).to(x.dtype)


def map_over_batch(
    function: type[torch.autograd.Function], info: Any, in_dims: Sequence[int | None],
    args: Sequence[Any], *, fold: bool = True, unbatched: Sequence[int] = (),
) -> tuple[tuple[Tensor, ...], int]:  # fmt: skip
    """The vmap rule: the mapped dimension joins the batch if ``fold``, else there is one call per slice.

    The arguments at the positions ``unbatched`` have no batch dimension that the mapped one could join.
    """
    size = info.batch_size

    def mapped(x: Any, dim: int | None) -> bool:
        return isinstance(x, Tensor) and dim is not None

    def folded(position: int, x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor) or position in unbatched:
            return x
        x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    pairs = list(zip(args, in_dims, strict=True))
    if fold:
        outputs = function.apply(*(folded(position, *pair) for position, pair in enumerate(pairs)))
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in outputs), 0
    calls = [
        function.apply(*(x.select(dim, i) if mapped(x, dim) else x for x, dim in pairs)) for i in range(size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), 0
