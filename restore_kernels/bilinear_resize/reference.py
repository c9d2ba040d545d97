"""Bilinear resizing as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 images are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def bilinear_resize(x: Tensor, residual: Tensor | None, doubles: bool, height: int, width: int) -> Tensor:
    """x (B, C, H, W), residual (B, C, height, width); see ``bilinear_resize``."""
    dtype = accumulate_dtype(x.dtype)
    if doubles:
        out = F.interpolate(x.to(dtype), scale_factor=2.0, mode="bilinear")[:, :, :height, :width]
    else:
        # The last of an odd number of rows or columns counts twice, so that it is averaged with itself:
        # ceil_mode is the same, but torch.compile gets its gradient wrong (pytorch/pytorch#198119).
        odd = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        out = F.avg_pool2d(F.pad(x.to(dtype), odd, mode="replicate") if any(odd) else x.to(dtype), 2)
    out = out if residual is None else out + residual.to(dtype)
    return out.to(x.dtype, memory_format=memory_format(x))
