"""The operators of the channel gate as ``ops.py`` describes them, as formulas in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def as_image(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and memory format that the operator promises for a result like ``like``."""
    return torch.empty_like(x, dtype=like.dtype, memory_format=memory_format(like)).copy_(x)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, columns), (rows, columns, 1, 1) -> (B, rows)"""
    out = torch.einsum("bj,ij->bi", x, weight[:, :, 0, 0])
    return out if bias is None else out + bias


def channel_gate(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = x.to(accumulate_dtype(x.dtype))
    mean = wide.mean((2, 3))
    hidden = layer(mean, down, down_bias).clamp_min(0)
    gate = layer(hidden, up, up_bias).sigmoid()
    out = wide * gate[:, :, None, None]
    return as_image(out if residual is None else out + residual.to(wide.dtype), x), mean, hidden, gate


def backward(
    grad_out: Tensor, x: Tensor, down: Tensor, up: Tensor, mean: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    grad, wide = grad_out.to(dtype), x.to(dtype)
    grad_total = (grad * wide).sum((2, 3)) * gate * (1 - gate)
    grad_hidden = layer(grad_total, up.transpose(0, 1), None) * (hidden > 0)
    grad_mean = layer(grad_hidden, down.transpose(0, 1), None)
    grad_x = grad * gate[:, :, None, None] + (grad_mean / x.shape[2:].numel())[:, :, None, None]
    grad_down = torch.einsum("bi,bj->ij", grad_hidden, mean)[:, :, None, None]
    grad_up = torch.einsum("bi,bj->ij", grad_total, hidden)[:, :, None, None]
    return as_image(grad_x, x), grad_down, grad_up, grad_hidden.sum(0), grad_total.sum(0)
