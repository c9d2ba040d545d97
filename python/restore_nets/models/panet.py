"""PANet: residual blocks with pyramid attention in their middle."""

from __future__ import annotations

from torch import Tensor, nn

from restore_kernels.nn import DenseConv2d, PyramidAttention
from restore_nets.models.options import check_integer
from restore_nets.models.residual import (
    MeanShift,
    ResidualBlock,
    check_image,
    check_residual_options,
    trunk,
)

REDUCTION = 2


class PANet(nn.Module):
    """The pyramid attention network for noise, mosaics and JPEG artifacts.

    Source: "Pyramid Attention Networks for Image Restoration", arXiv 2004.13824. Published checkpoints
    load unchanged. The default has 5,957,279 parameters. It predicts the image itself, not what to add
    to its input.

    Args:
        n_resblocks: residual blocks, even: half before and half after pyramid attention. All share one
            PReLU.
        n_feats: channels of the features, at least 2.
        colors: channels of the images.
        res_scale: multiplies what the convolutions of a residual block add.

    Shape: (B, colors, H, W) -> (B, colors, H, W), any size; values in [0, 1].
    """

    multiple = 1  # no side is extended

    def __init__(
        self, *, n_resblocks: int = 80, n_feats: int = 64, colors: int = 3, res_scale: float = 1.0
    ) -> None:
        check_residual_options(n_resblocks, n_feats, REDUCTION, res_scale)
        check_integer("colors", colors)
        super().__init__()
        self.colors = colors
        activation = nn.PReLU()

        def block() -> nn.Module:
            return ResidualBlock(n_feats, activation, res_scale)

        # Nothing uses the shifts: published checkpoints hold them.
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.head = nn.Sequential(DenseConv2d(colors, n_feats))
        self.body = trunk(block, n_resblocks, PyramidAttention(n_feats, REDUCTION), n_feats)
        self.tail = nn.Sequential(DenseConv2d(n_feats, colors))

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.colors)
        x = self.head(x)
        return self.tail(x + self.body(x))
