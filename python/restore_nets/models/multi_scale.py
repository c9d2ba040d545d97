"""The multi-scale encoder-decoder of association learning (arXiv 2311.05147): one width, four sizes."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels.nn import BilinearResize, PointwiseConv2d
from restore_nets.models.fusion import ConvOptions, FuseFour, FuseTwo, GatedConvs, GatedSeparableConvs

Levels = tuple[Tensor, Tensor, Tensor]  # (B, dim, H/2, W/2), (B, dim, H/4, W/4), (B, dim, H/8, W/8)


class Resize(nn.Module):
    """Bilinear resizing and a 1x1 convolution without bias, under the names of the published checkpoints.

    The two commute, as one mixes pixels and the other channels: the convolution sees the smaller image.

    Shape: (B, dim, H, W) -> (B, dim, factor * H, factor * W).
    """

    def __init__(self, dim: int, factor: float) -> None:
        super().__init__()
        self.enlarges = factor > 1
        by_four = {4: Quadruple, 1 / 4: Quarter}
        resize = by_four[factor]() if factor in by_four else BilinearResize(factor)
        layers = resize, PointwiseConv2d(dim, dim, bias=False)
        self.add_module("up" if self.enlarges else "down", nn.ModuleList(layers))

    def forward(self, x: Tensor) -> Tensor:
        resized, convolved = cast(nn.ModuleList, next(self.children()))
        return resized(convolved(x)) if self.enlarges else convolved(resized(x))


class Quarter(nn.Module):
    """Bilinear resizing to a quarter of the size: the average of the inner 2x2 of 4x4 pixels.

    As pooling it scatters nothing in backward, see ``Quadruple``.

    Shape: (B, C, H, W), multiples of 4 -> (B, C, H / 4, W / 4).
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, :, 1:, 1:], 2, stride=4)


class Quadruple(nn.Module):
    """Bilinear resizing to four times the size.

    Shape: (B, C, H, W) -> (B, C, 4 H, 4 W).
    """

    def forward(self, x: Tensor) -> Tensor:
        # Not to scatter in backward: torch.compile may use the sums before they are made, and the gradient
        # is then 0 (pytorch/pytorch#185509).
        if torch.compiler.is_compiling():
            return _quadruple_along(_quadruple_along(x, 2), 3)
        return F.interpolate(x, scale_factor=4.0, mode="bilinear")


def _quadruple_along(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    before = torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)), dim)
    after = torch.cat((x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)), dim)
    mixtures = ((before, 3 / 8), (before, 1 / 8), (after, 1 / 8), (after, 3 / 8))
    mixed = [torch.lerp(x, beside, share) for beside, share in mixtures]
    return torch.stack(mixed, dim + 1).flatten(dim, dim + 1)


class Encoder(nn.Module):
    """Three levels, each at half the size of the one before.

    Shape: (B, dim, H, W) -> ``Levels``, H and W multiples of 8.
    """

    def __init__(self, options: ConvOptions, activation: nn.Module) -> None:
        super().__init__()
        self.encoder_level1 = _EncoderLevel(options, activation)
        self.encoder_level2 = _EncoderLevel(options, activation)
        self.encoder_level3 = _EncoderLevel(options, activation)
        self.down_stage1 = Resize(options.dim, 1 / 2)
        self.down_stage2 = Resize(options.dim, 1 / 2)
        self.down_stage3 = Resize(options.dim, 1 / 2)

    def forward(self, x: Tensor) -> Levels:
        level1 = self.encoder_level1(self.down_stage1(x))
        level2 = self.encoder_level2(self.down_stage2(level1))
        level3 = self.encoder_level3(self.down_stage3(level2))
        return level1, level2, level3


class Decoder(nn.Module):
    """From the smallest level up; each joins what lies below it with the encoder's levels, resized.

    Shape: ``Levels`` -> (B, dim, H, W).
    """

    def __init__(self, options: ConvOptions, activation: nn.Module) -> None:
        super().__init__()
        self.decoder_level1 = _DecoderLevel(options, activation)
        self.decoder_level2 = _DecoderLevel(options, activation)
        self.decoder_level3 = _DecoderLevel(options, activation)
        self.up_stage1 = Resize(options.dim, 2)
        self.up_stage2 = Resize(options.dim, 2)
        self.up_stage3 = Resize(options.dim, 2)
        # From one of the encoder's levels to another: the first digit says which, the second whereto.
        self.up_32 = Resize(options.dim, 2)
        self.up_31 = Resize(options.dim, 4)
        self.up_21 = Resize(options.dim, 2)
        self.down_13 = Resize(options.dim, 1 / 4)
        self.down_23 = Resize(options.dim, 1 / 2)
        self.down_12 = Resize(options.dim, 1 / 2)

    def forward(self, levels: Levels) -> Tensor:
        level1, level2, level3 = levels
        x = self.decoder_level3(level3, level3, self.down_23(level2), self.down_13(level1))
        x = self.decoder_level2(self.up_stage3(x), level2, self.down_12(level1), self.up_32(level3))
        x = self.decoder_level1(self.up_stage2(x), level1, self.up_21(level2), self.up_31(level3))
        return self.up_stage1(x)


class _EncoderLevel(nn.Module):
    def __init__(self, options: ConvOptions, activation: nn.Module) -> None:
        super().__init__()
        self.CAB1 = GatedSeparableConvs(options, activation)
        self.S2FB2 = FuseTwo(options)

    def forward(self, x: Tensor) -> Tensor:
        return self.S2FB2(x, self.CAB1(x))


class _DecoderLevel(nn.Module):
    def __init__(self, options: ConvOptions, activation: nn.Module) -> None:
        super().__init__()
        self.S2FB0 = FuseFour(options)
        self.CAB1 = GatedConvs(options, activation)
        self.S2FB2 = FuseTwo(options)

    def forward(self, below: Tensor, own: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
        x = self.S2FB0(below, own, third, fourth)
        return self.S2FB2(x, self.CAB1(x))
