"""The autograd Functions of dense convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels.dense_conv.ops import overload
from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch


def dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.dense_conv(x, weight, bias)
    return DenseConv.call(x, weight, bias, backend)[0]


class DenseConv(OperatorFunction):
    """(x, weight, bias, backend) -> (out,)."""

    @staticmethod
    def forward(x, weight, bias, backend):
        return (overload("dense_conv", backend)(x, weight, bias),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        x, weight, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:-1]
        if grad_out is None:
            return (None,) * 4
        grads = DenseConvBackward.run(grad_out, *ctx.saved_tensors, wanted, ctx.backend)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = in_dims[1] is None and in_dims[2] is None
        return map_over_batch(DenseConv, info, in_dims, args, fold=fold, unbatched=(1, 2))


class DenseConvBackward(BackwardFunction):
    """(grad_out, x, weight, wanted, backend) -> the gradients of x, weight and bias."""

    operator = "dense_conv2d"

    @staticmethod
    def forward(grad_out, x, weight, wanted, backend):
        return overload("dense_conv_backward", backend)(grad_out, x, weight, list(wanted))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        # The gradients of weight and bias are summed over the batch.
        return map_over_batch(DenseConvBackward, info, in_dims, args, fold=False)
