"""The autograd Functions of masked multi-input attention, one per layout and pass.

They keep only what backward cannot cheaply recompute (see ``ops.py``). The temperature comes as the
caller gave it, broadcastable to (B, H, 1, 1); within vmap it has all dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_kernels.functions import (
    BackwardFunction,
    OperatorFunction,
    compiled_functions,
    map_over_batch,
    per_head,
    sum_to,
)
from restore_kernels.masked_attention.ops import overload
from restore_kernels.tensors import accumulate_dtype


def channel(q, k, v, mask, temperature, out_proj, normalize, backend) -> Tensor:
    """The differentiable operator of the channel layout."""
    if compiled := compiled_functions(backend):
        return compiled.channel_masked(q, k, v, mask, temperature, out_proj, normalize)
    return ChannelMaskedAttention.call(q, k, v, mask, temperature, out_proj, normalize, backend)[0]


def token(q, k, v, mask, temperature, normalize, backend) -> Tensor:
    """The differentiable operator of the token layout."""
    if compiled := compiled_functions(backend):
        return compiled.token_masked(q, k, v, mask, temperature, normalize)
    return TokenMaskedAttention.call(q, k, v, mask, temperature, normalize, backend)[0]


class ChannelMaskedAttention(OperatorFunction):
    """(q, k, v, mask, temperature, out_proj, normalize, backend) -> out, similarity, norms."""

    @staticmethod
    def forward(q, k, v, mask, temperature, out_proj, normalize, backend):
        op = overload("masked_attention_channel", backend)
        return op(q, k, v, mask, _per_head(q, temperature), out_proj, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.normalize, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        q, k, v, mask, temperature, out_proj, *saved = ctx.saved_tensors
        *grads, grad_mask, grad_temperature, grad_out_proj = ChannelMaskedAttentionBackward.run(
            grad_out, q, k, v, mask, _per_head(q, temperature), out_proj, *saved, ctx.normalize, ctx.backend
        )
        grad_mask = None if mask is None else grad_mask
        grad_out_proj = None if out_proj is None else grad_out_proj.to(out_proj.dtype)
        return (
            *grads,
            grad_mask,
            sum_to(grad_temperature[..., None, None], temperature),
            grad_out_proj,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = in_dims[5] is None
        return map_over_batch(ChannelMaskedAttention, info, in_dims, args, fold=fold, unbatched=(5,))


class ChannelMaskedAttentionBackward(BackwardFunction):
    """grad_out, then as saved by ``ChannelMaskedAttention`` -> the gradients of its six tensors."""

    operator = "masked_attention"

    @staticmethod
    def forward(grad_out, q, k, v, mask, temperature, out_proj, similarity, norms, normalize, backend):
        op = overload("masked_attention_channel_backward", backend)
        return op(grad_out, q, k, v, mask, temperature, out_proj, similarity, norms, normalize)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        # One call per slice where a gradient has no batch: out_proj's, and an absent mask's empty one.
        fold = args[6] is None and args[4] is not None
        return map_over_batch(ChannelMaskedAttentionBackward, info, in_dims, args, fold=fold, unbatched=(6,))


class TokenMaskedAttention(OperatorFunction):
    """(q, k, v, mask, temperature, normalize, backend) -> out, log_sum_exp, wide_out."""

    @staticmethod
    def forward(q, k, v, mask, temperature, normalize, backend):
        op = overload("masked_attention_token", backend)
        return op(q, k, v, mask, _per_head(q, temperature), normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.normalize, ctx.backend = inputs
        out, log_sum_exp, wide_out = output
        ctx.mark_non_differentiable(log_sum_exp, wide_out)
        ctx.set_materialize_grads(False)
        was_rounded = out.dtype != log_sum_exp.dtype
        ctx.save_for_backward(*tensors, wide_out if was_rounded else out, log_sum_exp)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 7
        q, k, v, mask, temperature, *saved = ctx.saved_tensors
        *grads, grad_mask, grad_temperature = TokenMaskedAttentionBackward.run(
            grad_out, q, k, v, mask, _per_head(q, temperature), *saved, ctx.normalize, ctx.backend
        )
        grad_mask = None if mask is None else grad_mask
        return (*grads, grad_mask, sum_to(grad_temperature[..., None, None], temperature), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        # wide_out is empty, without a batch, where nothing was rounded.
        was_rounded = args[0].dtype in (torch.bfloat16, torch.float16)
        return map_over_batch(TokenMaskedAttention, info, in_dims, args, fold=was_rounded)


class TokenMaskedAttentionBackward(BackwardFunction):
    """grad_out, then as saved by ``TokenMaskedAttention`` -> the gradients of its five tensors."""

    operator = "masked_attention"

    @staticmethod
    def forward(grad_out, q, k, v, mask, temperature, out, log_sum_exp, normalize, backend):
        op = overload("masked_attention_token_backward", backend)
        return op(grad_out, q, k, v, mask, temperature, out, log_sum_exp, normalize)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = args[4] is not None
        return map_over_batch(TokenMaskedAttentionBackward, info, in_dims, args, fold=fold)


def _per_head(q: Tensor, temperature: Tensor) -> Tensor:
    """(B, H), as the operators take it."""
    return per_head(temperature, accumulate_dtype(q.dtype), *q.shape[:2])
