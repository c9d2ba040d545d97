"""Transformer blocks with a gated feed-forward network, for one image and for several.

Submodules carry the names of ELF's checkpoints, which are Restormer's (arXiv 2111.09881) but for ``act1``.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from restore_kernels.nn import (
    ChannelNorm,
    DenseConv2d,
    DepthwiseConv2d,
    MultiDconvAttention,
    MultiInputAttention,
    PointwiseConv2d,
)
from restore_nets.models.blocks import TransformerBlock, body
from restore_nets.models.halves import gated_halves, pointwise_halves


@dataclass(frozen=True)
class GatedBlockOptions:
    """What the transformer blocks of a network share.

    Args:
        dim: channels.
        ffn_expansion: the feed-forward networks have int(dim * ffn_expansion) hidden channels.
        bias: whether the convolutions have a bias.
        norm: ``"WithBias"`` or ``"BiasFree"``, see ``ChannelNorm``.
    """

    dim: int
    ffn_expansion: float = 2.66
    bias: bool = False
    norm: str = "WithBias"

    def block(self, heads: int) -> TransformerBlock:
        """One block of channel attention and feed-forward network."""
        attention = MultiDconvAttention(self.dim, heads, self.bias)
        return TransformerBlock(self.dim, self.norm, attention, GatedFeedForward(self))


class GatedFeedForward(nn.Module):
    """GDFN: 1x1 and depthwise 3x3 convolution to two halves a and b; PReLU(a) * b, projected back by 1x1.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, options: GatedBlockOptions) -> None:
        super().__init__()
        dim, bias = options.dim, options.bias
        hidden = int(dim * options.ffn_expansion)
        self.act1 = nn.PReLU()
        self.project_in = PointwiseConv2d(dim, 2 * hidden, bias=bias)
        self.dwconv = DepthwiseConv2d(2 * hidden, 2 * hidden, 3, bias=bias)
        self.project_out = PointwiseConv2d(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = pointwise_halves(self.project_in, x)
        return self.project_out(gated_halves(self.dwconv, a, b, "prelu", self.act1.weight))


class MultiInputBlock(nn.Module):
    """v + attention(q, k, v), then x + ffn(norm(x)); the attention may look through a mask.

    Source: the multi-input attention module of association learning (arXiv 2311.05147). In ELF's
    checkpoints ``norm_key`` acts on what queries are made of and ``norm_query`` on the keys.

    Shape: q, k, v (B, dim, H, W), mask None or broadcastable to them -> (B, dim, H, W).
    """

    def __init__(self, options: GatedBlockOptions, heads: int) -> None:
        super().__init__()
        dim, norm = options.dim, options.norm
        self.norm_key = body(ChannelNorm(dim, norm))
        self.norm_query = body(ChannelNorm(dim, norm))
        self.norm_value = body(ChannelNorm(dim, norm))
        self.attn = MultiInputAttention(dim, heads, options.bias)
        self.norm2 = body(ChannelNorm(dim, norm))
        self.ffn = GatedFeedForward(options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        x = v + self.attn(self.norm_key(q), self.norm_query(k), self.norm_value(v), mask)
        return x + self.ffn(self.norm2(x))


class ResidualBlocks(nn.Module):
    """ORB: transformer blocks and a 3x3 convolution, plus the input.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, options: GatedBlockOptions, heads: int, num_blocks: int) -> None:
        super().__init__()
        self.modules_body = nn.Sequential(*(options.block(heads) for _ in range(num_blocks)))
        self.conv = DenseConv2d(options.dim, options.dim, bias=options.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.modules_body(x))


def original_resolution(blocks: nn.Module) -> nn.Sequential:
    """The blocks under the name ``orb``, as the published checkpoints have them."""
    return nn.Sequential(OrderedDict(orb=blocks))
