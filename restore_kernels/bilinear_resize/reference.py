"""Bilinear resizing as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 images are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def bilinear_resize(x: Tensor, residual: Tensor | None, doubles: bool, height: int, width: int) -> Tensor:
    """x (B, C, H, W), residual (B, C, height, width); see ``bilinear_resize``."""
    dtype = accumulate_dtype(x.dtype)
    if doubles:
        double = _compiled_double if torch.compiler.is_compiling() else _double
        out = double(x.to(dtype))[:, :, :height, :width]
    else:
        # The last of an odd number of rows or columns counts twice, so that it is averaged with itself:
        # ceil_mode is the same, but torch.compile gets its gradient wrong (pytorch/pytorch#198119).
        odd = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        out = F.avg_pool2d(F.pad(x.to(dtype), odd, mode="replicate") if any(odd) else x.to(dtype), 2)
    out = out if residual is None else out + residual.to(dtype)
    return out.to(x.dtype, memory_format=memory_format(x))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


def _compiled_double(x: Tensor) -> Tensor:
    """The same, without scattering in backward: torch.compile may use the sums before they are made, and the
    gradient is then 0 (pytorch/pytorch#185509)."""
    return _double_along(_double_along(x, 2), 3)


def _double_along(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    before = torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)), dim)
    after = torch.cat((x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)), dim)
    mixed = [torch.lerp(x, beside, 1 / 4) for beside in (before, after)]
    return torch.stack(mixed, dim + 1).flatten(dim, dim + 1)
