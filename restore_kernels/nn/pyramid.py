"""Attention of an image to its own pyramid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restore_kernels.nn.heads import check_image
from restore_kernels.nn.resizing import resize_bicubic
from restore_kernels.pyramid_attention import pyramid_attention
from restore_kernels.pyramid_attention.api import PATCH_SIZES


class PyramidAttention(nn.Module):
    """Attention of an image's 3x3 patches to those of the image at several scales.

    Source: scale-agnostic attention of pyramid attention networks (PANet, arXiv 2004.13824), with the
    state-dict keys of the published module. Queries come from the features themselves; keys and values
    of level i from the features resized by 1 - i/10 (bicubic, no antialiasing). The result is added to
    ``res_scale`` times the input.

    Args:
        channels: of the features.
        reduction: queries and keys have channels // reduction channels.
        levels: of the pyramid, 1 to 10.
        patch_size: side of the patches in pixels: 1, 3, 5 or 7.
        softmax_scale: multiplies the scores.
        res_scale: multiplies the input before it is added.
        hard: take the best match alone instead of the mixture; then queries and keys get no gradient.

    Shape: (B, channels, H, W) -> (B, channels, H, W), any H and W: a level has at least one pixel.
    """

    eps = 1e-4  # smallest norm that a key patch is divided by

    def __init__(
        self, channels: int = 64, reduction: int = 2, levels: int = 5, patch_size: int = 3,
        softmax_scale: float = 10, res_scale: float = 1, hard: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and channels={channels}; got {reduction}")
        if not 1 <= levels <= 10:
            raise ValueError(f"levels must be between 1 and 10; got {levels}")
        if patch_size not in PATCH_SIZES:
            raise ValueError(
                f"patch_size must be one of {', '.join(map(str, PATCH_SIZES))}; got {patch_size}"
            )
        self.channels, self.levels, self.patch_size = channels, levels, patch_size
        self.softmax_scale, self.res_scale, self.hard = softmax_scale, res_scale, hard
        # Nothing reads the buffer: published checkpoints hold eps.
        self.register_buffer("escape_NaN", torch.tensor([self.eps]))
        self.conv_match_L_base = _projection(channels, channels // reduction)
        self.conv_match = _projection(channels, channels // reduction)
        self.conv_assembly = _projection(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values = self.project(x)
        out = pyramid_attention(
            query, keys, values, patch_size=self.patch_size, softmax_scale=self.softmax_scale,
            eps=self.eps, hard=self.hard,
        )  # fmt: skip
        return self.res_scale * x + out

    def project(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """query (B, channels // reduction, H, W), and the keys and values of every level."""
        check_image("x", x, self.channels)
        if 0 in x.shape[2:]:
            raise ValueError(f"x must have at least one pixel; got {tuple(x.shape)}")
        pyramid = [x, *(_resized(x, 1 - i / 10) for i in range(1, self.levels))]
        keys = [self.conv_match(level) for level in pyramid]
        return self.conv_match_L_base(x), keys, [self.conv_assembly(level) for level in pyramid]


def _projection(channels: int, projected: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, projected, 1), nn.PReLU())


def _resized(x: Tensor, factor: float) -> Tensor:
    """(B, C, H, W) -> (B, C, floor(factor * H), floor(factor * W)), but at least one pixel a side."""
    factors = [max(factor, 1 / side) for side in x.shape[2:]]
    return resize_bicubic(x, factors)
