"""The autograd Functions of top-k attention, one per layout.

Both keep only what backward cannot cheaply recompute (see ``ops.py``). They support
``torch.func.grad`` and ``vmap`` (the mapped dimension joins the batch); a second derivative raises:
``backend="eager"`` has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from restore_kernels.topk_attention.ops import overload


class ChannelTopKAttention(torch.autograd.Function):
    """(q, k, v, temperature, weights, out_proj, topk, normalize, backend) -> out, similarity, norms."""

    @staticmethod
    def forward(q, k, v, temperature, weights, out_proj, topk, normalize, backend):
        op = overload("topk_attention_channel", backend)
        return op(q, k, v, temperature, weights, out_proj, topk, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, temperature, weights, out_proj, ctx.topk, ctx.normalize, ctx.backend = inputs
        _, similarity, norms = output
        ctx.mark_non_differentiable(similarity, norms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, temperature, weights, out_proj, similarity, norms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 9
        op = overload("topk_attention_channel_backward", ctx.backend)
        *grads, grad_out_proj = op(grad_out, *ctx.saved_tensors, ctx.topk, ctx.normalize)
        out_proj = ctx.saved_tensors[5]
        grads.append(None if out_proj is None else grad_out_proj.to(out_proj.dtype))
        return (*grads, None, None, None)


class TokenTopKAttention(torch.autograd.Function):
    """(q, k, v, temperature, weights, topk, normalize, backend) -> out, threshold, last_tie, log_sum_exp."""

    @staticmethod
    def forward(q, k, v, temperature, weights, topk, normalize, backend):
        op = overload("topk_attention_token", backend)
        return op(q, k, v, temperature, weights, topk, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.topk, ctx.normalize, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        op = overload("topk_attention_token_backward", ctx.backend)
        return (*op(grad_out, *ctx.saved_tensors, ctx.topk, ctx.normalize), None, None, None)
