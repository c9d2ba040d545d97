"""The autograd Functions of top-k attention, one per layout and pass.

They keep only what backward cannot cheaply recompute (see ``ops.py``). The backward passes are
Functions of their own, so that ``torch.func`` transforms compose over them and a second derivative,
which only ``backend="eager"`` has, says so instead of being wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_kernels.topk_attention.ops import overload


class ChannelTopKAttention(torch.autograd.Function):
    """(q, k, v, temperature, weights, out_proj, topk, normalize, backend) -> out, similarity, norms."""

    @staticmethod
    def forward(q, k, v, temperature, weights, out_proj, topk, normalize, backend):
        op = overload("topk_attention_channel", backend)
        return op(q, k, v, temperature, weights, out_proj, topk, normalize)

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
        *grads, grad_out_proj = _run_backward(
            ChannelTopKAttentionBackward, grad_out, *ctx.saved_tensors, ctx.topk, ctx.normalize, ctx.backend
        )
        out_proj = ctx.saved_tensors[5]
        grad_out_proj = None if out_proj is None else grad_out_proj.to(out_proj.dtype)
        return (*grads, grad_out_proj, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = in_dims[5] is None
        return _map(ChannelTopKAttention, info, in_dims, args, fold=fold, out_proj=5)


class ChannelTopKAttentionBackward(torch.autograd.Function):
    """grad_out, then as saved by ``ChannelTopKAttention`` -> the gradients of its six tensors."""

    @staticmethod
    def forward(
        grad_out, q, k, v, temperature, weights, out_proj, similarity, norms, topk, normalize, backend
    ):
        op = overload("topk_attention_channel_backward", backend)
        return op(grad_out, q, k, v, temperature, weights, out_proj, similarity, norms, topk, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        _raise_no_second_derivative(ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = args[6] is None  # the gradient of out_proj is summed over the batch
        return _map(ChannelTopKAttentionBackward, info, in_dims, args, fold=fold, out_proj=6)


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
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        grads = _run_backward(
            TokenTopKAttentionBackward, grad_out, *ctx.saved_tensors, ctx.topk, ctx.normalize, ctx.backend
        )
        return (*grads, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return _map(TokenTopKAttention, info, in_dims, args, fold=True)


class TokenTopKAttentionBackward(torch.autograd.Function):
    """grad_out, then as saved by ``TokenTopKAttention`` -> the gradients of its five tensors."""

    @staticmethod
    def forward(
        grad_out, q, k, v, temperature, weights, threshold, last_tie, log_sum_exp, topk, normalize, backend
    ):
        op = overload("topk_attention_token_backward", backend)
        return op(grad_out, q, k, v, temperature, weights, threshold, last_tie, log_sum_exp, topk, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        _raise_no_second_derivative(ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        return _map(TokenTopKAttentionBackward, info, in_dims, args, fold=True)


def _run_backward(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """The backward pass as a Function, or, where nothing could transform it, without the cost of one."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function.forward(*args)


def _raise_no_second_derivative(backend: str) -> None:
    raise RuntimeError(
        f"topk_attention has no second derivative on backend {backend!r}; backend='eager' has one"
    )


def _map(
    function: type[torch.autograd.Function], info: Any, in_dims: Sequence[int | None],
    args: Sequence[Any], *, fold: bool, out_proj: int | None = None,
) -> tuple[tuple[Tensor, ...], int]:  # fmt: skip
    """The vmap rule: the mapped dimension joins the batch if ``fold``, else there is one call per slice.

    ``args[out_proj]`` alone has no batch dimension that the mapped one could join.
    """
    size = info.batch_size

    def mapped(x: Any, dim: int | None) -> bool:
        return isinstance(x, Tensor) and dim is not None

    def folded(position: int, x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor) or position == out_proj:
            return x
        x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    pairs = list(zip(args, in_dims, strict=True))
    if fold:
        outputs = function.apply(*(folded(position, *pair) for position, pair in enumerate(pairs)))
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in outputs), 0
    calls = [
        function.apply(*(x.select(dim, i) if mapped(x, dim) else x for x, dim in pairs)) for i in range(size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), 0
