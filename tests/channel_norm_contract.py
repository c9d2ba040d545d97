"""The operators of channel normalisation as ``ops.py`` describes them, as formulas in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def as_image(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and memory format that the operator promises for a result like ``like``."""
    return torch.empty_like(x, dtype=like.dtype, memory_format=memory_format(like)).copy_(x)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> mean and rstd, both (B, H, W)."""
    mean = x.mean(1)
    return mean, torch.rsqrt((x - mean.unsqueeze(1)).square().mean(1) + eps)


def channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = x.to(accumulate_dtype(x.dtype))
    mean, rstd = statistics(wide, eps)
    centred = wide if bias is None else wide - mean.unsqueeze(1)
    out = centred * rstd.unsqueeze(1) * weight[:, None, None]
    return as_image(out if bias is None else out + bias[:, None, None], x), mean, rstd


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    grad, wide, rstd = grad_out.to(dtype), x.to(dtype), rstd.unsqueeze(1)
    normal = (wide - mean.unsqueeze(1)) * rstd
    factor = normal if biased else wide * rstd
    scaled = grad * weight[:, None, None]
    centred = scaled - scaled.mean(1, keepdim=True) if biased else scaled
    grad_x = (centred - normal * (scaled * factor).mean(1, keepdim=True)) * rstd
    grad_bias = grad.sum((0, 2, 3)) if biased else weight.new_empty(0)
    return as_image(grad_x, x), (grad * factor).sum((0, 2, 3)), grad_bias
