"""Convolutions, as drop-ins for ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from restore_kernels.dense_conv import dense_conv2d
from restore_kernels.depthwise_conv import depthwise_conv2d
from restore_kernels.depthwise_conv.api import ACTIVATIONS, DILATIONS, INPUTS, SIZES, activation_names
from restore_kernels.pointwise_conv import pointwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with as many groups as output channels, stride 1 and the padding that keeps the size.

    A drop-in: the same state-dict keys, shapes and initial values.

    Args:
        in_channels: of the image; out_channels, or twice as many.
        out_channels: of the result.
        kernel_size: 1, 3, 5 or 7.
        dilation: 1 or 2, of the taps.
        bias: whether there is one.
        activation: None, ``"relu"``, ``"gelu"`` or ``"prelu"``, applied to the result. The slope of the last
            belongs to whoever calls the module, so that it can keep its place in published checkpoints.

    Called with one image or several that count as concatenated along channels, and optionally with a gate
    that multiplies the activated result and with the slope, (1) or (out_channels), of ``"prelu"``.

    Shape: (B, in_channels, H, W), and gate (B, out_channels, H, W) -> (B, out_channels, H, W), or all
    without B.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1, bias: bool = True,
        activation: str | None = None,
    ) -> None:  # fmt: skip
        if out_channels < 1 or in_channels not in [inputs * out_channels for inputs in INPUTS]:
            raise ValueError(
                "in_channels must be out_channels or twice as many; "
                f"got in_channels={in_channels}, out_channels={out_channels}"
            )
        if kernel_size not in SIZES:
            raise ValueError(f"kernel_size must be 1, 3, 5 or 7; got {kernel_size!r}")
        if dilation not in DILATIONS:
            raise ValueError(f"dilation must be 1 or 2; got {dilation!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {activation_names()}; got {activation!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, padding=dilation * (kernel_size // 2),
            dilation=dilation, groups=out_channels, bias=bias,
        )  # fmt: skip
        self.activation = activation

    def forward(
        self, input: Tensor | Sequence[Tensor], gate: Tensor | None = None, slope: Tensor | None = None
    ) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 3:  # which nn.Conv2d takes too
            return self.forward(input[None], None if gate is None else gate[None], slope)[0]
        return depthwise_conv2d(
            input, self.weight, self.bias, dilation=self.dilation[0], activation=self.activation, slope=slope,
            gate=gate,
        )  # fmt: skip


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` of size 1 and stride 1, of one image or of several as if they were concatenated.

    A drop-in: the same state-dict keys, shapes and initial values.

    Args:
        in_channels: of the image, or of all images together.
        out_channels: of the result.
        bias: whether there is one.

    Shape: (B, in_channels, H, W), or a sequence of 1 to 8 (B, C_i, H, W) whose C_i sum up to in_channels ->
    (B, out_channels, H, W). An image without B gives one without.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        _check_channels(in_channels, out_channels)
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, input: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        return pointwise_conv2d(input, self.weight, self.bias)


class DenseConv2d(nn.Conv2d):
    """``nn.Conv2d`` of size 3, stride 1 and the zero padding that keeps the size, in one group.

    A drop-in: the same state-dict keys, shapes and initial values.

    Args:
        in_channels: of the image.
        out_channels: of the result.
        bias: whether there is one.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H, W), or both without B.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        _check_channels(in_channels, out_channels)
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        return dense_conv2d(input, self.weight, self.bias)


def _check_channels(in_channels: int, out_channels: int) -> None:
    if in_channels < 1 or out_channels < 1:
        raise ValueError(
            "in_channels and out_channels must be at least 1; "
            f"got in_channels={in_channels}, out_channels={out_channels}"
        )
