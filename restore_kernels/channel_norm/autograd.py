"""The autograd Function of channel normalisation; weight and bias come in any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels.channel_norm.ops import overload
from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch
from restore_kernels.tensors import accumulate_dtype


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str) -> Tensor:
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.channel_norm(x, weight, bias, eps)
    return ChannelNorm.call(x, weight, bias, eps, backend)[0]


class ChannelNorm(OperatorFunction):
    """(x, weight, bias, eps, backend) -> out, mean, rstd."""

    @staticmethod
    def forward(x, weight, bias, eps, backend):
        dtype = accumulate_dtype(x.dtype)
        bias = None if bias is None else bias.to(dtype)
        return overload("channel_norm", backend)(x, weight.to(dtype), bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, ctx.backend = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 5
        x, weight, mean, rstd = ctx.saved_tensors
        biased = ctx.bias_dtype is not None
        grad_x, grad_weight, grad_bias = ChannelNormBackward.run(
            grad_out, x, weight.to(mean.dtype), mean, rstd, biased, ctx.backend
        )
        grad_bias = grad_bias.to(ctx.bias_dtype) if biased else None
        return grad_x, grad_weight.to(weight.dtype), grad_bias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = in_dims[1] is None and in_dims[2] is None
        return map_over_batch(ChannelNorm, info, in_dims, args, fold=fold, unbatched=(1, 2))


class ChannelNormBackward(BackwardFunction):
    """(grad_out, x, weight, mean, rstd, biased, backend) -> grad_x, grad_weight, grad_bias."""

    operator = "channel_norm"

    @staticmethod
    def forward(grad_out, x, weight, mean, rstd, biased, backend):
        return overload("channel_norm_backward", backend)(grad_out, x, weight, mean, rstd, biased)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        # The gradients of weight and bias are summed over the batch.
        return map_over_batch(ChannelNormBackward, info, in_dims, args, fold=False)
