"""What the networks are built of: the transformer block and the U around it.

Submodules carry the names of the published checkpoints (``norm1.body``, ``down1_2.body.0``, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from restore_kernels.nn import ChannelNorm, DenseConv2d, PointwiseConv2d
from restore_nets.models.options import UShapeOptions


def body(module: nn.Module) -> nn.Sequential:
    """The module under the name ``body``, as the published checkpoints have it."""
    return nn.Sequential(OrderedDict(body=module))


class TransformerBlock(nn.Module):
    """x + attn(norm1(x)), then x + ffn(norm2(x)), the order of a pre-norm transformer.

    Args:
        dim: channels of the image.
        norm: ``"WithBias"`` or ``"BiasFree"``, see ``restore_kernels.nn.ChannelNorm``.
        attn, ffn: modules (B, dim, H, W) -> (B, dim, H, W).

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, norm: str, attn: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1 = body(ChannelNorm(dim, norm))
        self.attn = attn
        self.norm2 = body(ChannelNorm(dim, norm))
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def downsample(dim: int) -> nn.Sequential:
    """(B, dim, H, W) -> (B, 2 dim, H/2, W/2)."""
    conv = DenseConv2d(dim, dim // 2, bias=False)
    return body(nn.Sequential(conv, nn.PixelUnshuffle(2)))


def upsample(dim: int) -> nn.Sequential:
    """(B, dim, H, W) -> (B, dim/2, 2H, 2W)."""
    conv = DenseConv2d(dim, 2 * dim, bias=False)
    return body(nn.Sequential(conv, nn.PixelShuffle(2)))


class UShape(nn.Module):
    """The four-level U of DRSformer (Chen et al., CVPR 2023), which predicts what to add to its input.

    Widths are dim, 2 dim, 4 dim and 8 dim. The decoder concatenates the encoder's features of its
    level: levels 3 and 2 reduce them by a 1x1 convolution, level 1 runs at 2 dim.

    Args:
        options: the checked options that every network of this shape has.
        block: ``block(dim, heads)`` makes one transformer block.
        compensator: ``compensator(dim)`` makes the module that runs before the encoder (at dim) and
            after the decoder (at 2 dim).

    Shape: (B, 3, H, W) -> (B, 3, H, W), any H and W. Sides that are no multiples of 8 are extended
    by reflection, and the result is cropped.
    """

    multiple = 8  # three times halved

    def __init__(
        self,
        options: UShapeOptions,
        block: Callable[[int, int], nn.Module],
        compensator: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        dim, bias, heads = options.dim, options.bias, options.heads

        def level(depth: int, dim: int) -> nn.Sequential:
            return nn.Sequential(*(block(dim, heads[depth]) for _ in range(options.num_blocks[depth])))

        self.patch_embed = nn.Sequential(OrderedDict(proj=DenseConv2d(3, dim, bias=False)))
        self.encoder_level0 = compensator(dim)
        self.encoder_level1 = level(0, dim)
        self.down1_2 = downsample(dim)
        self.encoder_level2 = level(1, 2 * dim)
        self.down2_3 = downsample(2 * dim)
        self.encoder_level3 = level(2, 4 * dim)
        self.down3_4 = downsample(4 * dim)
        self.latent = level(3, 8 * dim)
        self.up4_3 = upsample(8 * dim)
        self.reduce_chan_level3 = PointwiseConv2d(8 * dim, 4 * dim, bias=bias)
        self.decoder_level3 = level(2, 4 * dim)
        self.up3_2 = upsample(4 * dim)
        self.reduce_chan_level2 = PointwiseConv2d(4 * dim, 2 * dim, bias=bias)
        self.decoder_level2 = level(1, 2 * dim)
        self.up2_1 = upsample(2 * dim)
        self.decoder_level1 = level(0, 2 * dim)
        self.refinement = compensator(2 * dim)
        self.output = DenseConv2d(2 * dim, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
            raise ValueError(f"x must have shape (B, 3, H, W), not empty; got {tuple(x.shape)}")
        height, width = x.shape[2:]
        image = reflect(reflect(x, 2, -height % self.multiple), 3, -width % self.multiple)
        return (image + self._residual(image))[:, :, :height, :width]

    def _residual(self, image: Tensor) -> Tensor:
        level1 = self.encoder_level1(self.encoder_level0(self.patch_embed(image)))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        x = self.latent(self.down3_4(level3))
        x = self.decoder_level3(self.reduce_chan_level3((self.up4_3(x), level3)))
        x = self.decoder_level2(self.reduce_chan_level2((self.up3_2(x), level2)))
        x = self.decoder_level1(torch.cat((self.up2_1(x), level1), dim=1))
        return self.output(self.refinement(x))


def reflect(x: Tensor, dim: int, padding: int) -> Tensor:
    """x extended at the end of a dimension by reflection about its last entry.

    Where the padding is as long as x, the extended x is reflected again; a single entry is repeated.
    """
    while padding > 0:
        size = x.shape[dim]
        step = min(padding, max(size - 1, 1))
        start = max(size - 1 - step, 0)
        x = torch.cat((x, x.narrow(dim, start, step).flip(dim)), dim)
        padding -= step
    return x
