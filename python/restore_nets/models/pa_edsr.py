"""PA-EDSR: super-resolution by EDSR with pyramid attention."""

from __future__ import annotations

from torch import Tensor, nn

from restore_kernels.nn import DenseConv2d, PyramidAttention
from restore_nets.models.options import check_choice, check_integer
from restore_nets.models.residual import (
    MeanShift,
    ResidualBlock,
    check_image,
    check_residual_options,
    trunk,
)

SCALES = (2, 3, 4)


class PAEDSR(nn.Module):
    """EDSR with pyramid attention in the middle of its residual blocks: PA-EDSR.

    Source: "Pyramid Attention Networks for Image Restoration", arXiv 2004.13824. Published checkpoints
    load unchanged. The default has 40.81 M parameters, 43.76 M at scale 3 and 43.17 M at scale 4.

    Args:
        n_resblocks: residual blocks, even: half before and half after pyramid attention.
        n_feats: channels of the features, at least ``reduction``.
        scale: by which the image is enlarged: 2, 3 or 4.
        res_scale: multiplies what the convolutions of a residual block add, and the input that pyramid
            attention adds to its result.
        reduction: attention compares n_feats // reduction channels.

    Shape: (B, 3, H, W) -> (B, 3, scale * H, scale * W), any size; values in [0, 1].
    """

    multiple = 1  # no side is extended

    def __init__(
        self, *, n_resblocks: int = 32, n_feats: int = 256, scale: int = 2, res_scale: float = 0.1,
        reduction: int = 8,
    ) -> None:  # fmt: skip
        check_residual_options(n_resblocks, n_feats, reduction, res_scale)
        check_integer("scale", scale)
        check_choice("scale", scale, SCALES)
        super().__init__()
        self.scale = scale

        def block() -> nn.Module:
            return ResidualBlock(n_feats, nn.ReLU(), res_scale)

        self.sub_mean = MeanShift(-1)
        self.msa = PyramidAttention(n_feats, reduction, res_scale=res_scale)  # also a part of the body
        self.add_mean = MeanShift(1)
        self.head = nn.Sequential(DenseConv2d(3, n_feats))
        self.body = trunk(block, n_resblocks, self.msa, n_feats)
        self.tail = nn.Sequential(upsampler(scale, n_feats), DenseConv2d(n_feats, 3))

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 3)
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(x + self.body(x)))


def upsampler(scale: int, channels: int) -> nn.Sequential:
    """Sub-pixel convolutions, (B, channels, H, W) -> (B, channels, scale * H, scale * W): 4 is 2 twice."""
    factors = (2, 2) if scale == 4 else (scale,)
    steps = [(DenseConv2d(channels, factor**2 * channels), nn.PixelShuffle(factor)) for factor in factors]
    return nn.Sequential(*(module for step in steps for module in step))
