"""The channel attention of restoration networks: squeeze and excitation."""

from __future__ import annotations

from torch import Tensor, nn

from restore_kernels.channel_gate import channel_gate
from restore_kernels.nn.convolutions import PointwiseConv2d
from restore_kernels.nn.heads import check_image


class ChannelGate(nn.Module):
    """Every channel times a number in (0, 1) that the averages of all channels give.

    RCAN's CALayer (arXiv 1807.02758), as MPRNet, ELF and many others have it; see ``channel_gate``.

    Args:
        dim: channels of the image.
        reduction: the averages pass through dim // reduction channels.
        bias: whether the two convolutions of size 1 have one.

    Called with the image and optionally with a residual of its shape, which is added to the result.

    Shape: (B, dim, H, W) -> (B, dim, H, W), in the memory format of the image and in its dtype, or in that of
    a residual that is wider.
    """

    def __init__(self, dim: int, reduction: int = 16, bias: bool = True) -> None:
        super().__init__()
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction must be 1 to dim; got dim={dim}, reduction={reduction}")
        self.dim = dim
        self.conv_du = nn.Sequential(
            PointwiseConv2d(dim, dim // reduction, bias=bias), nn.ReLU(),
            PointwiseConv2d(dim // reduction, dim, bias=bias), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_image("x", x, self.dim)
        if residual is not None and residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x {tuple(x.shape)}; got {tuple(residual.shape)}"
            )
        down, _, up, _ = self.conv_du
        assert isinstance(down, nn.Conv2d) and isinstance(up, nn.Conv2d)
        parameters = (down.weight, up.weight, down.bias, up.bias)
        if residual is None or residual.dtype == x.dtype:
            return channel_gate(x, *parameters, residual)
        # Under autocast a convolution's result is narrower than what it is added to.
        return channel_gate(x, *parameters) + residual
