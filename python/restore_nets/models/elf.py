"""ELF: the released association-learning network."""

from __future__ import annotations

from restore_nets.models.fusion import ConvOptions
from restore_nets.models.gated import GatedBlockOptions, ResidualBlocks, original_resolution
from restore_nets.models.options import check_association_options
from restore_nets.models.subtasks import BackgroundNetwork, DerainingNetwork, Stem, TwoTaskNetwork

HEADS, NUM_BLOCKS = 2, 5  # of the branches at half resolution


class ELF(TwoTaskNetwork):
    """ELF, which removes rain at half resolution and recovers the background with what it found there.

    Source: the released network of association learning (arXiv 2311.05147). Published checkpoints
    load unchanged. The default has 1,223,972 parameters.

    Args:
        n_feat: channels of all features; even.
        kernel_size: side of the plain convolutions, odd.
        reduction: channel attention passes through n_feat // reduction channels.
        bias: whether convolutions have a bias; the separable ones always have one.

    Shape: (B, 3, H, W), any size, values in [0, 1] -> the background (B, 3, H, W) and the background at
    half resolution (B, 3, ceil(H/2), ceil(W/2)); see ``TwoTaskNetwork``.
    """

    def __init__(
        self, *, n_feat: int = 48, kernel_size: int = 3, reduction: int = 4, bias: bool = False
    ) -> None:
        check_association_options(n_feat, HEADS, kernel_size, reduction, bias)
        convs = ConvOptions(n_feat, kernel_size, reduction, bias)
        blocks = GatedBlockOptions(n_feat, bias=bias)

        def branch():
            return original_resolution(ResidualBlocks(blocks, HEADS, NUM_BLOCKS))

        super().__init__(
            DerainingNetwork(convs, blocks, branch),
            BackgroundNetwork(convs, blocks, Stem(convs, blocks), branch),
        )
