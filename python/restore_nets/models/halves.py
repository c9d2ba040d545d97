"""Convolutions whose output is used in two halves, as in gated feed-forward networks.

Each half of the channels is computed into a tensor of its own, by half of the weights: parts of one tensor
would cost a copy in backward, where their gradients have to be put together.
"""

from __future__ import annotations

from torch import Tensor

from restore_kernels import depthwise_conv2d, pointwise_conv2d
from restore_kernels.nn import DepthwiseConv2d, PointwiseConv2d

Halves = tuple[Tensor, Tensor]


def pointwise_halves(conv: PointwiseConv2d, x: Tensor) -> Halves:
    """The first and the second half of the channels of conv(x): each (B, C_out / 2, H, W)."""
    first, second = (pointwise_conv2d(x, weight, bias) for weight, bias in _parameters(conv))
    return first, second


def depthwise_halves(conv: DepthwiseConv2d, a: Tensor, b: Tensor) -> Halves:
    """What conv makes of a, the first half of its channels, and of b, the second."""
    first, second = (
        depthwise_conv2d(x, weight, bias, dilation=conv.dilation[0], activation=conv.activation)
        for x, (weight, bias) in zip((a, b), _parameters(conv), strict=True)
    )
    return first, second


def gated_halves(
    conv: DepthwiseConv2d, a: Tensor, b: Tensor, activation: str, slope: Tensor | None = None
) -> Tensor:
    """activation(first) * second, of what conv makes of a and b; see ``depthwise_conv2d``."""
    (weight_a, bias_a), (weight_b, bias_b) = _parameters(conv)
    gate = depthwise_conv2d(b, weight_b, bias_b)
    return depthwise_conv2d(a, weight_a, bias_a, activation=activation, slope=slope, gate=gate)


def _parameters(conv: PointwiseConv2d | DepthwiseConv2d) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of both halves of the output channels."""
    biases = (None, None) if conv.bias is None else conv.bias.chunk(2)
    return list(zip(conv.weight.chunk(2), biases, strict=True))
