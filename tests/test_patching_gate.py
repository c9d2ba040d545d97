"""Channel attention of other people's networks is swapped where it is a channel gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from restore_kernels import patch
from restore_kernels.nn import ChannelGate, PointwiseConv2d


class CALayer(nn.Module):
    """RCAN's, which MPRNet, HAN and many others have."""

    def __init__(self, channels: int, hidden: int, bias: bool = True, last: Callable = nn.Sigmoid) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=bias), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=bias), last(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.avg_pool(x))


class Residual(nn.Module):
    """A block as they have it; its sum stays outside of the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = CALayer(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + x


MADE = {
    "of one number": lambda: CALayer(16, 1),
    "without bias": lambda: CALayer(16, 4, bias=False),
    "inside": Residual,
}  # fmt: skip


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_calayers_are_swapped(make):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 16, 5, 6)
    before, keys = nn.Sequential(module), list(module.state_dict())
    expected = before(x)
    patched = patch(before)
    assert [swap.new for swap in patched.replaced if swap.new is not PointwiseConv2d] == [ChannelGate]
    torch.testing.assert_close(before(x), expected)
    assert list(module.state_dict()) == keys
    patched.undo()
    assert not any(isinstance(part, ChannelGate) for part in before.modules())
    assert torch.equal(before(x), expected)


class Leaky(CALayer):
    def __init__(self) -> None:
        super().__init__(16, 1)
        self.conv_du[1] = nn.LeakyReLU()


class Halved(CALayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class WithAMask(CALayer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) if mask is None else super().forward(x) * mask


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: CALayer(16, 7), "its parameters are not those of ChannelGate"),
        (lambda: CALayer(16, 4, last=nn.Softsign), "its conv_du must be Conv2d, ReLU, Conv2d, Sigmoid; got"),
        (Leaky, "its conv_du must be Conv2d, ReLU, Conv2d, Sigmoid; got"),
        (lambda: Halved(16, 4), "its output differs by"),
        (lambda: WithAMask(16, 4), "its forward pass takes x, mask"),
    ],
    ids=["no whole reduction", "another gate", "another rectifier", "halved", "with a mask"],
)
def test_near_misses_are_named(make, reason):
    patched = patch(nn.Sequential(make()))
    assert ChannelGate not in [swap.new for swap in patched.replaced]
    assert any(reason in skipped.reason for skipped in patched.skipped)
