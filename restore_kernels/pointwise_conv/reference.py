"""Pointwise convolution as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 inputs are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def pointwise_conv(x: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """x[i] (B, C_i, H, W), weight (C_out, C, 1, 1) or (B, C_out, C, 1, 1); see ``pointwise_conv2d``."""
    dtype, layout = accumulate_dtype(x[0].dtype), memory_format(x[0])
    image = torch.cat(list(x), dim=1).to(dtype)
    biases = None if bias is None else bias.to(dtype)
    if weight.dim() == 4:
        out = F.conv2d(image, weight.to(dtype), biases)
    else:
        out = (weight.to(dtype).flatten(2) @ image.flatten(2)).unflatten(2, image.shape[2:])
        out = out if biases is None else out + biases[:, None, None]
    return out.to(x[0].dtype).contiguous(memory_format=layout)
