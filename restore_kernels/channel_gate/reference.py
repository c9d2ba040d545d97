"""The channel gate as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 images are computed in float32 and rounded once, at
the end.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def channel_gate(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """x and residual (B, C, H, W), down (R, C, 1, 1), up (C, R, 1, 1), biases (R,) and (C,)."""
    dtype = accumulate_dtype(x.dtype)

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    image = x.to(dtype)
    hidden = F.linear(image.mean((2, 3)), down.to(dtype).flatten(1), wide(down_bias)).relu()
    gate = F.linear(hidden, up.to(dtype).flatten(1), wide(up_bias)).sigmoid()
    out = image * gate[:, :, None, None]
    out = out if residual is None else out + residual.to(dtype)
    return out.to(x.dtype, memory_format=memory_format(x))
