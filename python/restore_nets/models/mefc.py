"""The mixture-of-experts feature compensator of DRSformer."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from restore_kernels.nn import DepthwiseConv2d

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
        self.preprocess = _op(nn.Conv2d(dim, dim, 1, bias=False), nn.ReLU())
        self._ops = nn.ModuleList(_Mixture(dim) for _ in range(STEPS))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        x = self.preprocess(x)
        for step, mixture in enumerate(self._ops):
            x = torch.relu(mixture(x, gates[:, step]) + x)
        return x


class _Mixture(nn.Module):
    """The experts' outputs, each times its gate, concatenated and reduced by a 1x1 convolution and ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(
            (
                *(_separable(dim, size) for size in (1, 3, 5, 7)),
                *(_dilated(dim, size) for size in (3, 5, 7)),
                nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            )
        )
        self._out = nn.Sequential(nn.Conv2d(EXPERTS * dim, dim, 1, bias=False), nn.ReLU())

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (B, dim, H, W), gates (B, EXPERTS)."""
        experts = [expert(x) * gates[:, i, None, None, None] for i, expert in enumerate(self._ops)]
        return self._out(torch.cat(experts, dim=1))


def _op(*layers: nn.Module) -> nn.Module:
    """The layers under the name ``op``, as the published checkpoints have them."""
    return nn.Sequential(OrderedDict(op=nn.Sequential(*layers)))


def _depthwise(dim: int, size: int, dilation: int = 1) -> DepthwiseConv2d:
    return DepthwiseConv2d(dim, dim, size, dilation=dilation, bias=False)


def _pointwise(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 1, bias=False)


def _separable(dim: int, size: int) -> nn.Module:
    return _op(_depthwise(dim, size), _pointwise(dim), nn.ReLU(), _depthwise(dim, size), _pointwise(dim))


def _dilated(dim: int, size: int) -> nn.Module:
    return _op(_depthwise(dim, size, dilation=2), _pointwise(dim))
