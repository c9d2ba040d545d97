"""The full design of association learning: a degradation mask, and tokens that see the whole image."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels.nn import DenseConv2d
from restore_nets.models.fusion import ConvOptions
from restore_nets.models.gated import GatedBlockOptions
from restore_nets.models.options import check_association_options, check_integer, check_number
from restore_nets.models.subtasks import BackgroundNetwork, DerainingNetwork, Stem, TwoTaskNetwork
from restore_nets.models.tokens import TokenBranch

# At the start no residual makes a mask of 0.08, one of 0.06 makes 1/2 and one of 0.12 makes 0.92.
INITIAL_GAIN, INITIAL_BIAS = 40.0, -2.4


class AssociationNetwork(TwoTaskNetwork):
    """Removes rain and recovers the background, which attends to the image where it is degraded.

    Source: arXiv 2311.05147, "Dynamic Association Learning of Self-Attention and Convolution in Image
    Restoration". The released ELF leaves out the degradation mask and the learned tokens, and no code
    of them is published: what follows is our reading. Everything else is that of ``ELF``. The default
    has 1,415,638 parameters.

    - The degradation mask (see ``DegradationMask``) is near 1 where rain was found and near 0 where
      the image is clean. Queries come from the rain, keys and values from the image under the mask:
      what attention adds to the background's features comes from the degraded places.
    - In both sub-networks the branch beside the encoder-decoder has learned tokens (``TokenBranch``).

    Args:
        n_feat: channels of all features; even and a multiple of heads.
        heads: attention heads of the branches beside the encoder-decoders.
        num_blocks: transformer blocks of each of these branches.
        tokens: learned tokens of each.
        token_layers: layers of attention among them.
        ffn_expansion: the blocks' feed-forward networks have int(n_feat * ffn_expansion) channels.
        kernel_size: side of the plain convolutions, odd.
        reduction: channel attention passes through n_feat // reduction channels.
        bias: whether convolutions have a bias; the separable ones always have one.

    Shape: (B, 3, H, W), any size, values in [0, 1] -> the background (B, 3, H, W) and the background at
    half resolution (B, 3, ceil(H/2), ceil(W/2)); see ``TwoTaskNetwork``.
    """

    def __init__(
        self, *,
        n_feat: int = 48, heads: int = 2, num_blocks: int = 5, tokens: int = 16, token_layers: int = 4,
        ffn_expansion: float = 2.66, kernel_size: int = 3, reduction: int = 4, bias: bool = False,
    ) -> None:  # fmt: skip
        check_association_options(n_feat, heads, kernel_size, reduction, bias)
        for name, value in (("num_blocks", num_blocks), ("tokens", tokens), ("token_layers", token_layers)):
            check_integer(name, value)
        check_number("ffn_expansion", ffn_expansion)
        if int(n_feat * ffn_expansion) < 1:
            raise ValueError(f"ffn_expansion must give at least 1 hidden channel; got {ffn_expansion}")
        convs = ConvOptions(n_feat, kernel_size, reduction, bias)
        blocks = GatedBlockOptions(n_feat, ffn_expansion, bias)

        def branch() -> nn.Module:
            return TokenBranch(blocks, heads, tokens, token_layers, num_blocks)

        super().__init__(
            DerainingNetwork(convs, blocks, branch),
            BackgroundNetwork(convs, blocks, MaskedStem(convs, blocks), branch),
        )
        # Training starts near the rainy image itself, not at noise on top of it; at zero exactly, the
        # first steps would teach the other layers nothing.
        with torch.no_grad():
            for tail in (self.dsnet.tail, self.ssnet.tail):
                for parameter in tail.parameters():
                    parameter.mul_(0.1)

    def degradation_mask(self, x: Tensor) -> Tensor:
        """Where the network finds the image degraded.

        Args:
            x: (B, 3, H, W), any size, values in [0, 1].

        Returns:
            (B, 1, H, W) in [0, 1], high where degraded; at half resolution in the network, resized.
        """
        height, width = x.shape[-2:]
        residual, _ = self.dsnet(self._padded(x))
        stem = cast(MaskedStem, self.ssnet.stem)
        mask = stem.degradation_mask(residual, stem.conv_stem2(residual))
        return F.interpolate(mask, scale_factor=2.0, mode="bilinear")[:, :, :height, :width]


class DegradationMask(nn.Module):
    """How degraded every pixel is: sigmoid(gain * |R| + correction).

    |R| is the mean of the absolute residual over the colours, gain a learned positive number. The
    correction is a 3x3 convolution of the prior features, which starts as a constant. No loss says
    what the mask must be, only what comes of it; so it is made of what is known of degradation from
    the start, the predicted rain, and cannot be turned round by chance.

    Args:
        dim: channels of the prior features.

    Shape: residual (B, 3, H, W), its features (B, dim, H, W) -> (B, 1, H, W) in (0, 1).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.tensor([math.log(INITIAL_GAIN)]))
        self.correction = DenseConv2d(dim, 1)
        with torch.no_grad():
            self.correction.weight.zero_()
            self.correction.bias.fill_(INITIAL_BIAS)  # type: ignore[union-attr]

    def forward(self, residual: Tensor, prior: Tensor) -> Tensor:
        magnitude = residual.abs().mean(dim=1, keepdim=True)
        return torch.sigmoid(self.log_gain.exp() * magnitude + self.correction(prior))


class MaskedStem(Stem):
    """The stem, whose attention sees the image through the degradation mask."""

    def __init__(self, convs: ConvOptions, blocks: GatedBlockOptions) -> None:
        super().__init__(convs, blocks)
        self.mask = DegradationMask(convs.dim)

    def degradation_mask(self, residual: Tensor, prior: Tensor) -> Tensor:
        return self.mask(residual, prior)
