"""The autograd Functions of depthwise convolution. Of a rectified output they keep the output itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels.depthwise_conv.ops import overload
from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch


def depthwise_conv(x, weight, bias, dilation, relu, backend) -> Tensor:
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.depthwise_conv(x, weight, bias, dilation, relu)
    return DepthwiseConv.apply(x, weight, bias, dilation, relu, backend)[0]


class DepthwiseConv(OperatorFunction):
    """(x, weight, bias, dilation, relu, backend) -> (out,)."""

    @staticmethod
    def forward(x, weight, bias, dilation, relu, backend):
        return (overload("depthwise_conv", backend)(x, weight, bias, dilation, relu),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        x, weight, bias, ctx.dilation, relu, ctx.backend = inputs
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[0] if relu else None)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 6
        saved = grad_out, *ctx.saved_tensors
        grad_x, grad_weight, grad_bias = DepthwiseConvBackward.run(*saved, ctx.dilation, ctx.backend)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(DepthwiseConv, info, in_dims, args, fold=False)


class DepthwiseConvBackward(BackwardFunction):
    """grad_out, then as saved by ``DepthwiseConv`` -> the gradients of x, weight and bias."""

    operator = "depthwise_conv2d"

    @staticmethod
    def forward(grad_out, x, weight, out, dilation, backend):
        return overload("depthwise_conv_backward", backend)(grad_out, x, weight, out, dilation)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(DepthwiseConvBackward, info, in_dims, args, fold=False)
