"""The autograd Functions of bilinear resizing, which is linear: nothing is saved for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels.bilinear_resize.ops import overload
from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch


def bilinear_resize(
    x: Tensor, residual: Tensor | None, doubles: bool, height: int, width: int, backend: str
) -> Tensor:
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.bilinear_resize(x, residual, doubles, height, width)
    return BilinearResize.call(x, residual, doubles, height, width, backend)[0]


class BilinearResize(OperatorFunction):
    """(x, residual, doubles, height, width, backend) -> (out,)."""

    @staticmethod
    def forward(x, residual, doubles, height, width, backend):
        return (overload("bilinear_resize", backend)(x, residual, doubles, height, width),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        x, _, ctx.doubles, *_, ctx.backend = inputs
        ctx.size = x.shape[2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_residual, *_ = ctx.needs_input_grad
        if grad_out is None:
            return (None,) * 6
        grad_x = None
        if of_x:
            (grad_x,) = BilinearResizeBackward.run(grad_out, ctx.doubles, *ctx.size, ctx.backend)
        return grad_x, grad_out if of_residual else None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(BilinearResize, info, in_dims, args)


class BilinearResizeBackward(BackwardFunction):
    """(grad_out, doubles, height, width, backend) -> (grad_x,)."""

    operator = "bilinear_resize"

    @staticmethod
    def forward(grad_out, doubles, height, width, backend):
        return (overload("bilinear_resize_backward", backend)(grad_out, doubles, height, width),)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(BilinearResizeBackward, info, in_dims, args)
