"""Normalisation of an image over its channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restore_kernels.channel_norm import channel_norm
from restore_kernels.nn.heads import check_image

NORMS = ("WithBias", "BiasFree")


class ChannelNorm(nn.Module):
    """Layer normalisation of every pixel over its channels (biased variance).

    ``WithBias`` subtracts the mean, scales and shifts. ``BiasFree`` neither subtracts the mean nor
    shifts: it divides by the standard deviation and scales. Source: Restormer (arXiv 2111.09881).

    Args:
        dim: channels of the image.
        norm: ``"WithBias"`` or ``"BiasFree"``.
        eps: added to the variance.

    Shape: (B, dim, H, W) -> (B, dim, H, W), in the dtype and memory format of the input.
    """

    def __init__(self, dim: int, norm: str = "WithBias", eps: float = 1e-5) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; got {dim}")
        if norm not in NORMS:
            raise ValueError(f"norm must be {' or '.join(map(repr, NORMS))}; got {norm!r}")
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if norm == "WithBias" else None

    def forward(self, x: Tensor) -> Tensor:
        check_image("x", x, self.dim)
        return channel_norm(x, self.weight, self.bias, eps=self.eps)
