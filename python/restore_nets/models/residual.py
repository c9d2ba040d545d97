"""Residual blocks around pyramid attention: what PANet and PA-EDSR share.

Submodules carry the names of the published checkpoints (``body.0.body.2``, ``sub_mean``, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from restore_kernels.nn import DenseConv2d, PyramidAttention
from restore_nets.models.options import check_integer, check_number

MEAN = (0.4488, 0.4371, 0.4040)  # of the red, green and blue of DIV2K's photos


class ResidualBlock(nn.Module):
    """x + res_scale * conv(activation(conv(x))), 3x3 convolutions.

    Shape: (B, channels, H, W) -> (B, channels, H, W).
    """

    def __init__(self, channels: int, activation: nn.Module, res_scale: float) -> None:
        super().__init__()
        first, second = DenseConv2d(channels, channels), DenseConv2d(channels, channels)
        self.body = nn.Sequential(first, activation, second)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x), alpha=self.res_scale)


class MeanShift(nn.Conv2d):
    """Adds ``sign`` times the mean colour, as a frozen 1x1 convolution.

    Shape: (B, 3, H, W) -> (B, 3, H, W), values in [0, 1].
    """

    def __init__(self, sign: int) -> None:
        super().__init__(3, 3, 1)
        self.weight = nn.Parameter(torch.eye(3)[:, :, None, None], requires_grad=False)
        self.bias = nn.Parameter(sign * torch.tensor(MEAN), requires_grad=False)


def trunk(
    block: Callable[[], nn.Module], n_resblocks: int, attention: PyramidAttention, channels: int
) -> nn.Sequential:
    """Half of the residual blocks, pyramid attention, the other half, a 3x3 convolution."""
    first, second = ([block() for _ in range(n_resblocks // 2)] for _ in range(2))
    return nn.Sequential(*first, attention, *second, DenseConv2d(channels, channels))


def check_residual_options(n_resblocks: int, n_feats: int, reduction: int, res_scale: float) -> None:
    """The options that both networks have.

    Raises:
        TypeError, ValueError: an option that does not fit; the message names it.
    """
    check_integer("n_resblocks", n_resblocks)
    if n_resblocks % 2:
        raise ValueError(
            f"n_resblocks must be even: half of them on each side of attention; got {n_resblocks}"
        )
    check_integer("n_feats", n_feats)
    check_integer("reduction", reduction)
    if reduction > n_feats:
        raise ValueError(f"n_feats must be at least {reduction}, what attention divides it by; got {n_feats}")
    check_number("res_scale", res_scale)


def check_image(x: Tensor, colors: int) -> None:
    if x.dim() != 4 or x.shape[1] != colors or x.numel() == 0:
        raise ValueError(f"x must have shape (B, {colors}, H, W), not empty; got {tuple(x.shape)}")
