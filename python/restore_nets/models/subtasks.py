"""Association learning: one network predicts the rain, another one recovers the background with its help.

Source: arXiv 2311.05147, "Dynamic Association Learning of Self-Attention and Convolution in Image
Restoration". What ELF, its released form, and the paper's full design have in common.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels import bilinear_resize
from restore_nets.models.blocks import reflect
from restore_nets.models.fusion import ConvOptions, FuseTwo, GatedConvs
from restore_nets.models.gated import GatedBlockOptions, MultiInputBlock
from restore_nets.models.multi_scale import Decoder, Encoder

Branch = Callable[[], nn.Module]  # makes the branch that runs beside the encoder-decoder, at full width


def half_size(image: Tensor) -> Tensor:
    """An image at half resolution, as the networks here see and return it: every 2x2 pixels averaged.

    Bilinear resizing without corner alignment. An odd side is first extended by reflection.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, C, ceil(H/2), ceil(W/2)).
    """
    height, width = image.shape[2:]
    even = reflect(reflect(image, 2, height % 2), 3, width % 2)
    return bilinear_resize(even, 0.5)


class TwoTaskNetwork(nn.Module):
    """The frame: any size in, both sub-networks, cropped results out.

    Args:
        deraining: (B, 3, H, W) -> residual and background, both (B, 3, H/2, W/2).
        background: (image, residual, background) -> what to subtract from the image (B, 3, H, W).

    Shape: (B, 3, H, W), any H and W, values in [0, 1] -> the background (B, 3, H, W), and the background
    at half resolution (B, 3, ceil(H/2), ceil(W/2)). For training, ``half_size`` makes of a clean image
    what the second is to be like. Sides that are no multiples of 16 are extended by reflection.
    """

    multiple = 16  # halved for both sub-networks, then three times in their encoders

    def __init__(self, deraining: DerainingNetwork, background: BackgroundNetwork) -> None:
        super().__init__()
        self.dsnet = deraining
        self.ssnet = background

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[-2:]
        image = self._padded(x)
        residual, half_background = self.dsnet(image)
        background = image - self.ssnet(image, residual, half_background)
        half_background = half_background[:, :, : (height + 1) // 2, : (width + 1) // 2]
        return background[:, :, :height, :width], half_background

    def _padded(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
            raise ValueError(f"x must have shape (B, 3, H, W), not empty; got {tuple(x.shape)}")
        height, width = x.shape[2:]
        return reflect(reflect(x, 2, -height % self.multiple), 3, -width % self.multiple)


class DerainingNetwork(nn.Module):
    """Predicts the rain at half resolution from the half-sized image and from its four quadrants, stacked.

    Args:
        convs: options of the convolutional blocks.
        blocks: options of the transformer blocks.
        branch: makes the branch beside the encoder-decoder.

    Shape: (B, 3, H, W), multiples of 16 -> the residual R and the background, the half-sized image
    minus R: both (B, 3, H/2, W/2).
    """

    def __init__(self, convs: ConvOptions, blocks: GatedBlockOptions, branch: Branch) -> None:
        super().__init__()
        dim = convs.dim
        activation = nn.PReLU()
        self.shallow_feat1 = nn.Sequential(convs.conv(3, dim), GatedConvs(convs, activation))
        self.shallow_feat2 = nn.Sequential(convs.conv(4 * 3, dim), GatedConvs(convs, activation))
        self.fuse_conv = convs.conv(2 * dim, dim)
        self.former = nn.Sequential(blocks.block(heads=1))
        self.orsnet = branch()
        self.dsnnet_encoder = Encoder(convs, activation)
        self.dsnnet_decoder = Decoder(convs, activation)
        self.S2FB_fuse = FuseTwo(convs)
        self.tail = convs.conv(dim, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = half_size(x)
        quadrants = torch.cat([part for rows in x.chunk(2, dim=2) for part in rows.chunk(2, dim=3)], dim=1)
        shallow = self.shallow_feat1(half), self.former(self.shallow_feat2(quadrants))
        x = self.fuse_conv(torch.cat(shallow, dim=1))
        x = self.S2FB_fuse(self.orsnet(x), self.dsnnet_decoder(self.dsnnet_encoder(x)))
        residual = self.tail(x)
        return residual, half - residual


class Stem(nn.Module):
    """Features of the half-sized background, refined by what attention brings from the rainy image.

    Args:
        convs: options of the convolutions.
        blocks: options of the multi-input block.

    Shape: image (B, 3, H, W), residual and background (B, 3, H/2, W/2) -> (B, dim, H/2, W/2).
    """

    def __init__(self, convs: ConvOptions, blocks: GatedBlockOptions) -> None:
        super().__init__()
        self.conv_stem0 = convs.conv(3, convs.dim, stride=2)
        self.conv_stem2 = convs.conv(3, convs.dim)
        self.former = MultiInputBlock(blocks, heads=1)
        self.conv_stem3 = convs.conv(3, convs.dim)
        self.S2FB = FuseTwo(convs)

    def forward(self, image: Tensor, residual: Tensor, background: Tensor) -> Tensor:
        prior = self.conv_stem2(residual)
        features = self.conv_stem0(image)
        attended = self.former(prior, features, features, self.degradation_mask(residual, prior))
        return self.S2FB(self.conv_stem3(background), attended)

    def degradation_mask(self, residual: Tensor, prior: Tensor) -> Tensor | None:
        """Where attention may look: None for everywhere.

        Args:
            residual: (B, 3, H/2, W/2).
            prior: its features (B, dim, H/2, W/2).
        """
        return None


class BackgroundNetwork(nn.Module):
    """Predicts what to subtract from the image, from the features of a stem at half resolution.

    Args:
        convs, blocks, branch: see ``DerainingNetwork``.
        stem: (image, residual, background) -> (B, dim, H/2, W/2), see ``Stem``.

    Shape: image (B, 3, H, W), residual and background (B, 3, H/2, W/2) -> (B, 3, H, W).
    """

    def __init__(self, convs: ConvOptions, blocks: GatedBlockOptions, stem: Stem, branch: Branch) -> None:
        super().__init__()
        dim = convs.dim
        activation = nn.PReLU()
        self.stem = stem
        self.former = nn.Sequential(blocks.block(heads=1))
        self.orsnet = branch()
        self.ssnnet_encoder = Encoder(convs, activation)
        self.ssnnet_decoder = Decoder(convs, activation)
        self.S2FB_fuse = FuseTwo(convs)
        self.deep_conv = convs.conv(dim, 2 * dim)
        self.tail = convs.conv(dim // 2, 3)

    def forward(self, image: Tensor, residual: Tensor, background: Tensor) -> Tensor:
        x = self.former(self.stem(image, residual, background))
        x = self.S2FB_fuse(self.orsnet(x), self.ssnnet_decoder(self.ssnnet_encoder(x)))
        fine = self.tail(_transposed_pixel_shuffle(self.deep_conv(x)))
        return bilinear_resize(residual, 2, fine)


def _transposed_pixel_shuffle(x: Tensor) -> Tensor:
    """(B, 4 C, H, W) -> (B, C, 2 H, 2 W); channel 4 c + 2 i + j goes to column offset i and row offset j."""
    return F.pixel_shuffle(x.unflatten(1, (-1, 2, 2)).transpose(2, 3).flatten(1, 3), 2)
