"""Depthwise convolution as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 inputs are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, relu: bool) -> Tensor:
    """x (B, C, H, W), weight (C_out, C / C_out, k, k), bias (C_out); see ``depthwise_conv2d``."""
    dtype = accumulate_dtype(x.dtype)
    out = F.conv2d(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
        padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=weight.shape[0],
    )  # fmt: skip
    return (torch.relu(out) if relu else out).to(x.dtype)
