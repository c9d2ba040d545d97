"""The autograd Functions of top-k attention, one per layout and pass.

They keep only what backward cannot cheaply recompute (see ``ops.py``). Temperature and weights come as
the caller gave them, broadcastable to (B, H, 1, 1) and (B, H, J); within vmap they have all dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels.functions import (
    BackwardFunction,
    OperatorFunction,
    compiled_functions,
    map_over_batch,
    per_head,
    sum_to,
)
from restore_kernels.tensors import accumulate_dtype
from restore_kernels.topk_attention.ops import overload


def channel(q, k, v, temperature, weights, out_proj, topk, normalize, backend) -> Tensor:
    """The differentiable operator of the channel layout."""
    if compiled := compiled_functions(backend):
        return compiled.channel_topk(q, k, v, temperature, weights, out_proj, topk, normalize)
    return ChannelTopKAttention.call(q, k, v, temperature, weights, out_proj, topk, normalize, backend)[0]


def token(q, k, v, temperature, weights, topk, normalize, backend) -> Tensor:
    """The differentiable operator of the token layout."""
    if compiled := compiled_functions(backend):
        return compiled.token_topk(q, k, v, temperature, weights, topk, normalize)
    return TokenTopKAttention.call(q, k, v, temperature, weights, topk, normalize, backend)[0]


class ChannelTopKAttention(OperatorFunction):
    """(q, k, v, temperature, weights, out_proj, topk, normalize, backend) -> out, similarity, norms."""

    @staticmethod
    def forward(q, k, v, temperature, weights, out_proj, topk, normalize, backend):
        op = overload("topk_attention_channel", backend)
        return op(q, k, v, *_per_head(q, temperature, weights, topk), out_proj, topk, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.topk, ctx.normalize, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 9
        q, k, v, temperature, weights, out_proj, *saved = ctx.saved_tensors
        *grads, grad_temperature, grad_weights, grad_out_proj = ChannelTopKAttentionBackward.run(
            grad_out, q, k, v, *_per_head(q, temperature, weights, ctx.topk), out_proj, *saved,
            ctx.topk, ctx.normalize, ctx.backend,
        )  # fmt: skip
        grad_out_proj = None if out_proj is None else grad_out_proj.to(out_proj.dtype)
        small = sum_to(grad_temperature[..., None, None], temperature), sum_to(grad_weights, weights)
        return (*grads, *small, grad_out_proj, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = in_dims[5] is None
        return map_over_batch(ChannelTopKAttention, info, in_dims, args, fold=fold, unbatched=(5,))


class ChannelTopKAttentionBackward(BackwardFunction):
    """grad_out, then as saved by ``ChannelTopKAttention`` -> the gradients of its six tensors."""

    operator = "topk_attention"

    @staticmethod
    def forward(
        grad_out, q, k, v, temperature, weights, out_proj, similarity, norms, topk, normalize, backend
    ):
        op = overload("topk_attention_channel_backward", backend)
        return op(grad_out, q, k, v, temperature, weights, out_proj, similarity, norms, topk, normalize)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = args[6] is None  # the gradient of out_proj is summed over the batch
        return map_over_batch(ChannelTopKAttentionBackward, info, in_dims, args, fold=fold, unbatched=(6,))


class TokenTopKAttention(OperatorFunction):
    """(q, k, v, temperature, weights, topk, normalize, backend) -> out, threshold, last_tie, log_sum_exp."""

    @staticmethod
    def forward(q, k, v, temperature, weights, topk, normalize, backend):
        op = overload("topk_attention_token", backend)
        return op(q, k, v, *_per_head(q, temperature, weights, topk), topk, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.topk, ctx.normalize, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        q, k, v, temperature, weights, *saved = ctx.saved_tensors
        *grads, grad_temperature, grad_weights = TokenTopKAttentionBackward.run(
            grad_out, q, k, v, *_per_head(q, temperature, weights, ctx.topk), *saved,
            ctx.topk, ctx.normalize, ctx.backend,
        )  # fmt: skip
        small = sum_to(grad_temperature[..., None, None], temperature), sum_to(grad_weights, weights)
        return (*grads, *small, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(TokenTopKAttention, info, in_dims, args)


class TokenTopKAttentionBackward(BackwardFunction):
    """grad_out, then as saved by ``TokenTopKAttention`` -> the gradients of its five tensors."""

    operator = "topk_attention"

    @staticmethod
    def forward(
        grad_out, q, k, v, temperature, weights, threshold, last_tie, log_sum_exp, topk, normalize, backend
    ):
        op = overload("topk_attention_token_backward", backend)
        return op(grad_out, q, k, v, temperature, weights, threshold, last_tie, log_sum_exp, topk, normalize)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return map_over_batch(TokenTopKAttentionBackward, info, in_dims, args)


def _per_head(q: Tensor, temperature: Tensor, weights: Tensor, topk: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, H) and (B, H, J), as the operators take them."""
    batch, heads = q.shape[:2]
    dtype = accumulate_dtype(q.dtype)
    weights = weights.to(dtype).expand(batch, heads, len(topk))
    return per_head(temperature, dtype, batch, heads), weights
