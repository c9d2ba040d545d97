"""The DDSA network: dynamic dual self-attention in the U-shape of DRSformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from restore_kernels import bilinear_resize, pointwise_conv2d
from restore_kernels.nn import (
    ChannelNorm,
    DenseConv2d,
    DepthwiseConv2d,
    DynamicDualAttention,
    PointwiseConv2d,
)
from restore_nets.models.blocks import TransformerBlock, UShape
from restore_nets.models.halves import depthwise_halves, pointwise_halves
from restore_nets.models.options import UShapeOptions, check_choice, check_integer, check_number


class DDSANet(UShape):
    """A U-shaped transformer of dynamic dual self-attention and spatial-enhanced feed-forward blocks.

    Source: arXiv 2308.07781, "Learning Image Deraining Transformer Network with Dynamic Dual
    Self-Attention". No code or weights are published; details that the paper leaves open are our
    reading (see ``DynamicDualAttention`` and ``SpatialFeedForward``). The state dict has the keys of
    DRSformer, apart from ``attn.*`` and ``ffn.*`` within the blocks, which are those of these two.

    Args:
        dim, num_blocks, heads, ffn_expansion, bias, norm: see ``UShapeOptions``.
        topk_ratio: share of the similarities that the sparse branch keeps, in (0, 1].
        layout: ``"channel"`` (channels attend to channels, over the whole image) or ``"token"``
            (pixels attend to pixels, within windows).
        window_size: side of the windows of the token layout, in pixels.

    Shape: (B, 3, H, W) -> (B, 3, H, W), any size; values in [0, 1].
    """

    def __init__(
        self, *,
        dim: int = 48, num_blocks: Sequence[int] = (4, 6, 6, 8), heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion: float = 2.66, bias: bool = False, norm: str = "WithBias",
        topk_ratio: float = 0.5, layout: str = "channel", window_size: int = 8,
    ) -> None:  # fmt: skip
        options = UShapeOptions(dim, num_blocks, heads, ffn_expansion, bias, norm)
        check_number("topk_ratio", topk_ratio)
        check_choice("layout", layout, ("channel", "token"))
        check_integer("window_size", window_size)

        def block(dim: int, heads: int) -> nn.Module:
            attention = DynamicDualAttention(dim, heads, bias, topk_ratio, layout, window_size)
            return TransformerBlock(dim, norm, attention, SpatialFeedForward(dim, ffn_expansion, bias, norm))

        super().__init__(options, block)
        # Training starts near the degraded image itself, not at noise on top of it; at zero exactly,
        # the first steps would teach the other layers nothing.
        with torch.no_grad():
            for parameter in self.output.parameters():
                parameter.mul_(0.1)


class SpatialFeedForward(nn.Module):
    """SEFN, the spatial-enhanced feed-forward network: a gated one that sees a wider neighbourhood.

    The abstract of arXiv 2308.07781 names it without defining it; this is our reading. The input is
    widened to two halves a and b of h channels (1x1, depthwise 3x3). A context at half resolution
    (2x2 average, twice 3x3 convolution, norm and ReLU, upsampled) is concatenated to a and fused
    (1x1, depthwise 3x3); the result is GELU(fused) * b, projected back by 1x1.

    Args:
        dim: channels of the image.
        ffn_expansion: h = int(dim * ffn_expansion).
        bias: whether the convolutions have a bias.
        norm: of the context, ``"WithBias"`` or ``"BiasFree"``.

    Shape: (B, dim, H, W) -> (B, dim, H, W), odd sizes too.
    """

    def __init__(self, dim: int, ffn_expansion: float, bias: bool, norm: str) -> None:
        super().__init__()
        hidden = int(dim * ffn_expansion)

        def convolve_normalise() -> tuple[nn.Module, ...]:
            return DenseConv2d(dim, dim, bias=bias), ChannelNorm(dim, norm), nn.ReLU()

        def depthwise(channels: int, activation: str | None = None) -> DepthwiseConv2d:
            return DepthwiseConv2d(channels, channels, 3, bias=bias, activation=activation)

        self.project_in = PointwiseConv2d(dim, 2 * hidden, bias=bias)
        self.dwconv = depthwise(2 * hidden)
        self.context = nn.Sequential(*convolve_normalise(), *convolve_normalise())
        self.fuse = nn.Sequential(PointwiseConv2d(hidden + dim, hidden, bias=bias), depthwise(hidden, "gelu"))
        self.project_out = PointwiseConv2d(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = depthwise_halves(self.dwconv, *pointwise_halves(self.project_in, x))
        context = self.context(bilinear_resize(x, 0.5))
        widen, gated = self.fuse
        assert isinstance(widen, PointwiseConv2d)
        # A 1x1 convolution of a and the resized context, concatenated. That of the context is made before the
        # resizing, at a quarter of the cost: one mixes channels and the other pixels, so the two commute.
        of_a, of_context = widen.weight.split((a.shape[1], context.shape[1]), dim=1)
        fused = pointwise_conv2d(a, of_a, widen.bias)
        fused = bilinear_resize(pointwise_conv2d(context, of_context), 2, residual=fused)
        return self.project_out(gated(fused, gate=b))
