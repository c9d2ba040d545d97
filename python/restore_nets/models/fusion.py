"""The convolutional blocks of association learning: separable convolutions, channel attention, fusion.

Source: arXiv 2311.05147. Submodules carry the names of ELF's checkpoints (``CA.conv_du``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from restore_kernels.nn import ChannelGate, DenseConv2d, DepthwiseConv2d, PointwiseConv2d


@dataclass(frozen=True)
class ConvOptions:
    """What the convolutional blocks of a network share.

    Args:
        dim: channels, everywhere.
        kernel_size: side of the plain convolutions, odd. Separable ones are 3x3.
        reduction: channel attention passes through dim // reduction channels.
        bias: whether the convolutions have a bias. Separable ones always have one, the 1x1
            convolutions after resizing never.
    """

    dim: int
    kernel_size: int
    reduction: int
    bias: bool

    def conv(self, inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
        """A plain convolution that keeps the size, but for its stride."""
        size = self.kernel_size
        if size == 3 and stride == 1:
            return DenseConv2d(inputs, outputs, bias=self.bias)
        return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=self.bias)

    def gate(self) -> ChannelGate:
        """CA: channel attention."""
        return ChannelGate(self.dim, self.reduction, self.bias)


class SeparableConv(nn.Module):
    """DSC: a depthwise 3x3 convolution, then a 1x1 convolution, both with a bias.

    Shape: one image (B, inputs, H, W), or several with so many channels together -> (B, outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depth_conv = DepthwiseConv2d(inputs, inputs, 3)
        self.point_conv = PointwiseConv2d(inputs, outputs)

    def forward(self, *images: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(images))


class FuseTwo(nn.Module):
    """gate(DSC([a, b])) + a.

    Shape: twice (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, options: ConvOptions) -> None:
        super().__init__()
        self.DSC = SeparableConv(2 * options.dim, options.dim)
        self.CA_fea = options.gate()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.CA_fea(self.DSC(a, b), a)


class FuseFour(nn.Module):
    """Four inputs joined one after the other, from the last to the first; the result, plus itself gated.

    Shape: four times (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, options: ConvOptions) -> None:
        super().__init__()
        self.DSC1 = SeparableConv(2 * options.dim, options.dim)
        self.DSC2 = SeparableConv(2 * options.dim, options.dim)
        self.DSC3 = SeparableConv(2 * options.dim, options.dim)
        self.CA_fea = options.gate()

    def forward(self, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
        x = self.DSC1(third, fourth)
        x = self.DSC2(second, x)
        x = self.DSC3(first, x)
        return self.CA_fea(x, x)


class GatedConvs(nn.Module):
    """CAB: two plain convolutions with an activation between, gated, plus the input.

    Args:
        options: see there.
        activation: one instance, with its slope, may serve many blocks.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, options: ConvOptions, activation: nn.Module) -> None:
        super().__init__()
        dim = options.dim
        self.CA = options.gate()
        self.body = nn.Sequential(options.conv(dim, dim), activation, options.conv(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.CA(self.body(x), x)


class GatedSeparableConvs(nn.Module):
    """CAB-DSC: two separable convolutions with an activation between, gated, fused with the input.

    Args and shape: as ``GatedConvs``.
    """

    def __init__(self, options: ConvOptions, activation: nn.Module) -> None:
        super().__init__()
        dim = options.dim
        self.CA = options.gate()
        self.body = nn.Sequential(SeparableConv(dim, dim), activation, SeparableConv(dim, dim))
        self.S2FB2 = FuseTwo(options)

    def forward(self, x: Tensor) -> Tensor:
        return self.S2FB2(self.CA(self.body(x)), x)
