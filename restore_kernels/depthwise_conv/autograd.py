"""The autograd Functions of depthwise convolution.

Of a result that is rectified and not gated they keep the result itself; of all others nothing but what the
call was given: backward computes the convolution again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_kernels.depthwise_conv.ops import overload
from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch


def depthwise_conv(x, weight, bias, slope, gate, dilation, activation, backend) -> Tensor:
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.depthwise_conv(x, weight, bias, slope, gate, dilation, activation)
    args = (weight, *x, bias, slope, gate, dilation, activation, backend)
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    if wanted or torch._C._are_functorch_transforms_active():
        return DepthwiseConv.call(*args)[0]
    # Not as a Function: without gradients the compiler cannot count variable arguments.
    return DepthwiseConv.forward(*args)[0]


class DepthwiseConv(OperatorFunction):
    """(weight, *x, bias, slope, gate, dilation, activation, backend) -> (out,)."""

    @staticmethod
    def forward(weight, *args):
        *x, bias, slope, gate, dilation, activation, backend = args
        op = overload("depthwise_conv", backend)
        return (op(x, weight, bias, slope, gate, dilation, activation),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        *tensors, ctx.dilation, ctx.activation, ctx.backend = inputs
        keeps_out = ctx.activation == "relu" and tensors[-1] is None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0] if keeps_out else None)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad_out is None:
            return (None,) * len(needed)
        of_weight, *of_x, of_bias, of_slope, of_gate = needed[:-3]
        wanted = (*of_x, of_weight or of_bias or of_slope, of_gate)
        grads = DepthwiseConvBackward.run(
            grad_out, *ctx.saved_tensors, ctx.dilation, ctx.activation, wanted, ctx.backend
        )
        return (
            *(grad if wants else None for grad, wants in zip(grads, needed, strict=False)),
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(DepthwiseConv, info, in_dims, args, fold=False)


class DepthwiseConvBackward(BackwardFunction):
    """grad_out, then as saved by ``DepthwiseConv`` -> the gradients of weight, *x, bias, slope and gate."""

    operator = "depthwise_conv2d"

    @staticmethod
    def forward(grad_out, weight, *args):
        *x, bias, slope, gate, out, dilation, activation, wanted, backend = args
        op = overload("depthwise_conv_backward", backend)
        grad_x, grad_weight, *grads = op(
            grad_out, x, weight, bias, slope, gate, out, dilation, activation, wanted
        )
        return grad_weight, *grad_x, *grads

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(DepthwiseConvBackward, info, in_dims, args, fold=False)
