"""Depthwise convolution as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 inputs are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype


def depthwise_conv(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, slope: Tensor | None, gate: Tensor | None,
    dilation: int, activation: str | None,
) -> Tensor:  # fmt: skip
    """x (B, C_i, H, W) each, weight (C_out, C / C_out, k, k), bias (C_out), slope (1) or (C_out), gate
    (B, C_out, H, W); see ``depthwise_conv2d``."""
    image = torch.cat(tuple(x), dim=1) if len(x) > 1 else x[0]
    dtype = accumulate_dtype(image.dtype)
    out = F.conv2d(
        image.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
        padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=weight.shape[0],
    )  # fmt: skip
    if activation == "relu":
        out = torch.relu(out)
    elif activation == "gelu":
        out = F.gelu(out)
    elif slope is not None:
        out = F.prelu(out, slope.to(dtype))
    return (out if gate is None else out * gate.to(dtype)).to(image.dtype)
