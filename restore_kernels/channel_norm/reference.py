"""Channel normalisation as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 images are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (B, C, H, W); weight and bias (C,)."""
    dtype = accumulate_dtype(x.dtype)
    wide, scale = x.to(dtype), weight.to(dtype)[:, None, None]
    centred = wide - wide.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    numerator, shift = (wide, 0) if bias is None else (centred, bias.to(dtype)[:, None, None])
    out = numerator * rstd * scale + shift
    return out.to(x.dtype, memory_format=memory_format(x))
