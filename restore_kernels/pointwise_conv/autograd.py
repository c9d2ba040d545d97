"""The autograd Functions of pointwise convolution. They take the images one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch
from restore_kernels.pointwise_conv.ops import overload


def pointwise_conv(images: Sequence[Tensor], weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.pointwise_conv(images, weight, bias)
    tensors = (*images, weight) if bias is None else (*images, weight, bias)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if wanted or torch._C._are_functorch_transforms_active():
        return PointwiseConv.call(*images, weight, bias, backend)[0]
    # Not as a Function: the compiler cannot count variable arguments.
    return PointwiseConv.forward(*images, weight, bias, backend)[0]


class PointwiseConv(OperatorFunction):
    """(*images, weight, bias, backend) -> (out,)."""

    @staticmethod
    def forward(*args):
        *images, weight, bias, backend = args
        return (overload("pointwise_conv", backend)(images, weight, bias),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        *tensors, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:-1]  # of the images, weight, bias
        if grad_out is None:
            return (None,) * (len(wanted) + 1)
        grads = PointwiseConvBackward.run(grad_out, *ctx.saved_tensors, wanted, ctx.backend)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(PointwiseConv, info, in_dims, args, fold=False)


class PointwiseConvBackward(BackwardFunction):
    """grad_out, *images, weight, what is wanted, backend -> the gradients of images, weight and bias."""

    operator = "pointwise_conv2d"

    @staticmethod
    def forward(grad_out, *args):
        *images, weight, wanted, backend = args
        op = overload("pointwise_conv_backward", backend)
        grad_images, grad_weight, grad_bias = op(grad_out, images, weight, list(wanted))
        return (*grad_images, grad_weight, grad_bias)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(PointwiseConvBackward, info, in_dims, args, fold=False)
