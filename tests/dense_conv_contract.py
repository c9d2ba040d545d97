"""The operators of dense convolution as ``ops.py`` describes them, as formulas in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import memory_format


def as_image(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory format that the operator promises for a result like ``like``."""
    return torch.empty_like(x, memory_format=memory_format(like)).copy_(x)


def patches(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 9 C, H * W): what every pixel sees."""
    return F.unfold(x, 3, padding=1)


def dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = weight.flatten(1) @ patches(x)
    if bias is not None:
        out = out + bias[:, None]
    return as_image(out.unflatten(2, x.shape[2:]), x)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad_out.flatten(2)
    grad_x = F.fold(weight.flatten(1).mT @ grad, x.shape[2:], 3, padding=1)
    grad_weight = (grad @ patches(x).mT).sum(0).view(weight.shape)
    return as_image(grad_x, x), grad_weight, grad.sum((0, 2))
