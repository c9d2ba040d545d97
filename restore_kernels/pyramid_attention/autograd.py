"""The autograd Functions of pyramid attention.

A Function takes its tensors one by one: the levels come as ``query, *keys, *values``, then the
settings (patch_size, softmax_scale, eps, out_scale) and the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_kernels.functions import BackwardFunction, OperatorFunction, map_over_batch
from restore_kernels.pyramid_attention.ops import overload

_SETTINGS = 5  # arguments after the tensors


def soft(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *settings: Any) -> Tensor:
    """The differentiable operator."""
    return _run(PyramidAttention, query, *keys, *values, *settings)


def hard(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *settings: Any) -> Tensor:
    """Its variant that takes the best match alone, differentiable to values."""
    return _run(HardPyramidAttention, query, *keys, *values, *settings)


def _run(function: type[OperatorFunction], *args: Any) -> Tensor:
    """The first result. Without gradients not as a Function: the compiler cannot count variable arguments."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in args[:-_SETTINGS])
    if wanted or torch._C._are_functorch_transforms_active():
        return function.call(*args)[0]
    return function.forward(*args)[0]


def _halves(levels: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(*keys, *values) -> keys, values."""
    count = len(levels) // 2
    return list(levels[:count]), list(levels[count:])


class PyramidAttention(OperatorFunction):
    """(query, *keys, *values, *settings, backend) -> out, log_sum_exp."""

    @staticmethod
    def forward(query, *args):
        *settings, backend = args[-_SETTINGS:]
        return overload("pyramid_attention", backend)(query, *_halves(args[:-_SETTINGS]), *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[-_SETTINGS:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-_SETTINGS], output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, log_sum_exp = ctx.saved_tensors
        if grad_out is None:
            return (None,) * (len(tensors) + _SETTINGS)
        grads = PyramidAttentionBackward.run(grad_out, *tensors, log_sum_exp, *ctx.settings)
        return (*grads, *(None,) * _SETTINGS)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(PyramidAttention, info, in_dims, args)


class PyramidAttentionBackward(BackwardFunction):
    """grad_out, then as saved by ``PyramidAttention`` -> the gradients of query, keys and values."""

    operator = "pyramid_attention"

    @staticmethod
    def forward(grad_out, query, *args):
        *settings, backend = args[-_SETTINGS:]
        *levels, log_sum_exp = args[:-_SETTINGS]
        op = overload("pyramid_attention_backward", backend)
        grad_query, grad_keys, grad_values = op(grad_out, query, *_halves(levels), log_sum_exp, *settings)
        return grad_query, *grad_keys, *grad_values

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(PyramidAttentionBackward, info, in_dims, args)


class HardPyramidAttention(OperatorFunction):
    """(query, *keys, *values, *settings, backend) -> out, index."""

    @staticmethod
    def forward(query, *args):
        *settings, backend = args[-_SETTINGS:]
        return overload("pyramid_attention_hard", backend)(query, *_halves(args[:-_SETTINGS]), *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[-_SETTINGS:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_halves(inputs[1:-_SETTINGS])[1], output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *values, index = ctx.saved_tensors
        none = (None,) * (1 + len(values))
        if grad_out is None:
            return (*none, *(None,) * (len(values) + _SETTINGS))
        patch_size, _, _, out_scale, backend = ctx.settings
        grads = HardPyramidAttentionBackward.run(grad_out, *values, index, patch_size, out_scale, backend)
        return (*none, *grads, *(None,) * _SETTINGS)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(HardPyramidAttention, info, in_dims, args)


class HardPyramidAttentionBackward(BackwardFunction):
    """grad_out, *values, index, patch_size, out_scale, backend -> the gradients of values."""

    operator = "pyramid_attention"

    @staticmethod
    def forward(grad_out, *args):
        *values, index, patch_size, out_scale, backend = args
        op = overload("pyramid_attention_hard_backward", backend)
        return tuple(op(grad_out, values, index, patch_size, out_scale))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(HardPyramidAttentionBackward, info, in_dims, args)
