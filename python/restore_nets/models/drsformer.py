"""DRSformer: a sparse transformer for image deraining."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from restore_kernels.nn import DepthwiseConv2d, PointwiseConv2d, TopKSparseAttention
from restore_nets.models.blocks import TransformerBlock, UShape
from restore_nets.models.halves import depthwise_halves, pointwise_halves
from restore_nets.models.mefc import FeatureCompensator
from restore_nets.models.options import UShapeOptions, check_flag


class DRSformer(UShape):
    """DRSformer, a U-shaped transformer of top-k sparse attention.

    Source: Chen et al., "Learning A Sparse Transformer Network for Effective Image Deraining", CVPR 2023.
    Published checkpoints load unchanged. The default has 33,655,424 parameters.

    Args:
        dim, num_blocks, heads, ffn_expansion, bias, norm: see ``UShapeOptions``.
        mefc: with the mixture-of-experts feature compensators. Without them (32,610,304 parameters)
            it is the variant published for Rain200L and SPA-Data.

    Shape: (B, 3, H, W) -> (B, 3, H, W), any size; values in [0, 1].
    """

    def __init__(
        self, *,
        dim: int = 48, num_blocks: Sequence[int] = (4, 6, 6, 8), heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion: float = 2.66, bias: bool = False, norm: str = "WithBias", mefc: bool = True,
    ) -> None:  # fmt: skip
        options = UShapeOptions(dim, num_blocks, heads, ffn_expansion, bias, norm)
        check_flag("mefc", mefc)

        def block(dim: int, heads: int) -> nn.Module:
            attention = TopKSparseAttention(dim, heads, bias)
            return TransformerBlock(dim, norm, attention, MixedScaleFeedForward(dim, ffn_expansion, bias))

        super().__init__(options, block, FeatureCompensator if mefc else nn.Identity)


class MixedScaleFeedForward(nn.Module):
    """MSFN: two depthwise convolutions, 3x3 and 5x5, that exchange half of their features and repeat.

    Args:
        dim: channels of the image.
        ffn_expansion: int(dim * ffn_expansion) = h channels in every half.
        bias: whether the convolutions have a bias.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, ffn_expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(dim * ffn_expansion)

        def rectified(inputs: int, outputs: int, size: int) -> DepthwiseConv2d:
            return DepthwiseConv2d(inputs, outputs, size, bias=bias, activation="relu")

        self.project_in = PointwiseConv2d(dim, 2 * hidden, bias=bias)
        self.dwconv3x3 = rectified(2 * hidden, 2 * hidden, 3)
        self.dwconv5x5 = rectified(2 * hidden, 2 * hidden, 5)
        self.dwconv3x3_1 = rectified(2 * hidden, hidden, 3)
        self.dwconv5x5_1 = rectified(2 * hidden, hidden, 5)
        self.project_out = PointwiseConv2d(2 * hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second = pointwise_halves(self.project_in, x)
        first3, second3 = depthwise_halves(self.dwconv3x3, first, second)
        first5, second5 = depthwise_halves(self.dwconv5x5, first, second)
        fine = self.dwconv3x3_1((first3, first5))
        coarse = self.dwconv5x5_1((second3, second5))
        return self.project_out((fine, coarse))
