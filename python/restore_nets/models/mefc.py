"""The mixture-of-experts feature compensator of DRSformer."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels import depthwise_conv2d, pointwise_conv2d
from restore_kernels.nn import DepthwiseConv2d, PointwiseConv2d

STEPS = 4
EXPERTS = 8
GATE_HIDDEN = 2 * STEPS * EXPERTS


class FeatureCompensator(nn.Module):
    """MEFC (Chen et al., CVPR 2023): four steps, each a gated mixture of eight convolutional experts.

    A gate reads the global average of the input and weighs the experts of every step, for every image.

    Args:
        dim: channels of the image.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList((_Gate(dim), _Steps(dim)))

    def forward(self, x: Tensor) -> Tensor:
        gate, steps = self.layers
        return steps(x, gate(x))


class _Gate(nn.Module):
    """(B, dim, H, W) -> (B, STEPS, EXPERTS), a softmax over the experts of every step."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ca_fc = nn.Sequential(
            nn.Linear(dim, GATE_HIDDEN), nn.ReLU(), nn.Linear(GATE_HIDDEN, STEPS * EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ca_fc(x.mean(dim=(2, 3))).unflatten(1, (STEPS, EXPERTS)).softmax(dim=-1)


class _Steps(nn.Module):
    """A 1x1 convolution and ReLU, then s = relu(mixture(s) + s) for every step."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        preprocess = nn.Sequential(_pointwise(dim), nn.ReLU())
        self.preprocess = nn.Sequential(OrderedDict(op=preprocess))
        self._ops = nn.ModuleList(_Mixture(dim) for _ in range(STEPS))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        x = self.preprocess(x)
        for step, mixture in enumerate(self._ops):
            x = torch.relu(mixture(x, gates[:, step]) + x)
        return x


class _Mixture(nn.Module):
    """The experts' outputs, each times its gate, concatenated and reduced by a 1x1 convolution and ReLU.

    The 1x1 convolutions in which seven experts end are multiplied into the one that reduces, and so are the
    gates of an image: what is left is one convolution of what the experts have before.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        separable = [_separable(dim, size) for size in (1, 3, 5, 7)]
        self._ops = nn.ModuleList(separable + [_dilated(dim, size) for size in (3, 5, 7)])
        self._out = nn.Sequential(PointwiseConv2d(EXPERTS * dim, dim, bias=False), nn.ReLU())

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (B, dim, H, W), gates (B, EXPERTS)."""
        images = [*(expert(x) for expert in self._ops), _nine_averages(x)]
        return torch.relu(pointwise_conv2d(images, self._weight(gates)))

    def _weight(self, gates: Tensor) -> Tensor:
        """Of the one convolution: (B, dim, EXPERTS * dim, 1, 1)."""
        last = torch.stack([cast(_Expert, expert).last for expert in self._ops])  # (7, dim, dim)
        reducing = _matrix(self._out[0]).unflatten(1, (EXPERTS, -1)).transpose(0, 1)  # (8, dim, dim)
        merged = torch.cat((reducing[:-1] @ last, reducing[-1:] / 9))
        return (gates[:, :, None, None] * merged).transpose(1, 2).flatten(2)[..., None, None]


class _Expert(nn.Module):
    """All layers but the last, which the mixture applies; named ``op`` as in the published checkpoints.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*layers)

    @property
    def last(self) -> Tensor:
        """The matrix of the last layer, a 1x1 convolution: (dim, dim)."""
        return _matrix(self.op[-1])

    def forward(self, x: Tensor) -> Tensor:
        *layers, _ = self.op
        for layer in layers:
            x = layer(x)
        return x


def _separable(dim: int, size: int) -> _Expert:
    return _Expert(_depthwise(dim, size), _pointwise(dim), nn.ReLU(), _depthwise(dim, size), _pointwise(dim))


def _dilated(dim: int, size: int) -> _Expert:
    return _Expert(_depthwise(dim, size, dilation=2), _pointwise(dim))


def _depthwise(dim: int, size: int, dilation: int = 1) -> DepthwiseConv2d:
    return DepthwiseConv2d(dim, dim, size, dilation=dilation, bias=False)


def _pointwise(dim: int) -> PointwiseConv2d:
    return PointwiseConv2d(dim, dim, bias=False)


def _matrix(conv: nn.Module) -> Tensor:
    """Of a 1x1 convolution: (outputs, inputs)."""
    return cast(PointwiseConv2d, conv).weight.flatten(1)


def _nine_averages(x: Tensor) -> Tensor:
    """Nine times the averages over 3x3 neighbourhoods, as far as they lie inside of the image.

    Nine times, since what sums of fewer pixels are then multiplied by is exact in every dtype.
    """
    pixels = F.conv2d(x.new_ones(1, 1, *x.shape[2:]), x.new_ones(1, 1, 3, 3), padding=1)
    return depthwise_conv2d(x, x.new_ones(x.shape[1], 1, 3, 3), gate=(9 / pixels).expand_as(x))
